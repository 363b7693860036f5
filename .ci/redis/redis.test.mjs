// Three daemons as one chat: what a /broadcast to any of them means to the members of all, while Redis and
// daemons come and go. Started by ./run. (What else can fail, faults.mjs has.)
//
// A publisher is a process of Laravel's: it posts one message after the other to one daemon, and posts a
// message that was answered 503 again, and one that was answered 504 not. Per publisher there is an order;
// between publishers there is none.

import assert from 'node:assert/strict';
import { Agent } from 'node:http';
import { test } from 'node:test';
import { io } from 'socket.io-client';
import { sign, signed, sink } from './clients.mjs';
import { Daemon, Nginx, Redis, freePort, pause, secret, until } from './processes.mjs';

const members = 300;
const admins = 10; // of them: they hear every session
const rooms = 29; // ten guests in each
const publishers = 6; // two to each daemon
const spread = 5_000; // ms over which a node lets its clients go after it may have missed something

test('three daemons, one chat', async (t) => {
  const redis = new Redis(await freePort());
  const daemons = [];
  for (const name of ['a', 'b', 'c']) {
    daemons.push(new Daemon(name, {
      REDIS_URL: redis.url(2), SOCKET_PORT: String(await freePort()), PING_INTERVAL: '5s', PING_TIMEOUT: '5s',
    }));
  }
  const nginx = new Nginx(await freePort());
  const chat = new Chat(daemons);
  t.after(() => {
    chat.close();
    for (const process of [nginx, redis, ...daemons]) process.child?.kill('SIGKILL');
  });
  const figure = (text) => t.diagnostic(text);

  // Each step builds on the ones before it.
  let failed = false;
  const step = (name, run) => t.test(name, { skip: failed && 'a step before it failed', timeout: 150_000 }, async (t) => {
    failed = true;
    await run(t);
    failed = false;
  });

  const healthy = async (nodes = daemons.length) => {
    for (const daemon of daemons) {
      const health = await daemon.health();
      if (health.code !== 200 || health.nodes !== nodes) return false;
    }
    return true;
  };

  await step('a daemon that starts before Redis says so, and is there when Redis is', async () => {
    await Promise.all(daemons.map((daemon) => daemon.start()));
    for (const daemon of daemons) {
      const health = await daemon.health();
      assert.deepEqual([health.code, health.status, typeof health.reason], [503, 'degraded', 'string']);
      assertRefused(await daemon.broadcast({ channel: 'chat-session.r0', event: 'early' }));
    }
    const back = await redis.start();
    await until('all nodes to be healthy', healthy);
    figure(`start: healthy ${ms(back)} after Redis answered`);
    assert.ok(performance.now() - back < 2_000);
  });

  await step('nginx spreads 300 clients over them by address', async () => {
    await nginx.start(daemons);
    const began = performance.now();
    for (let i = 0; i < members; i++) chat.members.push(new Member(i, `http://127.0.0.1:${nginx.port}`));
    await chat.everybody();
    const each = [];
    for (const daemon of daemons) {
      each.push((await daemon.health()).connections);
      assert.ok(each.at(-1) > members / 10, `daemon ${daemon.name} has ${each.at(-1)} of ${members}`);
    }
    assert.equal(sum(each), members);
    figure(`${members} clients joined in ${ms(began)}: ${each.join(' + ')}`);
  });

  await step('1,000 messages reach each member once, in the order per publisher', async () => {
    const began = performance.now();
    const phase = chat.begin();
    await chat.publish(1_000);
    const heard = await chat.check(phase);
    figure(`1,000 messages, ${heard} deliveries: ${ms(began)}`);
    assert.equal(chat.losses(phase), 0);
  });

  await step('toOthers leaves out a socket of another node', async () => {
    const sender = chat.members[0];
    for (const daemon of daemons) {
      const phase = chat.begin();
      const answer = await daemon.broadcast({ channel: `chat-session.${sender.room}`, event: 'others', data: {}, socket: sender.socket.id });
      assert.equal(answer.status, 200);
      assert.equal(answer.nodes, daemons.length);
      await chat.check(phase); // whose markers come after it
    }
    for (const member of chat.members) {
      const want = member !== sender && (member.admin || member.room === sender.room) ? daemons.length : 0;
      assert.equal(member.others, want, member.name);
    }
  });

  await step('whispers cross nodes, in one order, and not back', async (t) => {
    const channel = 'private-whispers';
    const sockets = daemons.map((daemon) => io(daemon.url, { transports: ['websocket'], forceNew: true }));
    t.after(() => sockets.forEach((socket) => socket.close()));
    const heard = sockets.map(() => []);
    await Promise.all(sockets.map(async (socket, i) => {
      socket.on('broadcast', ({ event, data }) => {
        assert.equal(event, 'client-typing');
        heard[i].push(data);
      });
      await new Promise((resolve) => socket.once('connect', resolve));
      await socket.emitWithAck('join', { channel, auth: sign(`${socket.id}:${channel}`) });
    }));
    const [first, second] = sockets;
    const whispers = 20; // of each: what one client may send at once
    for (let n = 0; n < whispers; n++) {
      first.emit('whisper', { channel, event: 'typing', data: `a${n}` });
      second.emit('whisper', { channel, event: 'typing', data: `b${n}` });
    }
    await until('the third to hear both', () => heard[2].length === 2 * whispers);
    for (const [i, own] of ['a', 'b'].entries()) {
      const others = heard[2].filter((text) => !text.startsWith(own));
      await until('each to hear the other', () => heard[i].length >= whispers);
      assert.deepEqual(heard[i], others);
      assert.deepEqual(heard[2].filter((text) => text.startsWith(own)), Array.from({ length: whispers }, (_, n) => `${own}${n}`));
    }
  });

  await step('reconnect ends the connections of a session on all nodes', async () => {
    const phase = chat.begin();
    const inside = chat.members.filter((member) => member.room === 'r1');
    const answer = await daemons[0].broadcast({ channel: 'chat-session.r1', reconnect: true });
    assert.equal(answer.status, 200, JSON.stringify(answer));
    await until('them to come back', () => inside.every((member) => member.lost(phase) === 1 && member.joined));
    for (const member of inside) assert.equal(member.losses.at(-1).reason, 'transport close', member.name);
    assert.equal(chat.losses(phase), inside.length, 'nobody else has gone'); // the admins, who hear each session, neither
    await exactly(chat);
  });

  await step('another database of the same Redis is another chat', async (t) => {
    const stranger = new Daemon('stranger', { REDIS_URL: redis.url(3) });
    t.after(() => stranger.end('SIGKILL'));
    await stranger.start();
    await until('the stranger to be healthy', async () => (await stranger.health()).code === 200);
    const phase = chat.begin();
    const answer = await stranger.broadcast({ channel: 'chat-session.r0', event: 'stray', data: {} });
    assert.deepEqual([answer.status, answer.delivered, answer.nodes], [200, 0, 1]);
    assert.equal((await daemons[0].health()).nodes, daemons.length);
    await chat.check(phase);
    assert.equal(sum(chat.members.map((member) => member.strays)), 0);
  });

  await step('rediss:// with a certificate that is trusted', async (t) => {
    const encrypted = new Redis(await freePort(), { tls: true });
    t.after(() => encrypted.end('SIGKILL'));
    await encrypted.start();
    const trusting = new Daemon('trusting', { REDIS_URL: encrypted.url(0), SSL_CERT_FILE: encrypted.certificate });
    const wary = new Daemon('wary', { REDIS_URL: encrypted.url(0) });
    for (const daemon of [trusting, wary]) {
      t.after(() => daemon.end('SIGKILL'));
      await daemon.start();
    }
    await until('it to be healthy', async () => (await trusting.health()).code === 200);
    const answer = await trusting.broadcast({ channel: 'admin-chat', event: 'encrypted' });
    assert.deepEqual([answer.status, answer.nodes], [200, 1]);
    assert.equal((await wary.health()).status, 'degraded');
    assertRefused(await wary.broadcast({ channel: 'admin-chat', event: 'encrypted' }));
  });

  await step('what Redis adds', async (t) => {
    const single = new Daemon('single');
    t.after(() => single.end('SIGKILL'));
    await single.start();
    await latency(single, daemons, figure);
    await cost(single, daemons, figure);
  });

  await step('kill -9 of Redis: 503, nothing lost silently, nothing twice', async () => {
    const phase = chat.begin();
    const pump = chat.pump();
    const logged = daemons.map((daemon) => daemon.log.length);
    await until('some messages', () => pump.accepted > 60);
    await redis.end('SIGKILL');
    await until('each daemon to refuse', () => pump.refusedBy.size === daemons.length, 4_000); // what was on its way is answered 504 first
    for (const daemon of daemons) {
      const health = await daemon.health();
      assert.deepEqual([health.code, health.status], [503, 'degraded']);
      assert.ok(!health.reason.includes(redis.password) && !health.reason.includes(encodeURIComponent(redis.password)), health.reason);
    }
    await until('many refusals', () => pump.refused > 60);
    assert.equal(chat.losses(phase), 0, 'clients stay connected');

    const back = await redis.start();
    await until('all nodes to be healthy', healthy);
    figure(`kill -9: healthy ${ms(back)} after Redis answered`);
    assert.ok(performance.now() - back < 2_000);
    await pump.stop();
    assert.ok(pump.slowest < 3_000, `an answer took ${pump.slowest} ms`);
    figure(`kill -9: ${pump.accepted} accepted, ${pump.refused} refused, slowest answer ${pump.slowest.toFixed(0)} ms`);

    daemons.forEach((daemon, i) => {
      const news = daemon.log.slice(logged[i]);
      const lines = (text) => news.split(text).length - 1;
      assert.equal(lines('redis reached'), 1, news);
      assert.ok([1, 2, 3].includes(lines('redis takes no broadcasts')), news); // again where the words change: EOF, connection refused
    });

    // Each node may have missed something, so each client is made to come back and fetch.
    await until('everybody to be sent back', () => chat.members.every((member) => member.losses.some((loss) => loss.at > back)), spread + 2_000);
    const at = chat.members.map((member) => member.losses.find((loss) => loss.at > back).at - back).sort((x, y) => x - y);
    figure(`kill -9: ${chat.losses(phase)} clients sent back ${at[0].toFixed(0)} to ${at.at(-1).toFixed(0)} ms after, median ${median(at).toFixed(0)}`);
    for (const member of chat.members) assert.equal(member.losses.at(-1).reason, 'transport close', member.name);
    assert.ok(at[members * 3 / 4] - at[members / 4] > spread / 4, 'all at once');
    await chat.everybody();
    await chat.check(phase);
    await exactly(chat);
  });

  for (const [i, signal] of ['SIGKILL', 'SIGTERM'].entries()) {
    await step(`one daemon ends by ${signal}: its clients come back on the others`, async () => {
      const gone = daemons[i], others = daemons.filter((daemon) => daemon !== gone);
      await until('the sessions that polls have left behind to be gone', async () => {
        const each = await Promise.all(daemons.map((daemon) => daemon.health()));
        return sum(each.map((health) => health.connections)) === members;
      }, 15_000);
      const { connections } = await gone.health();
      const phase = chat.begin();
      const began = performance.now();
      assert.equal(await gone.end(signal), signal === 'SIGTERM' ? 0 : signal);
      await until('its clients to notice', () => chat.losses(phase) >= connections);
      await chat.everybody();
      figure(`${signal}: its ${connections} clients are back ${ms(began)} after`);
      assert.equal(chat.losses(phase), connections, 'nobody else has gone');
      assert.equal(sum(await Promise.all(others.map(async (daemon) => (await daemon.health()).connections))), members);
      for (const daemon of others) await until('one node less', async () => (await daemon.health()).nodes === others.length);
      chat.daemons = others;
      await exactly(chat);

      // Once it is there again, nginx, which hashes each request anew, sends it the polls of those clients. It
      // does not know their sessions, so they connect again: as soon as the poll that waits has been answered.
      const polling = chat.members.filter((member) => member.polls && member.lost(phase));
      const back = chat.begin();
      await gone.start();
      chat.daemons = daemons;
      await until('it to be healthy', healthy);
      await until('its polling clients to come home', async () => {
        await chat.post(0, 'all');
        return polling.every((member) => member.lost(back) && member.joined);
      });
      assert.equal(chat.losses(back), polling.length, 'nobody else has gone');
      await exactly(chat);
    });
  }

  await step('nothing came twice or late in all that time, and the logs are short', async () => {
    chat.audit();
    for (const daemon of daemons) {
      assert.equal(await daemon.end('SIGTERM'), 0);
      const lines = daemon.log.trim().split('\n');
      figure(`daemon ${daemon.name}: ${lines.length} lines logged`);
      for (const part of [redis.password, encodeURIComponent(redis.password), secret]) {
        assert.ok(!daemon.log.includes(part), 'a secret is logged');
      }
    }
  });
});

// exactly posts to every daemon and wants everything to arrive.
async function exactly(chat) {
  const phase = chat.begin();
  await chat.publish(60);
  await chat.check(phase);
  assert.equal(chat.losses(phase), 0);
}

// latency compares, message by message, the way from the post to the last of ten members: on one daemon, and
// from one daemon over Redis to another.
async function latency(single, [from, to], figure) {
  const watch = async (daemon) => {
    const sockets = [];
    for (let i = 0; i < 10; i++) sockets.push(new Member(members, daemon.url, ['websocket']));
    await until('ten members', () => sockets.every((member) => member.joined));
    return {
      measure: async (via) => {
        const began = performance.now();
        const arrived = Promise.all(sockets.map((member) => new Promise((resolve) => member.socket.once('timed', resolve))));
        assert.equal((await via.broadcast({ channel: `chat-session.${sockets[0].room}`, event: 'timed', data: {} })).status, 200);
        await arrived;
        return performance.now() - began;
      },
      close: () => sockets.forEach((member) => member.socket.close()),
    };
  };
  const [here, there] = [await watch(single), await watch(to)];
  const alone = [], joined = [];
  for (let i = 0; i < 100; i++) {
    alone.push(await here.measure(single));
    joined.push(await there.measure(from));
  }
  here.close();
  there.close();
  const added = median(joined) - median(alone);
  figure(`latency p50: ${median(alone).toFixed(2)} ms on one daemon, ${median(joined).toFixed(2)} ms over Redis: ${added.toFixed(2)} ms more`);
}

// cost compares the CPU time of a delivery: of the daemon that was posted to alone, and of one that hears it
// from Redis. Members here are raw WebSockets that count bytes, so that the client leaves the processor alone.
async function cost(single, [from, to], figure) {
  const watch = (daemon) => Promise.all(Array.from({ length: 200 }, () => sink(daemon, 'cost')));
  const alone = await watch(single), joined = await watch(to);
  const measure = async (daemon, via, sinks) => {
    const request = { channel: 'chat-session.cost', event: 'counted', data: { text: 'x'.repeat(200) } };
    const messages = 200, end = sinks.map((sink) => sink.events + messages);
    const began = daemon.cpu();
    await Promise.all([0, 1, 2, 3].map(async () => {
      for (let i = 0; i < messages / 4; i++) assert.equal((await via.broadcast(request)).status, 200);
    }));
    await until('all deliveries', () => {
      assert.ok(sinks.every((sink) => !sink.socket.closed), 'a member was cut off');
      return sinks.every((sink, i) => sink.events === end[i]);
    });
    return (daemon.cpu() - began) / messages / sinks.length * 1e6;
  };
  // The least of several rounds, in turns: what else runs on the machine can only add.
  let here = Infinity, there = Infinity;
  for (let round = 0; round < 2; round++) {
    here = Math.min(here, await measure(single, single, alone));
    there = Math.min(there, await measure(to, from, joined));
  }
  for (const { socket } of [...alone, ...joined]) socket.destroy();
  figure(`CPU per delivery: ${here.toFixed(2)} µs on one daemon, ${there.toFixed(2)} µs on a node that hears it from Redis: ${(there / here).toFixed(2)} ×`);
}

// Chat is the members and what was posted to them.
class Chat {
  members = [];
  posted = Array.from({ length: publishers }, () => []); // per publisher: the room of each message, in order
  unknown = this.posted.map(() => new Set()); // of them: what was answered 504
  refused = new Set(); // probes that were answered 503, and not posted again

  constructor(daemons) {
    this.daemons = daemons;
  }

  // begin marks a moment, from which check and losses count.
  begin() {
    return { at: performance.now(), from: this.posted.map((posted) => posted.length) };
  }

  // post has a publisher post its next message until it is accepted.
  async post(publisher, room, onRefusal) {
    const n = this.posted[publisher].push(room) - 1;
    const request = {
      event: 'message.sent',
      data: { publisher, n, room },
      ...(room === 'all' ? { channels: Array.from({ length: rooms }, (_, i) => `chat-session.r${i}`) } : { channel: `chat-session.${room}` }),
    };
    for (;;) {
      const daemon = this.daemons[publisher % this.daemons.length];
      const answer = await daemon.broadcast(request);
      if (answer.status === 200) return answer;
      assert.ok(onRefusal, JSON.stringify(answer));
      if (answer.status === 504) {
        this.unknown[publisher].add(n);
        return answer;
      }
      assertRefused(answer);
      await onRefusal(daemon, answer);
    }
  }

  // publish posts to the daemons in turn, each publisher one message after the other.
  async publish(count) {
    await Promise.all(this.posted.map(async (_, publisher) => {
      for (let i = publisher; i < count; i += publishers) await this.post(publisher, `r${(i * 7) % rooms}`);
    }));
  }

  // pump publishes until it is stopped, and retries what is refused. Between two tries it posts a probe:
  // one that it does not post again, so that nobody may get it if it was refused.
  pump() {
    const pump = { accepted: 0, refused: 0, refusedBy: new Set(), slowest: 0 };
    let stopped = false;
    const note = (answer) => { pump.slowest = Math.max(pump.slowest, answer.ms); };
    const onRefusal = async (daemon, answer) => {
      note(answer);
      pump.refused++;
      pump.refusedBy.add(daemon);
      const probe = `${pump.refused}-${performance.now()}`;
      const tried = await daemon.broadcast({ channel: 'admin-chat', event: 'probe', data: probe });
      note(tried);
      if (tried.status !== 200 && tried.status !== 504) {
        assertRefused(tried);
        this.refused.add(probe);
      }
      await pause(20);
    };
    const running = Promise.all(this.posted.map(async (_, publisher) => {
      for (let i = publisher; !stopped; i += publishers) {
        note(await this.post(publisher, `r${(i * 7) % rooms}`, onRefusal));
        pump.accepted++;
        await pause(5);
      }
    }));
    running.catch(() => {}); // stop rethrows
    pump.stop = () => {
      stopped = true;
      return running;
    };
    return pump;
  }

  // check waits for a last message of each publisher, then compares what each member has got since the phase
  // began with what was posted for it: everything once and in order. A member that was sent back meanwhile may
  // lack some, for its page fetches what it missed. Nothing may be missing silently, so nobody else may, but for
  // what was answered 504.
  // It returns the number of deliveries.
  async check(phase) {
    let last, missing;
    do {
      await this.everybody();
      const marked = this.begin();
      await Promise.all(this.posted.map((_, publisher) => this.post(publisher, 'all')));
      last = this.posted.map((posted) => posted.length - 1);
      missing = () => this.members.filter((member) => !last.every((n, p) => member.got[p].at(-1) >= n));
      await until('the last messages to arrive', () => missing().every((member) => member.lost(marked)), 15_000).catch((error) => {
        throw new Error(`they did not for ${missing().length} members, among them ${missing()[0]?.name}`, { cause: error });
      });
    } while (missing().length > 0); // sent back just then: once more
    let deliveries = 0;
    for (const member of this.members) {
      const back = member.lost(phase);
      for (let p = 0; p < publishers; p++) {
        const got = member.got[p].filter((n) => n >= phase.from[p]);
        deliveries += got.length;
        const want = [];
        for (let n = phase.from[p]; n <= last[p]; n++) {
          const optional = back || this.unknown[p].has(n);
          if (member.hears(this.posted[p][n]) && (!optional || got.includes(n))) want.push(n);
        }
        assert.deepEqual(got, want, `${member.name}, publisher ${p}`);
      }
    }
    return deliveries;
  }

  // audit looks at all that ever arrived.
  audit() {
    for (const member of this.members) {
      member.got.forEach((got, p) => assertAscending(got, `${member.name}, publisher ${p}`));
      assert.equal(new Set(member.probes).size, member.probes.length, `${member.name} got a probe twice`);
      assert.deepEqual(member.probes.filter((probe) => this.refused.has(probe)), [], `${member.name} got what was refused`);
    }
  }

  losses(phase) {
    return sum(this.members.map((member) => member.lost(phase)));
  }

  everybody() {
    return until('everybody to have joined', () => this.members.every((member) => member.joined), 20_000);
  }

  close() {
    for (const member of this.members) {
      member.socket.close();
      member.agent.destroy();
    }
  }
}

// Member is a browser with an address of its own, that joins again whenever it has connected.
class Member {
  joined = false;
  losses = []; // {at, reason} of each disconnect
  got = Array.from({ length: publishers }, () => []); // per publisher: the numbers of its messages
  probes = [];
  others = 0;
  strays = 0;

  constructor(i, url, transports = [['websocket'], ['polling'], ['polling', 'websocket']][i % 3]) {
    this.admin = i < admins;
    this.room = `r${(i - admins) % rooms}`;
    if (this.admin) this.room = 'r0'; // and in the admins' room
    if (i >= members) this.room = 'timed';
    this.polls = transports.at(-1) === 'polling';
    this.name = `member ${i} by ${transports.join(' → ')}`;
    const address = `127.0.${1 + (i >> 8)}.${i & 255}`;
    this.agent = new Agent({ localAddress: address, keepAlive: true });
    this.socket = io(url, { transports, forceNew: true, reconnectionDelay: 100, reconnectionDelayMax: 500, agent: this.agent });
    this.socket.on('connect', () => {
      const { id } = this.socket;
      let left = this.admin ? 2 : 1;
      const done = (answer) => {
        assert.equal(answer.error, undefined);
        if (id === this.socket.id && --left === 0) this.joined = true;
      };
      this.socket.emit('join-session', signed(id, this.room), done);
      if (this.admin) this.socket.emit('join-admin', { auth: sign(`${id}:admin-chat`) }, done);
    });
    this.socket.on('disconnect', (reason) => {
      this.joined = false;
      this.losses.push({ at: performance.now(), reason });
      assert.notEqual(reason, 'io server disconnect');
    });
    this.socket.on('message.sent', ({ publisher, n }) => this.got[publisher].push(n));
    this.socket.on('probe', (probe) => this.probes.push(probe));
    this.socket.on('others', () => this.others++);
    this.socket.on('stray', () => this.strays++);
  }

  // lost is how often it has been disconnected since the phase began.
  lost(phase) {
    return this.losses.filter((loss) => loss.at > phase.at).length;
  }

  hears(room) {
    return this.admin || room === 'all' || room === this.room;
  }
}

function assertRefused(answer) {
  assert.deepEqual([answer.status, answer.success, typeof answer.error, answer.retryAfter], [503, false, 'string', '1'], JSON.stringify(answer));
}

function assertAscending(numbers, of) {
  for (let i = 1; i < numbers.length; i++) assert.ok(numbers[i - 1] < numbers[i], `${of}: ${numbers[i - 1]}, then ${numbers[i]}`);
}

function median(numbers) {
  return numbers.toSorted((x, y) => x - y)[numbers.length >> 1];
}

function sum(numbers) {
  return numbers.reduce((x, y) => x + y, 0);
}

function ms(since) {
  return `${(performance.now() - since).toFixed(0)} ms`;
}
