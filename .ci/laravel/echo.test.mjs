// The README's stand-in for pusher-js under laravel-echo 1.19, 2.0 and the newest, by each transport and through nginx with TLS,
// and without Echo. Laravel is a few lines here: chat.test.mjs has the real one.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createHmac } from 'node:crypto';
import { once } from 'node:events';
import http from 'node:http';
import { after, before, test } from 'node:test';

const { DAEMON, DAEMON_PORT, MODULES, SECRET, SOCKET, STAND_IN } = process.env;
const { default: Pusher } = await import(STAND_IN);
const echos = {};
for (const version of ['laravel-echo-1', 'laravel-echo-2.0', 'laravel-echo']) echos[version] = (await import(`${MODULES}/${version}/dist/echo.js`)).default;
const daemonUrl = `http://127.0.0.1:${DAEMON_PORT}`;
const ways = {
  WebSocket: { host: daemonUrl, socketio: { transports: ['websocket'] } },
  polling: { host: daemonUrl, socketio: { transports: ['polling'] } },
  'nginx with TLS': { host: SOCKET },
  'nginx with TLS, polling': { host: SOCKET, socketio: { transports: ['polling'] } },
};

let daemon;
const pushers = []; // all of them
let asked = []; // what Laravel was asked
const answers = new Map(); // by channel: statuses that it gives in place of a signature
const laravel = http.createServer(async (request, response) => {
  let body = '';
  for await (const chunk of request) body += chunk;
  const fields = Object.fromEntries(new URLSearchParams(body));
  asked.push({ ...fields, headers: request.headers, at: Date.now() });
  const status = answers.get(fields.channel_name)?.shift() ?? 200;
  response.writeHead(status).end(status === 200 ? JSON.stringify({ auth: sign(fields.socket_id, fields.channel_name) }) : '');
});
const authEndpoint = () => `http://127.0.0.1:${laravel.address().port}/broadcasting/auth`;
const sign = (id, channel) => createHmac('sha256', SECRET).update(`${id}:${channel.replace(/^private-(?=chat-session\.|admin-chat$)/, '')}`).digest('hex');

before(async () => {
  await startDaemon();
  await once(laravel.listen(0, '127.0.0.1'), 'listening');
});
after(async () => {
  for (const pusher of pushers) pusher.disconnect();
  await stopDaemon();
  laravel.close();
  laravel.closeAllConnections();
});
process.on('exit', () => daemon?.kill('SIGKILL'));

const everyone = []; // an Echo of each version by each way, for the restart at the end

for (const [version, Echo] of Object.entries(echos)) {
  for (const [way, options] of Object.entries(ways)) {
    test(`${version} by ${way}`, async () => {
      const open = (more) => {
        const echo = new Echo({ broadcaster: 'pusher', key: 'socketio', Pusher, authEndpoint: authEndpoint(), ...options, ...more });
        pushers.push(echo.connector.pusher);
        return { echo, heard: hears() };
      };
      const [one, two] = [open({ bearerToken: 'of one' }), open({ broadcaster: 'reverb', auth: { headers: { 'X-Who': 'two' } } })];
      everyone.push(one, two);
      for (const { echo, heard } of [one, two]) {
        echo.private('orders.5').subscribed(heard('subscribed')).listen('OrderShipped', heard('shipped')).listenForWhisper('typing', heard('typing'));
        echo.private('App.Models.User.1').notification(heard('notification'));
        echo.channel('news').listen('.published', heard('news')).subscribed(heard('subscribed news'));
        echo.private('chat-session.5').listen('.message.sent', heard('message')).subscribed(heard('subscribed chat'));
        for (const event of ['subscribed', 'subscribed news', 'subscribed chat']) await heard.next(event);
      }
      assert.notEqual(one.echo.socketId(), two.echo.socketId());
      const of = (echo) => asked.filter(({ socket_id }) => socket_id === echo.socketId());
      assert.deepEqual(of(one.echo).map(({ channel_name }) => channel_name).sort(), ['news', 'private-App.Models.User.1', 'private-chat-session.5', 'private-orders.5']);
      assert.equal(of(one.echo)[0].headers.authorization, 'Bearer of one');
      assert.equal(of(two.echo)[0].headers['x-who'], 'two');

      await until(async () => (await broadcast('private-App.Models.User.1', 'App\\Events\\Ready')).delivered >= 2, 'both are in all channels');
      const order = { id: 1, big: 'ü👍'.repeat(1000) };
      await broadcast('private-orders.5', 'App\\Events\\OrderShipped', order, { socket: one.echo.socketId() });
      assert.deepEqual(await two.heard.next('shipped'), order);
      await broadcast('orders.5', 'App\\Events\\OrderShipped', { id: 'another channel' });
      await broadcast('private-orders.5', 'App\\Events\\OrderShipped', { id: 2 });
      for (const { heard } of [one, two]) assert.equal((await heard.next('shipped')).id, 2, 'toOthers(), and one channel only');
      const note = { id: 'uuid', type: 'App\\Notifications\\Paid', amount: 3 };
      await broadcast('private-App.Models.User.1', 'Illuminate\\Notifications\\Events\\BroadcastNotificationCreated', note);
      await broadcast('news', 'published', { id: 4 });
      await broadcast('chat-session.5', 'message.sent', { id: 6 }); // as the broadcaster posts it: without the prefix
      for (const { heard } of [one, two]) {
        assert.deepEqual(await heard.next('notification'), note);
        assert.deepEqual(await heard.next('news'), { id: 4 });
        assert.deepEqual(await heard.next('message'), { id: 6 });
      }

      one.echo.private('orders.5').whisper('typing', { name: 'one' });
      assert.deepEqual(await two.heard.next('typing'), { name: 'one' });
      two.echo.private('orders.5').whisper('typing', { name: 'two' });
      assert.deepEqual(await one.heard.next('typing'), { name: 'two' }, 'and nobody hears his own');

      for (const channel of ['private-forbidden', 'forbidden']) answers.set(channel, [403]);
      for (const channel of [one.echo.private('forbidden'), one.echo.channel('forbidden'), one.echo.join('room')]) channel.error(one.heard('no'));
      const no = [await one.heard.next('no'), await one.heard.next('no'), await one.heard.next('no')];
      assert.deepEqual(no.map(({ status }) => status).sort(), [400, 403, 403]);
      assert.match(no.find(({ status }) => status === 400).error, /no presence channels/);
      assert.throws(() => one.echo.encryptedPrivate('secret'), /private-encrypted-secret/);

      one.echo.leave('orders.5');
      await until(async () => (await broadcast('private-orders.5', 'App\\Events\\OrderShipped', { id: 7 })).delivered === everyone.length - everyone.filter(({ left }) => left).length - 1, 'one has left');
      one.left = true;
      await two.heard.next('shipped');
      await broadcast('news', 'published', { id: 8 });
      assert.deepEqual(await one.heard.next('news'), { id: 8 });
      assert.equal(one.heard.count('shipped'), 0);
      for (const { heard } of everyone) heard.forget();
    });
  }
}

test('without Echo', async (t) => {
  const pusher = (options) => {
    const made = new Pusher('key', { ...ways.WebSocket, authEndpoint: authEndpoint(), cluster: 'mt1', forceTLS: true, ...options });
    pushers.push(made);
    return made;
  };
  await t.test('states, bindings and channels', async () => {
    const heard = hears();
    const one = pusher();
    const contexts = [];
    one.connection.bind('state_change', heard('state'));
    one.connection.bind('connected', heard('connected'));
    one.bind('e', heard('any channel'));
    one.bind_global((event, data) => heard('global')({ event, data }));
    const channel = one.subscribe('plain.1');
    assert.equal(one.connection.state, 'connecting');
    assert.equal(one.subscribe('plain.1'), channel);
    assert.equal(one.channel('plain.1'), channel);
    assert.equal(one.channel('constructor'), undefined);
    channel.bind('pusher:subscription_succeeded', heard('in'));
    channel.bind('e', heard('e')).bind('e', function () { contexts.push(this); }, 'context').bind_global((event) => heard('channel global')(event));
    assert.deepEqual(await heard.next('state'), { previous: 'connecting', current: 'connected' });
    assert.deepEqual(await heard.next('connected'), { socket_id: one.connection.socket_id });
    await heard.next('in');
    assert.equal(channel.subscribed, true);
    await broadcast('plain.1', 'e', { n: 1 });
    for (const who of ['e', 'any channel']) assert.deepEqual(await heard.next(who), { n: 1 });
    assert.deepEqual(await heard.next('global'), { event: 'e', data: { n: 1 } });
    assert.deepEqual(contexts.map(String), ['context']);

    channel.unbind('e');
    channel.unbind_global();
    one.unbind('e');
    one.unbind_global();
    channel.bind('mark', heard('mark'));
    heard.forget();
    await broadcast('plain.1', 'e');
    await broadcast('plain.1', 'mark');
    await heard.next('mark');
    assert.equal(heard.count('e') + heard.count('any channel') + heard.count('global') + heard.count('channel global'), 0);
    assert.throws(() => channel.trigger('typing', {}), /client-/);

    one.subscribe('plain.2').bind('pusher:subscription_succeeded', heard('in'));
    await heard.next('in');
    assert.deepEqual(one.allChannels().map(({ name }) => name), ['plain.1', 'plain.2']);
    one.disconnect();
    assert.deepEqual(await heard.next('state'), { previous: 'connected', current: 'disconnected' });
    one.connect();
    assert.deepEqual(await heard.next('state'), { previous: 'disconnected', current: 'connecting' });
    await heard.next('in');
    one.unsubscribe_all();
    assert.deepEqual(one.allChannels(), []);
    await until(async () => (await broadcast('plain.1', 'e')).delivered + (await broadcast('plain.2', 'e')).delivered === 0, 'both are left');
  });

  await t.test('an address with a path', async () => {
    const heard = hears();
    const one = pusher({ host: `${daemonUrl}/chat` });
    one.connection.bind('unavailable', heard('unavailable'));
    one.connection.bind('error', heard('error'));
    await heard.next('unavailable');
    assert.equal((await heard.next('error')).error.message, 'Invalid namespace');
  });

  await t.test('whispers: 20 at once, and to members only', async () => {
    const heard = hears();
    const [one, two] = [pusher(), pusher()].map((pusher) => pusher.subscribe('private-room'));
    for (const channel of [one, two]) channel.bind('pusher:subscription_succeeded', heard('in'));
    assert.equal(one.trigger('client-typing', {}), false);
    await heard.next('in');
    await heard.next('in');
    two.bind('client-typing', heard('typing'));
    const sent = Array.from({ length: 30 }, (_, n) => one.trigger('client-typing', { n }));
    assert.deepEqual([sent.filter(Boolean).length, sent[19], sent[20]], [20, true, false]);
    for (let n = 0; n < 20; n++) assert.deepEqual(await heard.next('typing'), { n });
    await until(() => one.trigger('client-typing', { n: 'later' }), 'a quarter of a second later');
    assert.deepEqual(await heard.next('typing'), { n: 'later' });
    assert.equal(two.trigger('client-typing', { text: 'x'.repeat(5001) }), false);
    const open = two.pusher.subscribe('public');
    open.bind('pusher:subscription_succeeded', heard('in'));
    two.pusher.connection.bind('error', heard('error'));
    await heard.next('in');
    await until(() => open.trigger('client-typing', {}), 'a quarter of a second later');
    assert.match((await heard.next('error')).data.message, /whisper/);
  });

  await t.test('one question to Laravel, however often a component comes and goes', async () => {
    const heard = hears();
    const one = pusher();
    await new Promise((resolve) => one.connection.bind('connected', () => (one.subscribe('strict'), resolve()))); // in the handler of "connect"
    one.unsubscribe('strict');
    one.subscribe('strict').bind('pusher:subscription_succeeded', heard('in'));
    await heard.next('in');
    assert.equal(asked.filter(({ channel_name }) => channel_name === 'strict').length, 1);
  });

  await t.test('Laravel is away: asked again, not all at once. It says no: not again, but by subscribe()', async () => {
    const heard = hears();
    answers.set('private-away', [500]).set('private-busy', [429]).set('private-no', [403]);
    const one = pusher();
    for (const [name, status] of [['private-away', 500], ['private-busy', 429], ['private-no', 403]]) {
      one.subscribe(name).bind('pusher:subscription_error', heard(`${name} fails`)).bind('pusher:subscription_succeeded', heard(name));
      assert.deepEqual(await heard.next(`${name} fails`), { type: 'AuthError', error: `${authEndpoint()} answered ${status}`, status });
    }
    for (const name of ['private-away', 'private-busy']) {
      await heard.next(name);
      const [first, second] = asked.filter(({ channel_name }) => channel_name === name);
      assert.ok(second.at - first.at > 2900 && second.at - first.at < 7000, `${second.at - first.at} ms`);
    }
    assert.equal(asked.filter(({ channel_name }) => channel_name === 'private-no').length, 1);
    one.subscribe('private-no');
    await heard.next('private-no');
  });

  await t.test('authorizers and channelAuthorization', async () => {
    const heard = hears();
    const join = async (options, name = 'private-own') => {
      const one = pusher(options);
      one.subscribe(name).bind('pusher:subscription_succeeded', heard('in')).bind('pusher:subscription_error', heard('fails'));
      return one;
    };
    await join({ authorizer: ({ name }) => ({ authorize: (id, done) => done(null, { auth: sign(id, name) }) }) });
    await heard.next('in');
    await join({ channelAuthorization: { customHandler: ({ socketId, channelName }, done) => done(null, { auth: sign(socketId, channelName) }) } });
    await heard.next('in');
    asked = [];
    await join({ authEndpoint: '/elsewhere', auth: { params: { a: '1' } }, channelAuthorization: { endpoint: authEndpoint(), headers: { 'X-A': 'a' }, headersProvider: () => ({ 'X-B': 'b' }), params: { b: '2' }, paramsProvider: () => ({ c: '3' }) } });
    await heard.next('in');
    const { a, b, c, headers } = asked.at(-1);
    assert.deepEqual([a, b, c, headers['x-a'], headers['x-b'], headers.accept], ['1', '2', '3', 'a', 'b', 'application/json']);
    const axiosSaysNo = Object.assign(new Error('Request failed'), { response: { status: 403 } });
    for (const failure of [[axiosSaysNo], [true, axiosSaysNo]]) {
      await join({ authorizer: () => ({ authorize: (_, done) => done(...failure) }) });
      assert.deepEqual(await heard.next('fails'), { type: 'AuthError', error: 'Request failed', status: 403 });
    }
    await join({ authorizer: () => ({ authorize: (_, done) => done(null, { auth: 'wrong' }) }) });
    assert.match((await heard.next('fails')).error, /does not sign/);
    await join({ authorizer: () => ({ authorize: (_, done) => done(null, { auth: 'key:of-pusher' }) }) }); // Laravel's driver is still the old one
    assert.match((await heard.next('fails')).error, /is BROADCAST_CONNECTION .* "socketio"/);
    await join({ authorizer: () => ({ authorize: (_, done) => done(null, {}) }) });
    assert.match((await heard.next('fails')).error, /BROADCAST_CONNECTION/);
  });
});

test('a restart: all are back by themselves, with new signatures, and are told', async () => {
  for (const { echo, heard } of everyone) {
    echo.connector.pusher.connection.bind('state_change', heard('state'));
    heard.forget();
  }
  const ids = everyone.map(({ echo }) => echo.socketId());
  await stopDaemon();
  for (const { heard } of everyone) assert.deepEqual(await heard.next('state'), { previous: 'connected', current: 'connecting' });
  assert.deepEqual(everyone.map(({ echo }) => echo.socketId()), ids.map(() => undefined), 'no X-Socket-ID of a connection that is gone');
  await startDaemon();
  for (const { heard } of everyone) {
    await heard.next('subscribed news');
    await heard.next('subscribed chat');
  }
  assert.equal(new Set([...ids, ...everyone.map(({ echo }) => echo.socketId())]).size, 2 * ids.length);
  await until(async () => (await broadcast('news', 'other')).delivered === everyone.length, 'all are in');
  await broadcast('news', 'published', { id: 9 });
  for (const { heard } of everyone) assert.deepEqual(await heard.next('news'), { id: 9 });
});

// --- the parts


/** heard('x') is a callback, heard.next('x') what it was called with, in order. */
function hears() {
  const all = new Map();
  const of = (name) => all.get(name) ?? all.set(name, []).get(name);
  const heard = (name) => (data) => of(name).push(data);
  heard.next = async (name) => (await until(() => of(name).length, name), of(name).shift());
  heard.count = (name) => of(name).length;
  heard.forget = () => all.clear();
  return heard;
}

async function broadcast(channel, event, data, more) {
  const headers = { Authorization: `Bearer ${SECRET}` };
  const response = await fetch(`${daemonUrl}/broadcast`, { method: 'POST', headers, body: JSON.stringify({ channel, event, data, ...more }) });
  assert.equal(response.status, 200, await response.clone().text());
  return response.json();
}

async function startDaemon() {
  daemon = spawn(DAEMON, { env: { PATH: process.env.PATH, SOCKET_PORT: DAEMON_PORT, SOCKETIO_SECRET: SECRET }, stdio: ['ignore', 'ignore', 'inherit'] });
  await until(async () => (await fetch(`${daemonUrl}/health`).catch(() => null))?.ok, 'the daemon is up');
}

async function stopDaemon() {
  const exited = once(daemon, 'exit');
  daemon.kill('SIGTERM');
  await exited;
}

async function until(condition, what) {
  const deadline = Date.now() + 20_000;
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, `in 20 s: ${what}`);
    await new Promise((done) => setTimeout(done, 10));
  }
}
