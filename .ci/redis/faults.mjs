// What becomes of messages while Redis, the network or a daemon fails: a table with one row for each fault.
// Started by ./run.
//
// Each fault has a chat of its own: a real redis-server, two daemons, and five members on each. Messages are
// posted to both daemons all the time, 25 a second to each, whether or not the ones before have been answered;
// none is posted again, so that each has one answer to judge. Redis lets the daemons do what the README's ACL
// line says, and nothing else.
//
// A member that comes back has fetched all that was posted until then, as a page does. So a message is lost in
// silence where it was answered 200, and a member neither heard it nor came back after it was posted.

import { mkdirSync, rmdirSync } from 'node:fs';
import { join } from 'node:path';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { io } from 'socket.io-client';
import { signed } from './clients.mjs';
import { Daemon, Link, Redis, freePort, pause, until } from './processes.mjs';

const acl = 'resetkeys ~socketio:0 ~socketio:0:whispers resetchannels -@all +hello +select +info +xadd +xread +xrange';
const user = `user socketio on >password ${acl}`;
const every = 40; // ms between two posts to a daemon
const spread = 5_000; // ms over which a node sends its clients back
const interval = 60_000; // ms, at least, from one such time to the next
const slowest = 2_600; // ms that an answer may take
const lag = 400; // ms that a busy machine may add, beside those by which this program itself was late
const grown = 20; // lines that a fault may add to a daemon's log

// A fault is caused by hurt, lasts from the end of that, and is over after heal. What else has to hold:
//
//	refused     both daemons say so, with this word of Redis's, in the answer of /health and in the log
//	inFlight    … and yet what was on its way when it began may be answered 504
//	degraded    /health is 503 at the end
//	accepts     a daemon that was there all the time refuses nothing
//	unanswered  what a killed daemon had may have no answer
//	back        who is sent back: none, all, or those of b
const faults = [
  // Redis ends.
  ...[
    { name: 'kill -9, away for 1 s, no persistence', lasts: 1_000 },
    { name: 'kill -9, away for 1 s, AOF everysec', lines: ['appendonly yes', 'appendfsync everysec'], lasts: 1_000 },
    { name: 'kill -9, started at once, AOF always', lines: ['appendonly yes', 'appendfsync always'], lasts: 0 },
  ].map((fault) => ({
    ...fault,
    hurt: ({ redis }) => redis.end('SIGKILL'),
    heal: ({ redis }) => redis.start(),
    back: 'all',
  })),
  {
    name: 'LOADING for 3 s after kill -9',
    lines: ['loading-process-events-interval-bytes 1024'], // how often it looks at its clients meanwhile
    hurt: async ({ redis }) => {
      await redis.command('EVAL', "for i = 1, 3000 do redis.call('SET', i, '0123456789') end", '0');
      await redis.command('SAVE');
      redis.lines.push('key-load-delay 1000'); // µs
      await redis.end('SIGKILL');
      await redis.start();
    },
    refused: 'LOADING',
    inFlight: true,
    heal: ({ redis }) => until('it to be loaded', async () => /\bloading:0/.test(await redis.command('INFO', 'persistence'))),
    back: 'all',
  },

  // Redis hangs.
  ...[1, 2, 5, 60].map((seconds) => ({
    name: `SIGSTOP of Redis, ${seconds} s`,
    long: seconds > 5,
    hurt: ({ redis }) => redis.signal('SIGSTOP'),
    lasts: seconds * 1_000,
    degraded: seconds > 2,
    heal: ({ redis }) => redis.signal('SIGCONT'),
    back: 'none',
  })),
  {
    name: '40 SIGSTOPs of Redis, 0 to 4 s, at 300 posts a second',
    long: true,
    every: 1_000 / 150,
    takes: 120_000,
    grown: 200,
    hurt: async ({ redis }) => {
      for (let i = 0; i < 40; i++) {
        redis.signal('SIGSTOP');
        await pause(4_000 * Math.random());
        redis.signal('SIGCONT');
        await pause(1_000 * Math.random());
      }
    },
    back: 'none',
  },

  // Redis refuses.
  {
    name: 'CLIENT KILL of all, three times',
    hurt: async ({ redis }) => {
      for (let i = 0; i < 3; i++) {
        await redis.command('CLIENT', 'KILL', 'USER', 'socketio');
        await pause(300);
      }
    },
    back: 'none',
  },
  {
    name: 'demotion to a replica, and back',
    hurt: async ({ redis }) => redis.command('REPLICAOF', '127.0.0.1', await freePort()),
    refused: 'READONLY',
    heal: ({ redis }) => redis.command('REPLICAOF', 'NO', 'ONE'),
    back: 'none',
  },
  {
    // The name of Redis leads to the new master, and the connections to the old one stay; b has lost its own.
    name: 'failover: the name moves, a keeps its connections',
    linked: true,
    hurt: async ({ redis, links, start }) => {
      const replica = await start(new Redis(await freePort(), { lines: [user, `replicaof 127.0.0.1 ${redis.port}`] }));
      await until('the replica to be in step', async () => /master_link_status:up/.test(await replica.command('INFO', 'replication')));
      await replica.command('REPLICAOF', 'NO', 'ONE');
      await redis.command('REPLICAOF', '127.0.0.1', replica.port);
      for (const link of links) link.target = replica.port;
      links[1].reset();
    },
    lasts: 1_000,
  },
  {
    // What is added there, nobody reads who has stayed: it must not be answered 200.
    name: 'split brain: new connections lead to another master for 3 s',
    linked: true,
    takes: 80_000, // where a node moves, and back, its second time to send its clients back is a minute later
    hurt: async ({ links, daemons, start, post }) => {
      const other = await start(new Redis(await freePort(), { lines: [user] }));
      for (const link of links) link.target = other.port;
      await Promise.all(daemons.flatMap((daemon) => Array.from({ length: 20 }, () => post(daemon))));
    },
    lasts: 3_000,
    heal: ({ links, redises: [redis, other] }) => {
      for (const link of links) link.target = redis.port;
      return other.end('SIGKILL');
    },
  },
  {
    name: 'NOPERM on the write',
    hurt: ({ redis }) => redis.command('ACL', 'SETUSER', 'socketio', '-xadd'),
    refused: 'NOPERM',
    heal: ({ redis }) => redis.command('ACL', 'SETUSER', 'socketio', '+xadd'),
    back: 'none',
  },
  {
    name: 'NOPERM on the read',
    hurt: ({ redis }) => redis.command('ACL', 'SETUSER', 'socketio', '-xread'),
    refused: 'NOPERM',
    inFlight: true,
    heal: ({ redis }) => redis.command('ACL', 'SETUSER', 'socketio', '+xread'),
    back: 'none',
  },
  {
    name: 'WRONGPASS after a restart: the ACL was not saved',
    hurt: async ({ redis }) => {
      redis.lines = [];
      await redis.end('SIGKILL');
      await redis.start();
    },
    refused: 'WRONGPASS',
    inFlight: true,
    heal: ({ redis }) => redis.command('ACL', 'SETUSER', ...user.split(' ').slice(1)),
    back: 'all',
  },
  {
    name: 'WRONGPASS on new connections: the password was changed',
    hurt: async ({ redis, post, posts, daemons }) => {
      await redis.command('ACL', 'SETUSER', 'socketio', 'resetpass', '>another');
      const refused = (daemon) => posts.some((post) => post.daemon === daemon && post.status === 503);
      await until('a new connection of each daemon', async () => { // that it needs one takes many posts at once
        await Promise.all(daemons.flatMap((daemon) => Array.from({ length: 40 }, () => post(daemon))));
        return daemons.every(refused);
      }, 5_000);
    },
    refused: 'WRONGPASS',
    heal: ({ redis }) => redis.command('ACL', 'SETUSER', 'socketio', 'resetpass', '>password'),
    back: 'none',
  },
  {
    name: 'OOM: maxmemory reached',
    hurt: ({ redis }) => redis.command('CONFIG', 'SET', 'maxmemory', '1'),
    refused: 'OOM',
    heal: ({ redis }) => redis.command('CONFIG', 'SET', 'maxmemory', '0'),
    back: 'none',
  },
  {
    name: 'MISCONF: it cannot save',
    lines: ['save 3600 1000000'],
    hurt: async ({ redis }) => {
      mkdirSync(join(redis.dir, 'dump.rdb')); // where the file has to be
      await saved(redis, 'err');
    },
    refused: 'MISCONF',
    heal: async ({ redis }) => {
      rmdirSync(join(redis.dir, 'dump.rdb'));
      await saved(redis, 'ok');
    },
    back: 'none',
  },
  {
    name: "Redis's clock was an hour ahead, and is set right",
    hurt: async ({ redis, daemons, soon }) => {
      await redis.command('XADD', 'socketio:0', `${Date.now() + 3_600_000}-0`, 'a', 'stranger'); // what is added now has this time, too
      await Promise.all(daemons.map((daemon) => soon(daemon, 20)));
    },
    back: 'none',
  },
  {
    name: 'WRONGTYPE: another program took the key',
    hurt: ({ redis }) => redis.command('SET', 'socketio:0', 'x'),
    refused: 'WRONGTYPE',
    heal: ({ redis }) => redis.command('DEL', 'socketio:0'),
  },

  // The network fails, of b alone or of both.
  ...[1, 3, 10, 30].flatMap((seconds) => [
    { name: `b's network is cut, ${seconds} s`, hurt: ({ links }) => links[1].cut() },
    { name: `b's network stalls, ${seconds} s`, hurt: ({ links }) => links[1].hold('up', 'down') },
  ].map((fault) => ({ ...fault, linked: true, long: seconds > 3, lasts: seconds * 1_000, back: 'none' }))),
  ...[
    { name: 'answers to b are lost, 1 s', hurt: ({ links }) => links[1].hold('down'), lasts: 1_000 },
    { name: 'answers to b are lost, 5 s', hurt: ({ links }) => links[1].hold('down'), lasts: 5_000 },
    { name: 'answers to both are lost, 5 s', hurt: ({ links }) => links.forEach((link) => link.hold('down')), lasts: 5_000 },
  ].map((fault) => ({ ...fault, linked: true, back: 'none' })),
  {
    name: "b catches up by 8 MB/s, after 30 messages of 900 KB",
    linked: true,
    hurt: async ({ links, daemons, posts, members, large, post, quiet }) => {
      links[1].rate = 8e6;
      links[1].cut();
      quiet(...daemons); // small ones between them would make each batch smaller
      await large(30);
      await post(daemons[0]);
      const last = posts.at(-1);
      links[1].cutOff = false;
      await until('b to have caught up', () => members.every((member) => member.has(last)), 20_000);
    },
    back: 'none',
  },
  {
    name: 'idle connections are forgotten after 70 s',
    linked: true,
    takes: 80_000,
    hurt: async ({ links, daemons, post, quiet }) => {
      for (const link of links) link.forgets = 70_000;
      await Promise.all(daemons.flatMap((daemon) => Array.from({ length: 20 }, () => post(daemon)))); // 20 connections each
      quiet(...daemons);
      await pause(71_000);
      await Promise.all(daemons.flatMap((daemon) => Array.from({ length: 20 }, () => post(daemon))));
    },
    accepts: true,
    back: 'none',
  },

  // The stream goes.
  { name: 'FLUSHDB', hurt: ({ redis }) => redis.command('FLUSHDB'), accepts: true },
  { name: 'the key is evicted', hurt: ({ redis }) => redis.command('UNLINK', 'socketio:0'), accepts: true },
  ...[['FLUSHDB'], ['DEL', 'socketio:0']].map((command) => ({
    name: `${command[0]} while b sleeps`,
    hurt: async ({ redis, daemons, sleep, soon }) => {
      sleep(daemons[1]);
      await soon(daemons[0], 20); // that b has yet to read
      await redis.command(...command);
      await soon(daemons[0], 20); // that it will read
    },
    heal: ({ daemons, wake }) => wake(daemons[1]),
    back: 'b',
    accepts: true,
  })),

  // A daemon sleeps, or ends.
  {
    name: 'SIGSTOP of b, 3 s',
    hurt: ({ daemons, sleep }) => sleep(daemons[1]),
    lasts: 3_000,
    heal: ({ daemons, wake }) => wake(daemons[1]),
    back: 'none',
    accepts: true,
  },
  {
    name: 'SIGSTOP of Redis and b, 5 s, b goes on 2 s later',
    hurt: ({ redis, daemons, sleep }) => {
      redis.signal('SIGSTOP');
      sleep(daemons[1]);
    },
    lasts: 5_000,
    heal: async ({ redis, daemons, wake }) => {
      redis.signal('SIGCONT');
      await pause(2_000);
      wake(daemons[1]);
    },
    back: 'none',
  },
  ...[
    { name: 'b sleeps for 20 s, while more than 64 MiB are added', add: ({ large }) => large(100) },
    { name: 'b sleeps for 20 s, while more than 10,000 entries are added', add: ({ post, daemons }) => inTurns(11_000, () => post(daemons[0])), long: true },
  ].map(({ add, ...fault }) => ({
    ...fault,
    takes: 20_000,
    hurt: async (world) => {
      const { redis, daemons, sleep } = world;
      sleep(daemons[1]);
      const slept = pause(20_000);
      await add(world);
      const [length, bytes] = [/\d+/.exec(await redis.command('XLEN', 'socketio:0')), /\d+/.exec(await redis.command('MEMORY', 'USAGE', 'socketio:0', 'SAMPLES', '0'))];
      if (length > 10_200 || bytes > 80 << 20) throw new Error(`the stream has ${length} entries, ${bytes} bytes`);
      await slept;
    },
    heal: ({ daemons, wake }) => wake(daemons[1]),
    back: 'b',
    accepts: true,
  })),
  ...['SIGTERM', 'SIGKILL'].map((signal) => ({
    name: `${signal} of b, which is started anew`,
    hurt: async ({ daemons, leave }) => leave(daemons[1], signal),
    heal: ({ daemons }) => daemons[1].start(),
    accepts: signal === 'SIGTERM',
    unanswered: signal === 'SIGKILL',
  })),
  {
    name: 'SIGTERM of a while Redis hangs: each post under way has an answer',
    hurt: async ({ redis, daemons, leave }) => {
      redis.signal('SIGSTOP');
      await pause(1_000);
      await leave(daemons[0], 'SIGTERM');
    },
    heal: async ({ redis, daemons }) => {
      redis.signal('SIGCONT');
      await daemons[0].start();
    },
  },
];

// saved has Redis write its file, until it has got on with that as it should.
async function saved(redis, status) {
  await redis.command('BGSAVE');
  await until(`the save to be ${status}`, async () => {
    const info = await redis.command('INFO', 'persistence');
    return info.includes('rdb_bgsave_in_progress:0') && info.includes(`rdb_last_bgsave_status:${status}`);
  });
}

// inTurns calls f so often, eight at once.
function inTurns(times, f) {
  let left = times;
  return Promise.all(Array.from({ length: 8 }, async () => {
    while (left-- > 0) await f();
  }));
}

// World is the chat that one fault has for itself. What faults use of it is bound to it.
class World {
  redises = [];
  links = [];
  daemons = [];
  members = [];
  posts = [];
  publishing = new Set(); // the daemons that are posted to
  asleep = new Map(); // from a daemon to the moment of its SIGSTOP
  naps = []; // {daemon, from, to}
  away = new Set(); // the daemons that slept or ended in between
  ended = new Set(); // of them
  problems = [];

  constructor(fault) {
    this.fault = fault;
  }

  get redis() {
    return this.redises[0];
  }

  start = async (redis) => {
    this.redises.push(redis);
    await redis.start();
    return redis;
  };

  // open resolves once messages are accepted by both daemons.
  async open() {
    const redis = await this.start(new Redis(await freePort(), { lines: [user, ...this.fault.lines ?? []] }));
    for (const name of ['a', 'b']) {
      let { port } = redis;
      if (this.fault.linked) {
        const link = new Link();
        this.links.push(link);
        await link.listen(redis);
        port = link.port;
      }
      const daemon = new Daemon(name, { REDIS_URL: `redis://socketio:password@127.0.0.1:${port}/0`, SOCKET_PORT: `${await freePort()}` });
      this.daemons.push(daemon);
      await daemon.start();
    }
    await this.healthy(); // first: who joins a node that has not reached Redis yet may be sent back
    for (const daemon of this.daemons) {
      for (let i = 0; i < 5; i++) this.members.push(new Member(daemon, i === 4 ? 'polling' : 'websocket'));
    }
    await until('everybody to have joined', () => this.members.every((member) => member.joined));
    // Ten connections to Redis each, so that as many posts can be on their way when it fails.
    await Promise.all(this.daemons.flatMap((daemon) => Array.from({ length: 10 }, () => this.post(daemon))));
    this.timers = this.daemons.map((daemon) => {
      this.publishing.add(daemon);
      return setInterval(() => this.publishing.has(daemon) && this.post(daemon), this.fault.every ?? every);
    });
    await Promise.all(this.daemons.map((daemon) => this.soon(daemon, 20)));
  }

  healthy() {
    return until('both daemons to be healthy, and to know of each other', async () => {
      const each = await Promise.all(this.daemons.map((daemon) => daemon.health()));
      return each.every(({ code, nodes }) => code === 200 && nodes === 2);
    });
  }

  post = async (daemon) => {
    const post = { n: this.posts.length, daemon, sent: performance.now() };
    this.posts.push(post);
    const { status, error } = await daemon.broadcast({ channel: 'chat-session.r', event: 'm', data: post.n });
    Object.assign(post, { answered: performance.now(), status, error });
  };

  // large posts messages of 900 KB to a, which nobody hears: 72 are as much as a stream holds.
  large = (count) => inTurns(count, async () => {
    const { status } = await this.daemons[0].broadcast({ channel: 'nobody', event: 'large', data: 'x'.repeat(900 << 10) });
    if (status !== 200) throw new Error(`${status} for a message of 900 KB`);
  });

  quiet = (...daemons) => daemons.forEach((daemon) => this.publishing.delete(daemon));

  // soon resolves when so many posts to a daemon that are yet to come have been accepted.
  soon = (daemon, count) => {
    const from = this.posts.length;
    return until(`${count} messages to be accepted by ${daemon.name}`, () => this.posts.slice(from).filter((post) => post.daemon === daemon && post.status === 200).length >= count, 15_000);
  };

  sleep = (daemon) => {
    this.away.add(daemon);
    this.asleep.set(daemon, performance.now());
    daemon.signal('SIGSTOP');
  };

  wake = (daemon) => {
    daemon.signal('SIGCONT');
    this.naps.push({ daemon, from: this.asleep.get(daemon), to: performance.now() });
    this.asleep.delete(daemon);
  };

  // leave ends a daemon that is not posted to any more. By SIGTERM it answers what it has.
  leave = async (daemon, signal) => {
    this.away.add(daemon);
    this.ended.add(daemon);
    const posts = this.posts.filter((post) => post.daemon === daemon);
    this.quiet(daemon);
    await pause(100); // until the last of them has reached it
    const status = await daemon.end(signal);
    if (signal === 'SIGKILL') return;
    if (status !== 0) this.problems.push(`${daemon.name} ended with ${status}`);
    await until('the last answers to be read', () => posts.every((post) => post.answered), 1_000);
  };

  // refused resolves when both daemons say that Redis refuses, and in which words.
  refused(word) {
    const from = this.logged;
    return until(`/health and the log of both daemons to say ${word}`, async () => {
      for (const [i, daemon] of this.daemons.entries()) {
        const { code, status, reason } = await daemon.health();
        if (code !== 503 || status !== 'degraded' || !reason.includes(word) || !daemon.log.slice(from[i]).includes(word)) return false;
      }
      return true;
    }, 5_000);
  }

  note = (error) => void this.problems.push(error.message);

  // run has the fault happen, and everything settle after it.
  async run() {
    const { fault } = this;
    this.logged = this.daemons.map((daemon) => daemon.log.length);
    this.hurtAt = performance.now();
    await Promise.resolve(fault.hurt(this)).catch(this.note);
    const lasts = pause(fault.lasts ?? 0);
    if (fault.refused) {
      await this.refused(fault.refused).then(async () => {
        const known = performance.now();
        await until('20 more answers of each daemon', () => this.daemons.every((daemon) => this.posts.filter((post) => post.daemon === daemon && post.sent > known && post.answered).length >= 20));
        const others = this.posts.filter((post) => post.sent > known && post.answered && post.status !== 503);
        if (others.length > 0) this.problems.push(`${others.length} answers are not 503 while both are degraded`);
      }).catch(this.note);
    }
    await lasts;
    if (fault.degraded) {
      for (const daemon of this.daemons) {
        const { code } = await daemon.health();
        if (code !== 503) this.problems.push(`/health of ${daemon.name} is ${code}`);
      }
    }
    for (const link of this.links) link.heal();
    await fault.heal?.(this);
    const healed = performance.now();
    for (const daemon of this.daemons) this.publishing.add(daemon);
    const accepted = (daemon) => this.posts.find((post) => post.daemon === daemon && post.sent > healed && post.status === 200);
    await until('messages to be accepted again', () => this.daemons.every(accepted), 15_000).catch(this.note);
    this.recovery = Math.max(...this.daemons.map((daemon) => accepted(daemon)?.answered ?? NaN)) - healed;
    await this.healthy().catch(this.note);
    // Whether a node sends its clients back shows within a part of the spread, if it has several; how many, at its end.
    await pause(2_000);
    if (this.homesick().length > 0) await until('', () => this.homesick().length === 0, 2 * spread).catch(() => {}); // row says it
    else if (this.sentBack().length > 0) await pause(spread - 1_500);
    this.quiet(...this.daemons);
    await until('all answers', () => this.posts.every((post) => post.answered), 10_000);
    // What comes late comes before these.
    const markers = this.posts.length;
    await Promise.all(this.daemons.map(this.post));
    await until('all to have heard the last messages', () => this.members.every((member) => member.joined && this.posts.slice(markers).every((post) => member.has(post))), 10_000)
      .catch(this.note);
    // A node that has just sent its clients back waits before it does so again.
    if (this.missing() > 0) await until('', () => this.missing() === 0, interval + spread).catch(() => {});
  }

  // sentBack are the members that a node which lives has sent back.
  sentBack() {
    return this.members.filter((member) => !this.ended.has(member.daemon) && member.losses.some((loss) => loss.at > this.hurtAt && loss.reason === 'transport close'));
  }

  // homesick are those who have yet to be sent back.
  homesick() {
    const of = { all: this.daemons, b: [this.daemons[1]] }[this.fault.back] ?? [];
    const back = this.sentBack();
    return this.members.filter((member) => of.includes(member.daemon) && !back.includes(member));
  }

  // missing counts what was lost in silence, or has yet to be fetched.
  missing() {
    const accepted = this.posts.filter((post) => post.status === 200);
    return sum(this.members.map((member) => accepted.filter((post) => !member.has(post)).length));
  }

  // row is what the table says, and finds what is wrong with it.
  row() {
    const { fault, posts, members, problems } = this;
    const count = (...statuses) => posts.filter((post) => statuses.includes(post.status)).length;
    const took = posts.map((post) => {
      const nap = this.naps.find(({ daemon, from, to }) => daemon === post.daemon && post.sent < to && post.answered > from);
      return post.answered - (nap ? Math.max(nap.to, post.sent) : post.sent);
    });
    const back = this.sentBack();
    const row = new Map([ // in this order: an object would have the numbers first
      ['fault', fault.name],
      ['posts', posts.length],
      ['200', count(200)],
      ['503', count(503)],
      ['504', count(504)],
      ['no answer', posts.length - count(200, 503, 504)],
      ['lost in silence', this.missing()],
      ['doubled', sum(members.map((member) => member.heard.length - new Set(member.heard).size))],
      ['out of order', disorder(members, posts)],
      ['heard though 503', posts.filter((post) => post.status === 503 && members.some((member) => member.heard.includes(post.n))).length],
      ['sent back', back.length],
      ['slowest answer', seconds(Math.max(...took))],
      ['first 200 after', seconds(this.recovery)],
    ]);
    for (const column of ['lost in silence', 'doubled', 'out of order', 'heard though 503']) {
      if (row.get(column) !== 0) problems.push(`${column}: ${row.get(column)}`);
    }
    const wrong = (what, found) => found.length > 0 && problems.push([`${what}: ${found.length}`, ...new Set(found.map(({ error }) => error).filter(Boolean))].join(', '));
    if (!fault.unanswered) wrong('no answer', posts.filter((post) => ![200, 503, 504].includes(post.status)));
    if (fault.accepts) wrong('refused by a daemon that was there', posts.filter((post) => !this.away.has(post.daemon) && post.status !== 200));
    if (fault.refused && !fault.inFlight) wrong('504 though Redis refused', posts.filter((post) => post.status === 504));
    wrong(`answers that took more than ${seconds(slowest)}`, took.filter((ms) => ms > slowest + lag + loop.max / 1e6));
    const lines = this.daemons.map((daemon, i) => daemon.log.slice(this.logged[i]).split('\n').length - 1);
    if (Math.max(...lines) > (fault.grown ?? grown)) problems.push(`lines logged: ${lines.join(' and ')}`);
    if (fault.back === 'none') wrong('sent back though nothing was missing', back);
    wrong('not sent back', this.homesick());
    return row;
  }

  // logs are the first lines that each daemon has logged in the fault.
  logs() {
    return this.daemons.flatMap((daemon, i) => daemon.log.slice(this.logged?.[i] ?? 0).split('\n').slice(0, grown).map((line) => `  ${daemon.name}: ${line}`)).join('\n');
  }

  close() {
    this.timers?.forEach(clearInterval);
    for (const member of this.members) member.socket.close();
    for (const process of [...this.daemons, ...this.redises]) process.child?.kill('SIGKILL');
    for (const link of this.links) link.close();
  }
}

// Member joins again whenever it has connected, and has then fetched all that was posted before.
class Member {
  joined = false;
  fetched = 0; // the moment up to which it has fetched
  heard = [];
  losses = []; // {at, reason} of each disconnect

  constructor(daemon, transport) {
    this.daemon = daemon;
    this.socket = io(daemon.url, { transports: [transport], forceNew: true, reconnectionDelay: 100, reconnectionDelayMax: 500 });
    this.socket.on('connect', () => this.socket.emit('join-session', signed(this.socket.id, 'r'), () => {
      this.joined = true;
      this.fetched = performance.now();
    }));
    this.socket.on('disconnect', (reason) => {
      this.joined = false;
      this.losses.push({ at: performance.now(), reason });
    });
    this.socket.on('m', (n) => this.heard.push(n));
  }

  has(post) {
    return this.heard.includes(post.n) || post.sent < this.fetched;
  }
}

// disorder counts what two members heard in different orders, and what somebody heard before a message that had
// been answered before this one was posted.
function disorder(members, posts) {
  let found = 0;
  for (const [i, { heard }] of members.entries()) {
    let latest = 0;
    for (const n of heard) {
      if (posts[n].status === 200 && posts[n].answered < latest) found++;
      latest = Math.max(latest, posts[n].sent);
    }
    const place = new Map(heard.map((n, at) => [n, at]));
    for (const other of members.slice(i + 1)) {
      const places = other.heard.filter((n) => place.has(n)).map((n) => place.get(n));
      found += places.filter((at, j) => j > 0 && at < places[j - 1]).length;
    }
  }
  return found;
}

function sum(numbers) {
  return numbers.reduce((x, y) => x + y, 0);
}

function seconds(ms) {
  return `${(ms / 1_000).toFixed(2)} s`;
}

const long = process.argv.includes('-long');
const only = process.argv.find((word) => word.startsWith('-only='))?.slice('-only='.length);
const chosen = faults.filter(({ name, ...fault }) => only ? name.includes(only) : long || !fault.long);

const loop = monitorEventLoopDelay();
loop.enable();
const results = new Map();
const queue = chosen.toSorted((x, y) => (y.takes ?? y.lasts ?? 0) - (x.takes ?? x.lasts ?? 0)); // the longest first
await Promise.all(Array.from({ length: 6 }, async () => {
  for (let fault; fault = queue.shift();) {
    const world = new World(fault);
    let row = new Map([['fault', fault.name]]);
    try {
      await world.open();
      await world.run();
      row = world.row();
    } catch (error) {
      world.note(error);
    }
    world.close();
    results.set(fault, { row, problems: world.problems, logs: world.logs() });
    console.log(`${(performance.now() / 1_000).toFixed(0).padStart(4)} s  ${fault.name}: ${world.problems.length === 0 ? 'ok' : world.problems.join('; ')}`);
  }
}));

const table = chosen.map((fault) => results.get(fault).row);
const columns = [...table.toSorted((x, y) => y.size - x.size)[0]?.keys() ?? []];
console.log(`\n| ${columns.join(' | ')} |\n|${' --- |'.repeat(columns.length)}`);
for (const row of table) console.log(`| ${columns.map((column) => row.get(column) ?? '–').join(' | ')} |`);
console.log(`\nThis program itself was late by up to ${seconds(loop.max / 1e6)}.`);
const failed = chosen.filter((fault) => results.get(fault).problems.length > 0);
for (const fault of failed) {
  const { problems, logs } = results.get(fault);
  console.log(`\nnot ok: ${fault.name}: ${problems.join('; ')}\n${logs}`);
}
process.exit(failed.length === 0 && chosen.length > 0 ? 0 : 1);
