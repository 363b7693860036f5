// What broke in other people's applications, a row each: .laravel/echo against the daemon, in Node. FILE is the file to test.
import assert from 'node:assert/strict';
import { after, before, describe, test } from 'node:test';
import { site, until } from './parts.mjs';

const { default: Pusher } = await import(process.env.FILE);
const { daemon, laravel, pushers, open, listen } = site(Pusher);
const names = (n, prefix = 'private-row') => Array.from({ length: n }, (_, i) => `${prefix}.${i}`);
const members = async (name) => (await daemon.broadcast(name, 'count')).delivered;
const ended = () => (daemon.log.match(/client ended/g) ?? []).length;

describe('1: one budget for all that the page sends', () => {
  test('150 private channels at once: 100 are joined, 50 are told why, and one more when another is left', async () => {
    const page = open();
    let connects = 0;
    page.connection.bind('connected', () => connects++);
    for (const name of names(150)) listen(page, name);
    await until(() => page.heard.count('in') === 100 && page.heard.count('no') === 50, '100 are in, and 50 are told');
    const { name, error, status } = await page.heard.next('no');
    assert.deepEqual([name, error, status], ['private-row.100', 'a page may be in 100 channels at once: this one waits until another is left', 400]);
    assert.deepEqual([connects, laravel.requests, laravel.asked[0].names.length, ended()], [1, 1, 100, 0]);
    page.heard.forget();
    page.unsubscribe('private-row.7');
    assert.equal(await page.heard.next('in'), 'private-row.100');
    await until(async () => (await members('private-row.7')) === 0, 'the other is left');
    assert.deepEqual([page.heard.count('no'), laravel.requests, connects], [0, 2, 1], 'who still waits is not told again');
  });

  test('100 are in, the page is turned (50 leaves, 50 joins): within the budget, on one connection', async () => {
    const page = open();
    for (const name of names(100)) listen(page, name);
    await until(() => page.heard.count('in') === 100, 'all are in');
    page.heard.forget();
    for (const name of names(50)) page.unsubscribe(name);
    for (const name of names(50, 'private-next')) listen(page, name);
    await until(() => page.heard.count('in') === 50, 'the next 50 are in', 40_000);
    assert.deepEqual([laravel.requests, ended(), page.heard.count('no')], [2, 0, 0]);
    assert.equal(await members('private-row.0'), 0);
    assert.equal(await members('private-next.49'), 1);
  });

  test('a channel that is left before it was joined costs nothing', async () => {
    const page = open();
    for (let n = 0; n < 200; n++) {
      listen(page, `private-row.${n}`);
      page.unsubscribe(`private-row.${n}`);
    }
    listen(page, 'private-stays');
    assert.equal(await page.heard.next('in'), 'private-stays');
    for (const name of names(100)) listen(page, name);
    for (const name of names(99)) page.unsubscribe(name); // after the question to Laravel has been put, and before it is answered
    assert.equal(await page.heard.next('in'), 'private-row.99');
    assert.equal(page.channel('private-stays').trigger('client-typing', { text: 'x'.repeat(1024) }), true, 'there is budget left');
    assert.equal(ended(), 0);
  });

  test('1,000 times あ, whispered without a pause for 8 s: bytes count, not characters, and joins have their share', async () => {
    const page = open();
    const other = open();
    for (const one of [page, other]) {
      listen(one, 'private-room');
      await one.heard.next('in');
    }
    other.channel('private-room').bind('client-typing', other.heard('typing'));
    const until_ = performance.now() + 8000;
    let sent = 0;
    while (performance.now() < until_) {
      if (page.channel('private-room').trigger('client-typing', { text: 'あ'.repeat(1000) })) sent++;
      await new Promise((done) => setTimeout(done, 20));
    }
    await until(() => other.heard.count('typing') === sent, `all ${sent} arrive`);
    assert.ok(sent >= 12 + 8 && sent <= 30, `${sent} whispers of 4 messages each`);
    for (const name of names(40)) listen(page, name);
    await until(() => page.heard.count('in') === 40, '40 joins, at once', 2000);
    assert.equal(ended(), 0);
  });

  test('the budget starts anew at each connect', async () => {
    const page = open();
    for (const name of names(100)) listen(page, name);
    await until(() => page.heard.count('in') === 100, 'all are in');
    page.heard.forget();
    await daemon.restart();
    await until(() => page.heard.count('in') === 100, 'all are in again', 10_000);
    assert.equal(ended(), 0);
  });
});

describe('2: one request signs all channels', () => {
  test('at each connect, with a yes or no for each', async () => {
    laravel.answers.set('private-b', [403, 403]);
    const page = open();
    for (const name of ['private-a', 'private-b', 'public']) listen(page, name);
    await until(() => page.heard.count('in') === 2, 'two are in');
    const { status, error } = await page.heard.next('no');
    assert.equal(status, 403);
    assert.match(error, /answered 403 for private-b/);
    await daemon.restart();
    await until(() => page.heard.count('in') === 4, 'two are in again');
    assert.deepEqual(laravel.asked.map(({ many, names }) => [many, names]), [[true, ['private-a', 'private-b', 'public']], [true, ['private-a', 'private-b', 'public']]]);
    assert.equal(page.heard.count('no'), 0, 'and the no is told once');
  });

  test('who is subscribed while Laravel is being asked is in the next request', async () => {
    const page = open();
    listen(page, 'private-a');
    await until(() => laravel.requests === 1, 'the first request');
    for (const name of ['private-b', 'private-c']) listen(page, name);
    await until(() => page.heard.count('in') === 3, 'all are in');
    assert.deepEqual(laravel.asked.map(({ names }) => names.length), [1, 2]);
  });

  test('a broadcaster that does not know the question, or an endpoint of the application\'s own: one by one, and so from then on', async () => {
    laravel.knowsMany = false;
    const page = open();
    for (const name of names(3)) listen(page, name);
    await until(() => page.heard.count('in') === 3, 'all are in');
    assert.deepEqual(laravel.asked.map(({ many }) => many), [true, false, false, false]);
    listen(page, 'private-later');
    await until(() => page.heard.count('in') === 4, 'the later one too');
    await daemon.restart();
    await until(() => page.heard.count('in') === 8, 'all are in again');
    assert.deepEqual(laravel.asked.map(({ many }) => many), [true, ...Array(8).fill(false)]);
  });

  test('Laravel is away: one request, after a pause, for all', async () => {
    laravel.status = 503;
    const page = open();
    for (const name of names(3)) listen(page, name);
    await until(() => page.heard.count('no') === 3, 'each is told');
    laravel.status = 200;
    await until(() => page.heard.count('in') === 3, 'all are in');
    assert.deepEqual(laravel.asked.map(({ names }) => names.length), [3, 3]);
  });

  test('an authorizer, and a handler of the application\'s: asked for each', async () => {
    const asked = [];
    const authorizer = ({ name }) => ({ authorize: (id, done) => (asked.push(name), done(new Error('no'), null)) });
    const page = open({ authorizer });
    for (const name of names(3)) listen(page, name);
    await until(() => page.heard.count('no') === 3, 'each is asked');
    assert.deepEqual([asked.sort(), laravel.requests], [names(3), 0]);
  });
});

describe('4: the errors of a connection', () => {
  test('none while nothing answers; then all goes on', async () => {
    const page = open();
    page.connection.bind('error', page.heard('error'));
    listen(page, 'private-a');
    await page.heard.next('in');
    await daemon.stop();
    await until(() => page.connection.state === 'unavailable', 'told that it takes long', 30_000);
    assert.equal(page.heard.count('error'), 0);
    await daemon.start();
    await page.heard.next('in');
  });

  test('where the daemon complains, data.code and error.data.code can be read', async () => {
    const page = open();
    page.connection.bind('error', page.heard('error'));
    await until(() => page.connection.state === 'connected', 'connected');
    page.socket.emit('unknown');
    const complaint = await page.heard.next('error');
    assert.equal(complaint.error.data.code, null);
    assert.match(complaint.data.message, /unknown/);
  });
});

test('5: an error of a channel is told once until it has succeeded, however often Laravel is asked', async () => {
  laravel.answers.set('private-a', [503, 500, 502]);
  const page = open();
  listen(page, 'private-a');
  await page.heard.next('in', 60_000);
  assert.deepEqual(laravel.asked.map(({ many }) => many), [true, true, false, true], 'a 500 again: perhaps the endpoint does not know the question');
  assert.equal(page.heard.count('no'), 1);
  laravel.answers.set('private-a', [503]);
  await daemon.restart();
  await page.heard.next('in', 30_000);
  assert.equal(page.heard.count('no'), 2);
});

describe('8: the members that applications call', () => {
  const said = [];
  const { warn } = console;
  before(() => { console.warn = (text) => said.push(text); });
  after(() => { console.warn = warn; });

  test('are there, and what cannot work says so once and throws nothing', async () => {
    const page = open();
    assert.ok(Pusher.instances.includes(page));
    listen(page, 'private-a');
    listen(page, 'presence-b');
    await page.heard.next('in');
    assert.equal((await page.heard.next('no')).status, 400);
    assert.deepEqual(page.channels.all().map(({ name }) => name), ['private-a', 'presence-b']);
    assert.equal(page.channels.find('private-a'), page.channel('private-a'));
    assert.equal(page.channels.find('other'), undefined);
    const { members } = page.channel('presence-b');
    assert.deepEqual([members.count, members.me, members.get('1'), Object.keys(members.members)], [0, null, null, []]);
    members.each(() => assert.fail());
    page.config.auth = { headers: { 'X-New': 'token' } };
    listen(page, 'private-c');
    await page.heard.next('in');
    assert.equal(laravel.asked.at(-1).headers['x-new'], 'token');
    page.connection.disconnect();
    assert.equal(page.connection.state, 'disconnected');
    page.connection.connect();
    await page.heard.next('in');
    assert.equal(page.send_event('client-typing', {}, 'private-a'), true);
    assert.equal(page.shouldUseTLS(), false);
    Pusher.logToConsole = true;
    said.length = 0;
    for (let twice = 0; twice < 2; twice++) {
      assert.equal(page.send_event('pusher:ping', {}), false);
      page.signin();
      page.user.bind('event', () => {});
      page.user.watchlist.bind('online', () => {});
      page.switchCluster({ cluster: 'eu', appKey: 'key' });
      Pusher.Runtime.createXHR = () => {};
    }
    assert.deepEqual(said.map((text) => /socketio: ([\w.]+)/.exec(text)[1]), ['send_event', 'signin', 'user', 'switchCluster', 'Pusher.Runtime.createXHR']);
  });

  test('every member that pusher-js has is here, or is one of its insides', async () => {
    const { default: Original } = await import('pusher-js');
    const theirs = new Original('key', { cluster: 'mt1' });
    const ours = open({ socketio: { autoConnect: false } });
    const all = (object) => {
      const found = new Set();
      for (let at = object; at && at !== Object.prototype; at = Object.getPrototypeOf(at)) for (const name of Object.getOwnPropertyNames(at)) found.add(name);
      return [...found];
    };
    const missing = (there, here) => all(there).filter((name) => !(name in here) && !insides.has(name));
    const insides = new Set([
      // of an instance
      'global_emitter', 'sessionID', 'timeline', 'timelineSender', 'timelineSenderTimer', 'checkAppKey',
      // of each that can be bound to
      'callbacks', 'global_callbacks', 'failThrough', 'emit',
      // of the connection
      'key', 'options', 'connection', 'usingTLS', 'unavailableTimer', 'activityTimer', 'retryTimer', 'activityTimeout', 'strategy', 'runner',
      'errorCallbacks', 'handshakeCallbacks', 'connectionCallbacks', 'timeline', 'switchCluster', 'send', 'startConnecting', 'abortConnecting',
      'disconnectInternally', 'updateStrategy', 'retryIn', 'clearRetryTimer', 'setUnavailableTimer', 'clearUnavailableTimer', 'sendActivityCheck',
      'resetActivityCheck', 'stopActivityCheck', 'buildConnectionCallbacks', 'buildHandshakeCallbacks', 'buildErrorCallbacks', 'setConnection',
      'abandonConnection', 'updateState', 'shouldRetry',
      // of a channel
      'subscriptionCancelled', 'subscriptionCount', 'authorize', 'disconnect', 'handleEvent', 'handleSubscriptionSucceededEvent',
      'handleSubscriptionCountEvent', 'handleInternalEvent', 'handleAddedMember', 'handleRemovedMember', 'cancelSubscription', 'reinstateSubscription',
      // of the channels
      'add', 'remove',
      // of the class
      'length', 'name', 'prototype', 'ScriptReceivers', 'DependenciesReceivers', 'auth_callbacks', 'getClientFeatures',
    ]);
    const names = ['private-a', 'presence-a', 'a'];
    assert.deepEqual(missing(theirs, ours), []);
    assert.deepEqual(missing(theirs.connection, ours.connection), []);
    assert.deepEqual(missing(theirs.channels, ours.channels), []);
    assert.deepEqual(missing(Original, Pusher), []);
    for (const name of names) assert.deepEqual(missing(theirs.subscribe(name), ours.subscribe(name)), []);
    theirs.disconnect();
  });
});

describe('11: a session that has expired', () => {
  for (const status of [419, 401, 403]) {
    test(`${status} at the next connect: told once, in words that a page can show, and not asked again`, async () => {
      const page = open();
      for (const name of names(2)) listen(page, name);
      await until(() => page.heard.count('in') === 2, 'both are in');
      if (status === 403) for (const name of names(2)) laravel.answers.set(name, [403, 403]);
      else laravel.status = status;
      const before = laravel.requests;
      await daemon.restart();
      const told = [await page.heard.next('no'), await page.heard.next('no')];
      for (const one of told) assert.deepEqual([one.status, one.error], [status, `The session has expired, or a right was taken away (${status}). Reload the page.`]);
      await daemon.restart();
      await until(() => laravel.requests === before + 2, 'asked once for each connection');
      await until(() => page.channels.all().every(({ subscriptionPending }) => !subscriptionPending), 'and answered');
      assert.equal(page.heard.count('no'), 0);
    });
  }
});

test('no host is given: the console says so once', async () => {
  const said = [];
  const { warn } = console;
  console.warn = (text) => said.push(text);
  globalThis.location = new URL(daemon.url);
  try {
    for (let n = 0; n < 2; n++) pushers.push(new Pusher('key', {}));
  } finally {
    delete globalThis.location;
    console.warn = warn;
  }
  assert.equal(said.length, 1);
  assert.match(said[0], /"host" is not set/);
});
