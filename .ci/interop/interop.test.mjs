// Drives the daemon with the official client as browsers run it: the newest 4.x and the last 3.x, by each
// transport, in open and in secured mode.
//
//	npm install && SOCKETIO=/path/to/the/binary node --test
//
// Nothing here sleeps: each step waits for an event, and fails when it has not come within the deadline.

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createHmac } from 'node:crypto';
import { createServer } from 'node:net';
import { createInterface } from 'node:readline';
import { test } from 'node:test';
import { io as io3 } from 'socket.io-client-3';
import { io as io4 } from 'socket.io-client-4';

const binary = process.env.SOCKETIO;
assert.ok(binary, 'SOCKETIO has to be the absolute path of the daemon');

const deadline = 10_000; // ms: a thousand times what anything here takes, for machines that stall
const origin = 'http://localhost:5173'; // Vite's, which CORS_ORIGINS has by default; browsers send it
const secret = 'interop-secret-of-node-0123456789';

const variants = [];
for (const [version, io] of [['4.8', io4], ['3.1', io3]]) {
  for (const transports of [['websocket'], ['polling'], ['polling', 'websocket']]) {
    variants.push({ io, transports, name: `socket.io-client ${version} by ${transports.join(' → ')}` });
  }
}

for (const mode of ['open mode', 'secured mode']) {
  test(mode, async (t) => {
    const daemon = new Daemon({ SOCKETIO_SECRET: mode === 'secured mode' ? secret : '' });
    t.after(() => daemon.kill());
    await daemon.start(0);
    for (const variant of variants) {
      await t.test(variant.name, async (t) => {
        for (const [name, check] of Object.entries(mode === 'secured mode' ? { ...checks, ...securedChecks } : checks)) {
          await t.test(name, async (t) => {
            const connect = (options) => {
              const client = new Client(daemon, variant, options);
              t.after(() => client.socket.close());
              return client;
            };
            await check({ daemon, variant, connect });
          });
          await daemon.empty(); // whoever closes is gone at once, by every transport
        }
      });
    }
    assert.equal((await daemon.stop()).code, 0);
  });

  test(`${mode}: every client comes back by itself after a restart`, async (t) => {
    const daemon = new Daemon({ SOCKETIO_SECRET: mode === 'secured mode' ? secret : '' });
    t.after(() => daemon.kill());
    await daemon.start(await quietPort());
    const clients = variants.map((variant) => {
      const client = new Client(daemon, variant, { reconnectionDelay: 50, reconnectionDelayMax: 200 });
      t.after(() => client.socket.close());
      client.socket.on('connect', () => client.socket.emit('join-session', client.signed('restart')));
      return client;
    });
    const joined = async (client) => {
      await client.next('connect');
      await client.next('joined-session');
      await client.upgraded();
    };
    await Promise.all(clients.map(joined));
    for (let round = 1; round <= 2; round++) {
      const { code, ms } = await daemon.stop();
      assert.equal(code, 0, 'exit status');
      assert.ok(ms < 2000, `took ${ms} ms to stop`);
      for (const client of clients) {
        assert.equal((await client.next('disconnect')).data, 'transport close', client.name);
      }
      await daemon.start(daemon.port);
      await Promise.all(clients.map(joined));
      const answer = await daemon.broadcast({ channel: 'chat-session.restart', event: 'message.sent', data: { round } });
      assert.equal(answer.body.delivered, clients.length);
      for (const client of clients) {
        assert.deepEqual((await client.next('message.sent')).data, { round }, client.name);
      }
    }
  });
}

test('a front end of the Node server that this daemon replaces', async (t) => {
  const daemon = new Daemon({});
  t.after(() => daemon.kill());
  await daemon.start(0);
  for (const [version, clientIO] of [['4.8', io4], ['3.1', io3]]) {
    await t.test(`socket.io-client ${version}`, async (t) => {
      // As in the browser, but for the port and for the Origin header, which Node does not add.
      const io = (url, options) => clientIO(url.replace('3001', daemon.port), { ...options, extraHeaders: { Origin: origin } });
      const happened = new Queue();

      const socket = io('http://localhost:3001', { transports: ['websocket', 'polling'] });
      socket.on('connect', () => {
        socket.emit('join-session', { sessionId: 'test-session-123', userType: 'guest' });
        socket.emit('ping');
      });
      socket.on('joined-session', (data) => happened.put(['joined-session', data]));
      socket.on('pong', (data) => happened.put(['pong', data]));
      socket.on('message.sent', (data) => happened.put(['message.sent', data]));

      t.after(() => socket.close());
      assert.deepEqual(await happened.take(), ['joined-session', { sessionId: 'test-session-123', roomName: 'session-test-session-123' }]);
      const [event, { timestamp }] = await happened.take();
      assert.equal(event, 'pong');
      assert.match(timestamp, rfc3339);
      // The old back end sends neither a token nor toOthers, and looks at the status alone.
      const response = await fetch(`${daemon.url}/broadcast`, {
        method: 'POST',
        headers: { 'Content-Type': 'application/json' },
        body: JSON.stringify({ channel: 'chat-session.test-session-123', event: 'message.sent', data: { message: 'Hello' } }),
      });
      assert.equal(response.status, 200);
      assert.deepEqual(await happened.take(), ['message.sent', { message: 'Hello' }]);
    });
    await daemon.empty();
  }
});

const rfc3339 = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/; // with milliseconds, in UTC

// What holds in both modes. Each check has connections of its own, on an otherwise empty daemon.
const checks = {
  async 'connects by the transport it wants'({ connect, variant }) {
    const client = connect();
    await client.ready();
    assert.equal(client.socket.io.engine.transport.name, variant.transports.at(-1));
    assert.equal(client.socket.connected, true);
  },

  async 'is refused from another origin'({ connect }) {
    const { socket } = connect({ extraHeaders: { Origin: 'https://evil.example' }, reconnection: false });
    await within('connect_error', new Promise((resolve, reject) => {
      socket.on('connect_error', resolve);
      socket.on('connect', () => reject(new Error('it connected')));
    }));
  },

  async 'joins a session, told by event and by acknowledgement'({ connect, daemon }) {
    const client = connect();
    await client.ready();
    for (const sessionId of ['abc-DEF_1=@,.;', 5]) {
      const want = { sessionId, roomName: `session-${sessionId}` };
      assert.deepEqual(await client.ask('join-session', { ...client.signed(sessionId), userType: 'customer' }), [want]);
      assert.deepEqual((await client.next('joined-session')).data, want);
    }
    assert.equal((await daemon.health()).sessions, 2);
    // 5 and "5" are one session.
    await client.join('5');
    assert.equal((await daemon.health()).sessions, 2);
  },

  async 'receives a broadcast byte for byte'({ connect, daemon }) {
    const client = connect();
    await client.ready();
    await client.join('bytes');
    for (const data of [
      '{"id":9007199254740993,"price":1.10,"e":1E+2,"z":1,"a":{"y":[],"b":{}},"html":"<b>&amp;</b>"}',
      '{"line":"a\u2028b","emoji":"👩‍👩‍👧","escaped":"\\u00e9\\/"}',
      '"a lone string"', '[1, 2,\t3]', 'null', 'false', '-0.0', '{}', `"${'x'.repeat(70_000)}"`,
    ]) {
      const answer = await daemon.broadcast(`{"channel":"chat-session.bytes","event":"message.sent","data":${data}}`);
      assert.deepEqual(answer, { status: 200, body: { success: true, message: 'Message broadcasted', delivered: 1 } });
      const got = await client.next('message.sent');
      assert.equal(got.frame, `2["message.sent",${data}]`);
      assert.deepEqual(got.data, JSON.parse(data));
    }
    await daemon.broadcast({ channel: 'private-chat-session.bytes', event: 'App\\Events\\Ünïcode "x"' });
    assert.deepEqual((await client.next('App\\Events\\Ünïcode "x"')).data, {});
  },

  // Not waiting for the upgrade: it happens meanwhile, and has to lose and reorder nothing.
  async 'receives a hundred at once in order, whatever transport carries them'({ connect, daemon }) {
    const client = connect();
    await client.next('connect');
    await client.join('burst');
    for (let n = 0; n < 100; n++) {
      const answer = await daemon.broadcast({ channel: 'chat-session.burst', event: 'message.sent', data: n });
      assert.equal(answer.body.delivered, 1);
    }
    for (let n = 0; n < 100; n++) assert.equal((await client.next('message.sent')).data, n);
    await client.upgraded();
  },

  async 'hears nothing of a session it has left'({ connect, daemon }) {
    const client = connect();
    await client.ready();
    await client.join('left');
    await client.join('marker');
    const want = { sessionId: 'left', roomName: 'session-left' };
    assert.deepEqual(await client.ask('leave-session', { sessionId: 'left' }), [want]);
    assert.deepEqual((await client.next('left-session')).data, want);
    assert.equal((await daemon.broadcast({ channel: 'chat-session.left', event: 'message.sent' })).body.delivered, 0);
    assert.equal((await daemon.broadcast({ channel: 'chat-session.marker', event: 'marker' })).body.delivered, 1);
    await client.next('marker'); // the next event, hence nothing came before it
  },

  async 'is answered a ping'({ connect }) {
    const client = connect();
    await client.ready();
    client.socket.emit('ping');
    assert.match((await client.next('pong')).data.timestamp, rfc3339);
    const [{ timestamp }] = await client.ask('ping', { whatever: [1, 2] });
    assert.match(timestamp, rfc3339);
    assert.ok(Math.abs(Date.parse(timestamp) - Date.now()) < deadline, timestamp);
    assert.equal((await client.next('pong')).data.timestamp, timestamp);
  },

  async 'is refused a bad join, and stays connected'({ connect, daemon }) {
    const client = connect();
    await client.ready();
    for (const args of [
      [], [null], ['5'], [{}], [{ sessionId: null }], [{ sessionId: 1.5 }], [{ sessionId: {} }], [{ sessionId: '' }],
      [client.signed('a:b')], [client.signed('x'.repeat(129))],
    ]) {
      await client.refused('join-session', ...args);
    }
    await client.refused('leave-session', 'no object');
    await client.refused('join-admin', 'no object');
    const health = await daemon.health();
    assert.deepEqual([health.connections, health.sessions, health.admins], [1, 0, 0]);
    await client.join('after');
  },

  async 'is told of every session in the admin room, once'({ connect, daemon }) {
    const admin = connect();
    await admin.ready();
    assert.deepEqual(await admin.ask('join-admin', admin.signedAdmin()), [{ room: 'admin-room' }]);
    assert.deepEqual((await admin.next('joined-admin')).data, { room: 'admin-room' });
    await admin.join('both');
    const guest = connect();
    await guest.ready();
    await guest.join('both');
    for (const [request, delivered] of [
      [{ channel: 'chat-session.both' }, 2],
      [{ channel: 'chat-session.nobody' }, 1],
      [{ channel: 'private-admin-chat' }, 1],
      [{ channels: ['chat-session.both', 'presence-chat-session.nobody', 'admin-chat'] }, 2],
    ]) {
      const answer = await daemon.broadcast({ ...request, event: 'message.sent', data: request });
      assert.equal(answer.body.delivered, delivered, JSON.stringify(request));
      assert.deepEqual((await admin.next('message.sent')).data, request);
      if (delivered === 2) assert.deepEqual((await guest.next('message.sent')).data, request);
    }
    await daemon.broadcast({ channel: 'chat-session.both', event: 'marker' });
    await admin.next('marker');
    await guest.next('marker');
  },

  async 'hears nothing of the sessions once it has left the admin room'({ connect, daemon }) {
    const admin = connect();
    await admin.ready();
    await admin.ask('join-admin', admin.signedAdmin());
    await admin.next('joined-admin');
    assert.deepEqual(await admin.ask('leave-admin'), [{ room: 'admin-room' }]);
    assert.deepEqual((await admin.next('left-admin')).data, { room: 'admin-room' });
    assert.equal((await daemon.broadcast({ channel: 'chat-session.5', event: 'message.sent' })).body.delivered, 0);
    assert.equal((await daemon.health()).admins, 0);
    await admin.join('marker'); // the next event, hence nothing came before it
  },

  async "does not get what it has sent, by Laravel's toOthers"({ connect, daemon }) {
    const [sender, other] = [connect(), connect()];
    for (const client of [sender, other]) {
      await client.ready();
      await client.join('others');
    }
    const answer = await daemon.broadcast({ channel: 'chat-session.others', event: 'message.sent', data: 1, socket: sender.socket.id });
    assert.equal(answer.body.delivered, 1);
    await daemon.broadcast({ channel: 'chat-session.others', event: 'marker', socket: 'nobody-has-this-id' });
    await sender.next('marker');
    await other.next('message.sent');
    await other.next('marker');
  },

  async 'leaves with disconnect(), and may come back'({ connect, daemon }) {
    const client = connect();
    await client.ready();
    await client.join('again');
    client.socket.disconnect();
    assert.equal((await client.next('disconnect')).data, 'io client disconnect');
    await daemon.empty();
    client.socket.connect();
    await client.next('connect');
    assert.equal((await daemon.health()).sessions, 0);
    await client.join('again');
  },
};

// Signatures: without the right one, nothing is joined and nothing heard.
const securedChecks = {
  async 'is refused a join without a signature of its own'({ connect, daemon }) {
    const [client, other] = [connect(), connect()];
    await client.ready();
    await other.ready();
    const own = client.signed('private').auth;
    for (const auth of [
      undefined, null, '', 1, {}, own.toUpperCase(), own.slice(0, -1), own + '0',
      other.signed('private').auth, // of another socket
      client.signed('public').auth, // of another channel
      client.signedAdmin().auth,
      sign(`${client.socket.io.engine.id}:chat-session.private`), // of the Engine.IO id, which is not a secret of this connection
      createHmac('sha256', 'another-secret-0123456789').update(`${client.socket.id}:chat-session.private`).digest('hex'),
    ]) {
      await client.refused('join-session', { sessionId: 'private', auth });
    }
    await client.refused('join-admin');
    await client.refused('join-admin', { auth: own });
    await client.refused('join-admin', other.signedAdmin());
    assert.equal((await daemon.broadcast({ channel: 'chat-session.private', event: 'message.sent' })).body.delivered, 0);
    await client.join('private');
    await daemon.broadcast({ channel: 'chat-session.private', event: 'marker' });
    await client.next('marker');
  },

  async 'is not broadcast to without the token'({ connect, daemon }) {
    const client = connect();
    await client.ready();
    await client.join('token');
    for (const authorization of ['', 'Bearer wrong-secret-0123456789', secret, `Basic ${secret}`, `Bearer ${secret}x`]) {
      const answer = await daemon.broadcast({ channel: 'chat-session.token', event: 'message.sent' }, authorization);
      assert.equal(answer.status, 401);
      assert.equal(answer.body.success, false);
    }
    await daemon.broadcast({ channel: 'chat-session.token', event: 'marker' });
    await client.next('marker');
  },
};

// Daemon is one process of the binary, started any number of times.
class Daemon {
  constructor(env) {
    this.env = env;
    this.secured = Boolean(env.SOCKETIO_SECRET);
  }

  // start resolves once the daemon listens: it logs the bound address then. Port 0: any.
  async start(port) {
    const child = spawn(binary, [], {
      env: { PATH: process.env.PATH, ...this.env, SOCKET_PORT: String(port) },
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    this.child = child;
    this.exited = new Promise((resolve) => child.once('exit', (code, signal) => resolve(code ?? signal)));
    const lines = [];
    await within('the start', new Promise((resolve, reject) => {
      createInterface(child.stderr).on('line', (line) => {
        lines.push(line);
        const [, addr] = /msg=listening addr="?127\.0\.0\.1:(\d+)/.exec(line) ?? [];
        if (addr) resolve(this.port = Number(addr));
      });
      child.once('error', reject);
      child.once('exit', () => reject(new Error(`the daemon did not start:\n${lines.join('\n')}`)));
    }));
    this.url = `http://127.0.0.1:${this.port}`;
  }

  async stop() {
    const began = Date.now();
    this.child.kill('SIGTERM');
    const code = await within('the exit', this.exited);
    return { code, ms: Date.now() - began };
  }

  kill() {
    this.child?.kill('SIGKILL');
  }

  async health() {
    const response = await within('/health', fetch(`${this.url}/health`));
    assert.equal(response.status, 200);
    return response.json();
  }

  // empty resolves once nobody is connected.
  async empty() {
    const until = Date.now() + deadline;
    for (;;) {
      const { connections, sessions, admins } = await this.health();
      if (connections + sessions + admins === 0) return;
      assert.ok(Date.now() < until, `still ${connections} connections, ${sessions} sessions, ${admins} admins`);
    }
  }

  async broadcast(request, authorization = this.secured ? `Bearer ${secret}` : undefined) {
    const response = await within('/broadcast', fetch(`${this.url}/broadcast`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json', ...(authorization && { Authorization: authorization }) },
      body: typeof request === 'string' ? request : JSON.stringify(request),
    }));
    return { status: response.status, body: await response.json() };
  }
}

// Client is a socket, and what happened to it, in order: connect, disconnect and every event.
class Client {
  constructor(daemon, { io, transports, name }, options) {
    this.daemon = daemon;
    this.name = name;
    this.upgrades = transports.length > 1;
    this.happened = new Queue();
    this.socket = io(daemon.url, { transports, forceNew: true, extraHeaders: { Origin: origin }, ...options });
    // Each event's frame as it came, without Engine.IO's "4": JSON.parse would hide what became of a big integer.
    const frames = [];
    this.socket.io.on('open', () => {
      const { engine } = this.socket.io;
      engine.on('data', (frame) => frame.startsWith('2[') && frames.push(frame));
      this.upgrade = new Promise((resolve) => engine.once('upgrade', resolve));
    });
    this.socket.on('connect', () => this.happened.put({ event: 'connect' }));
    this.socket.on('disconnect', (reason) => this.happened.put({ event: 'disconnect', data: reason }));
    this.socket.onAny((event, ...args) => this.happened.put({ event, data: args[0], frame: frames.shift() }));
  }

  // next resolves to what happens next, which has to be the event.
  async next(event) {
    const got = await this.happened.take(`${event} for ${this.name}`);
    assert.equal(got.event, event, JSON.stringify(got));
    return got;
  }

  // ready resolves once the client has connected, and upgraded if it is to.
  async ready() {
    await this.next('connect');
    await this.upgraded();
  }

  async upgraded() {
    if (this.upgrades) await within(`upgrade of ${this.name}`, this.upgrade);
  }

  // ask emits an event and resolves to the arguments of its acknowledgement.
  ask(event, ...args) {
    return within(`acknowledgement of ${event}`, new Promise((resolve) => {
      this.socket.emit(event, ...args, (...answer) => resolve(answer));
    }));
  }

  async join(sessionId) {
    this.socket.emit('join-session', this.signed(sessionId));
    await this.next('joined-session');
  }

  async refused(event, ...args) {
    const [{ error }, ...more] = await this.ask(event, ...args);
    const { message, ...others } = (await this.next('error')).data;
    assert.equal(typeof message, 'string');
    assert.ok(message.length > 10 && error === message && more.length === 0, `${event} ${JSON.stringify(args)}: ${message}, ${error}`);
    assert.deepEqual(others, {});
    assert.equal(this.socket.connected, true);
  }

  signed(sessionId) {
    return { sessionId, ...(this.daemon.secured && { auth: sign(`${this.socket.id}:chat-session.${sessionId}`) }) };
  }

  signedAdmin() {
    return this.daemon.secured ? { auth: sign(`${this.socket.id}:admin-chat`) } : undefined;
  }
}

// Queue hands out what was put in, in order, and waits for what was not yet.
class Queue {
  items = [];
  takers = [];

  put(item) {
    const taker = this.takers.shift();
    if (taker) taker(item);
    else this.items.push(item);
  }

  take(what = 'something to happen') {
    if (this.items.length > 0) return Promise.resolve(this.items.shift());
    return within(what, new Promise((resolve) => this.takers.push(resolve)));
  }
}

function sign(text) {
  return createHmac('sha256', secret).update(text).digest('hex');
}

// within rejects if a promise takes longer than the deadline.
function within(what, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`no ${what} within ${deadline} ms`)), deadline);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

// quietPort finds a free port below the range that the kernel takes for outgoing connections (32768 and up):
// while the daemon is away, nobody else's connection may sit on its port, least of all a client's own, for a
// connect to a port of that range can meet itself.
async function quietPort() {
  for (;;) {
    const port = 20_000 + Math.floor(Math.random() * 10_000);
    const probe = createServer();
    const free = await new Promise((resolve) => {
      probe.once('error', () => resolve(false));
      probe.listen(port, '127.0.0.1', () => resolve(true));
    });
    if (free) {
      await new Promise((resolve) => probe.close(resolve));
      return port;
    }
  }
}
