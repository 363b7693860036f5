// The file in place of pusher-js under laravel-echo 1.19, 2.0 and the newest, by each transport and through nginx with TLS,
// and without Echo. Laravel is a few lines here: chat.test.mjs has the real one.
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { Daemon, Laravel, hears, sign, until } from '../echo/parts.mjs';

const { DAEMON_PORT, MODULES, SOCKET, STAND_IN } = process.env;
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

const pushers = []; // all of them
const daemon = new Daemon({}, DAEMON_PORT);
const laravel = new Laravel();
const { answers } = laravel;
const broadcast = daemon.broadcast.bind(daemon);

before(async () => {
  await daemon.start();
  await laravel.start();
});
after(async () => {
  for (const pusher of pushers) pusher.disconnect();
  await daemon.stop();
  laravel.stop();
});

const everyone = []; // an Echo of each version by each way, for the restart at the end

for (const [version, Echo] of Object.entries(echos)) {
  for (const [way, options] of Object.entries(ways)) {
    test(`${version} by ${way}`, async () => {
      const open = (more) => {
        const echo = new Echo({ broadcaster: 'pusher', key: 'socketio', Pusher, authEndpoint: laravel.endpoint, ...options, ...more });
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
      const of = (echo) => laravel.asked.filter(({ socket_id }) => socket_id === echo.socketId());
      assert.deepEqual(of(one.echo).flatMap(({ names }) => names).sort(), ['news', 'private-App.Models.User.1', 'private-chat-session.5', 'private-orders.5']);
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
      one.echo.encryptedPrivate('secret').error(one.heard('no'));
      assert.match((await one.heard.next('no')).error, /no encrypted channels/);

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
    const made = new Pusher('key', { ...ways.WebSocket, authEndpoint: laravel.endpoint, cluster: 'mt1', forceTLS: true, ...options });
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
    const { data, error } = await heard.next('error');
    assert.deepEqual([data, error.data], [{ code: null, message: 'Invalid namespace' }, data]);
  });

  await t.test('whispers: what the budget has beyond what it spares for joins, and to members only', async () => {
    const heard = hears();
    const [one, two] = [pusher(), pusher()].map((pusher) => pusher.subscribe('private-room'));
    for (const channel of [one, two]) channel.bind('pusher:subscription_succeeded', heard('in'));
    assert.equal(one.trigger('client-typing', {}), false);
    await heard.next('in');
    await heard.next('in');
    two.bind('client-typing', heard('typing'));
    const sent = Array.from({ length: 60 }, (_, n) => one.trigger('client-typing', { n }));
    assert.deepEqual([sent.filter(Boolean).length, sent[50], sent[51]], [51, true, false]);
    for (let n = 0; n < 51; n++) assert.deepEqual(await heard.next('typing'), { n });
    await until(() => one.trigger('client-typing', { n: 'later' }), 'a quarter of a second later');
    assert.deepEqual(await heard.next('typing'), { n: 'later' });
    assert.equal(two.trigger('client-typing', { text: 'x'.repeat(8192) }), false);
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
    assert.equal(laravel.askedFor('strict').length, 1);
  });

  await t.test('Laravel is away: asked again, not all at once. It says no: not again, but by subscribe()', async () => {
    const heard = hears();
    answers.set('private-away', [500]).set('private-busy', [429]).set('private-no', [403]);
    const one = pusher();
    for (const [name, status] of [['private-away', 500], ['private-busy', 429], ['private-no', 403]]) {
      one.subscribe(name).bind('pusher:subscription_error', heard(`${name} fails`)).bind('pusher:subscription_succeeded', heard(name));
      const { type, error, status: told } = await heard.next(`${name} fails`);
      assert.deepEqual([type, told, error.startsWith(`${laravel.endpoint} answered ${status}`)], ['AuthError', status, true], error);
    }
    for (const name of ['private-away', 'private-busy']) {
      await heard.next(name);
      const [first, second] = laravel.askedFor(name);
      assert.ok(second.at - first.at > 2900 && second.at - first.at < 7000, `${second.at - first.at} ms`);
    }
    assert.equal(laravel.askedFor('private-no').length, 1);
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
    await join({ authEndpoint: '/elsewhere', auth: { params: { a: '1' } }, channelAuthorization: { endpoint: laravel.endpoint, headers: { 'X-A': 'a' }, headersProvider: () => ({ 'X-B': 'b' }), params: { b: '2' }, paramsProvider: () => ({ c: '3' }) } });
    await heard.next('in');
    const { a, b, c, headers } = laravel.asked.at(-1);
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
  await daemon.stop();
  for (const { heard } of everyone) assert.deepEqual(await heard.next('state'), { previous: 'connected', current: 'connecting' });
  assert.deepEqual(everyone.map(({ echo }) => echo.socketId()), ids.map(() => undefined), 'no X-Socket-ID of a connection that is gone');
  await daemon.start();
  for (const { heard } of everyone) {
    await heard.next('subscribed news');
    await heard.next('subscribed chat');
  }
  assert.equal(new Set([...ids, ...everyone.map(({ echo }) => echo.socketId())]).size, 2 * ids.length);
  await until(async () => (await broadcast('news', 'other')).delivered === everyone.length, 'all are in');
  await broadcast('news', 'published', { id: 9 });
  for (const { heard } of everyone) assert.deepEqual(await heard.next('news'), { id: 9 });
});
