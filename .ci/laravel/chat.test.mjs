// Three people in Chromium, each in a browser context of their own, and what the broadcaster does when all is not well.
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { createHmac } from 'node:crypto';
import { once } from 'node:events';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import http from 'node:http';
import net from 'node:net';
import { after, before, test as nodeTest } from 'node:test';

const { APP, ARTIFACTS, DAEMON, DAEMON_PORT, MOVED, MOVED_APP, ONLY = '', PHP, PHP_APP, PLAYWRIGHT, SECRET, SITE, SOCKET } = process.env;
const { chromium } = await import(PLAYWRIGHT);
const daemonUrl = `http://127.0.0.1:${DAEMON_PORT}`;

let daemon, browser;

before(async () => {
  await startDaemon();
  browser = await chromium.launch({
    executablePath: '/usr/bin/chromium',
    args: ['--host-resolver-rules=MAP myapp.test 127.0.0.1', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
  });
});
after(async () => {
  await browser?.close();
  await stopDaemon();
});
process.on('SIGTERM', () => process.exit(143));
process.on('exit', () => daemon?.kill('SIGKILL'));

let guestA, guestB, office; // browser contexts: two visitors and an administrator
let tab1, tab2, other, admin; // pages: A's two tabs, B's, the administrator's
let plain, vue; // pages of a third visitor
let idA, idB, idC; // chat sessions

test('guests and an administrator open their pages', async () => {
  guestA = await visitor();
  tab1 = await open(guestA, '/');
  tab2 = await open(guestA, '/');
  guestB = await visitor();
  other = await open(guestB, '/');
  idA = await tab1.page.locator('#app').getAttribute('data-session-id');
  idB = await other.page.locator('#app').getAttribute('data-session-id');
  assert.notEqual(idA, idB);
  assert.match(await (await guestA.request.get(`${SITE}/chat`)).text(), new RegExp(idA), 'a visitor keeps his chat');

  office = await context();
  await office.request.get(SITE);
  assert.equal((await office.request.get(`${SITE}/admin`)).status(), 403);
  const login = await office.request.post(`${SITE}/login`, {
    headers: await xsrf(office),
    data: { email: 'admin@example.com', password: 'admin' },
  });
  assert.equal(login.status(), 204);
  admin = await open(office, '/admin');
  assert.equal(await tab1.page.locator('#app').getAttribute('data-mounts'), '2', 'StrictMode mounts twice');
  assert.equal(tab1.sockets.length, 1, 'and still there is one connection');
});

test('a message is stored and reaches whom it should, once', async () => {
  const first = await send(tab1, 'Hello, is anybody there?');
  await lists(admin, idA);
  assert.deepEqual(rows('session_id, sender, body'), [{ session_id: idA, sender: 'guest', body: 'Hello, is anybody there?' }]);

  // The administrator opens the session and so is in both rooms: admin-room and session-A.
  await admin.page.click(`[data-session="${idA}"]`);
  await joined(admin);
  const second = await send(tab1, 'It is about my order.');
  await shows(admin, second);
  await shows(tab2, second);
  await shows(tab1, second); // from the answer to its POST
  await mark(`chat-session.${idA}`, admin, tab1, tab2);
  await mark(`chat-session.${idB}`, other);
  assert.deepEqual(admin.received(second), 1);
  assert.deepEqual(tab2.received(second), 1);
  assert.deepEqual(tab1.received(second), 0, 'toOthers()');
  assert.deepEqual(other.received(second), 0);
});

test("the administrator's reply reaches that visitor only", async () => {
  const reply = await send(admin, 'Good morning! Which order is it?');
  await shows(tab1, reply);
  await shows(tab2, reply);
  await mark(`chat-session.${idA}`, admin, tab1, tab2);
  await mark(`chat-session.${idB}`, other);
  assert.equal(tab1.received(reply), 1);
  assert.equal(tab2.received(reply), 1);
  assert.equal(admin.received(reply), 0, 'toOthers()');
  assert.equal(other.received(reply), 0);
  assert.equal(rows('sender').at(-1).sender, 'admin');

  const elsewhere = await send(other, 'A question of another visitor');
  await lists(admin, idB);
  await mark(`chat-session.${idA}`, tab1, tab2);
  assert.equal(tab1.received(elsewhere) + tab2.received(elsewhere), 0);
  await tab1.page.screenshot({ path: `${ARTIFACTS}/widget.png` });
  await admin.page.screenshot({ path: `${ARTIFACTS}/admin.png` });
});

test('nobody joins what is not theirs', async () => {
  // B's browser runs the real components, but with A's session id and the administrators' one too.
  const page = await guestB.newPage();
  const thief = watch(page);
  await page.addInitScript((data) => {
    document.addEventListener('readystatechange', () => Object.assign(document.getElementById('app').dataset, data), { once: true });
  }, { page: 'several', sessionId: idA });
  await page.goto(SITE);
  await page.getByText(`Laravel refuses chat-session.${idA} (403)`).first().waitFor();
  await page.getByText('Laravel refuses admin-chat (403)').waitFor();
  assert.equal((await guestB.request.get(`${SITE}/chat/${idA}/messages`)).status(), 403);

  // It gets hold of a signature that Laravel gave to A: that one is bound to A's connection.
  const socketA = await tab1.page.locator('[data-socket]').getAttribute('data-socket');
  const stolen = await sign(guestA, { socket_id: socketA, channel_name: `chat-session.${idA}` });
  assert.equal(stolen.status(), 200);
  const { auth } = await stolen.json();
  await page.route('**/broadcasting/auth', (route) => route.fulfill({ json: { auth } }));
  await page.reload();
  const refused = (channel) => page.getByText(new RegExp(`auth does not sign socket_id \\S+ for channel ${channel}:`)).first().waitFor();
  await refused(`chat-session\\.${idA}`);
  await refused('admin-chat');
  assert.equal((await health()).admins, 1);

  const private_ = await send(tab1, 'My password is hunter2');
  await shows(admin, private_);
  // It tries once more, and the refusal comes over the same connection after the message would have.
  const errors = () => thief.events.filter(([event]) => event === 'error').length;
  const before = errors();
  await page.click('#first');
  await page.click('#first');
  await until(() => errors() > before, 'one more refusal');
  assert.equal(thief.received(private_), 0);
  await page.close();
});

test('/broadcasting/auth', async (t) => {
  const ok = { socket_id: 'abcDEF123_-', channel_name: `chat-session.${idA}` };
  const user = await context(); // who has an account and is no administrator
  await user.request.get(SITE);
  await user.request.post(`${SITE}/login`, { headers: await xsrf(user), data: { email: 'user@example.com', password: 'user' } });
  const stranger = await context();
  const names = new Map([[guestA, 'A'], [guestB, 'B'], [office, 'administrator'], [user, 'user'], [stranger, 'stranger']]);
  const hmac = (channel) => createHmac('sha256', SECRET).update(`${ok.socket_id}:${channel}`).digest('hex');
  const allowed = [
    [guestA, `chat-session.${idA}`, `chat-session.${idA}`],
    [guestA, `private-chat-session.${idA}`, `chat-session.${idA}`],
    [guestA, `presence-chat-session.${idA}`, `chat-session.${idA}`],
    [office, `chat-session.${idA}`, `chat-session.${idA}`],
    [office, 'chat-session.5', 'chat-session.5'],
    [office, 'private-admin-chat', 'admin-chat'],
    [guestA, `private-encrypted-chat-session.${idA}`, `chat-session.${idA}`],
    // By name, with the prefix: run has the callbacks.
    ...['private-orders.1', 'private-open.1', 'open.1'].map((name) => [user, name, name]),
    ...['private-orders.5', 'orders.5'].map((name) => [office, name, name]),
    // Public: no callback, and anybody.
    ...['news', 'somewhere-else', 'session-5', 'admin-chat.', 'Presence-x', `x-chat-session.${idB}`, '0_9=@,.;-', 'x'.repeat(164)].map((name) => [stranger, name, name]),
  ];
  for (const [who, channel_name, channel] of allowed) {
    await t.test(`200 ${names.get(who)} ${channel_name.slice(0, 100)}`, async () => {
      const response = await sign(who, { ...ok, channel_name });
      assert.equal(response.status(), 200);
      assert.deepEqual(await response.json(), { auth: hmac(channel) });
    });
  }

  const a = `chat-session.${idA}`;
  const refused = [
    [guestB, ok],
    [guestA, { ...ok, channel_name: 'admin-chat' }],
    [guestA, { ...ok, channel_name: `${a}.x` }], // Laravel 8 asks the callback about what is before the dot
    // And what is no channel or no id, from somebody to whom the callbacks would say yes.
    ...[undefined, '', [a], `${a}:x`, `:${a}`, `${a}.x`, `${a}\u0000`, `${a}ü`, `private-private-${a}`, 'chat-session.', `chat-session.${'x'.repeat(129)}`,
      'private-orders.5:x', 'private-orders.5\n', 'private-orders.5/', 'x'.repeat(165), 'private-', 'presence-', 'private-news', 'private-private-orders.5',
      'presence-orders.5', 'presence-news', 'private-encrypted-orders.5', 'private-encrypted-news'].map((channel_name) => [office, { ...ok, channel_name }]),
    // A name of the chat is never public; nor is one that has a callback, which an old broadcaster posts without its prefix.
    ...['chat-session.5.6', 'chat-session.5', 'chat-session.', `chat-session.${'x'.repeat(129)}`, 'admin-chat', 'orders.1', 'open.1', 'private-orders.1', 'private-open.1',
      'presence-open.1', 'private-encrypted-open.1'].map((channel_name) => [stranger, { ...ok, channel_name }]),
    ...['private-orders.5', 'orders.5', 'admin-chat', 'chat-session.5'].map((channel_name) => [user, { ...ok, channel_name }]),
    ...[undefined, '', ['abc'], 'abc:chat-session.5', 'abc def', 'x'.repeat(65)].map((socket_id) => [office, { ...ok, socket_id }]),
  ];
  for (const [who, data] of refused) {
    await t.test(`403 ${names.get(who)} ${JSON.stringify(data).slice(0, 100)}`, async () => {
      const response = await sign(who, data);
      assert.equal(response.status(), 403);
      assert.equal((await response.json()).auth, undefined);
    });
  }
  await t.test('channel_names: each its own yes or no, and a callback that throws is reported and fails no other', async () => {
    const ask = async (who, channel_names, more) => {
      const response = await sign(who, { ...ok, channel_name: undefined, channel_names, ...more });
      return { status: response.status(), ...(await response.json()) };
    };
    const before = logged('The callback of broken');
    const yes = [a, `private-${a}`, 'private-admin-chat', 'private-orders.5', 'news', '0', '12'];
    const no = ['private-broken.1', 'presence-orders.5', 'private-news', 'no channel', `${a}:x`, '\u0000x', 'ü', 'x'.repeat(165)];
    const mixed = no.flatMap((name, i) => [name, yes[i % yes.length]]);
    const answer = await ask(office, mixed);
    assert.equal(answer.status, 200);
    assert.deepEqual(Object.keys(answer), ['status', 'auth']);
    for (const name of yes) assert.equal(answer.auth[name], hmac(name.replace(/^private-(?=chat-session|admin-chat)/, '')), name);
    for (const name of no) assert.equal(answer.auth[name] ?? null, null, name);
    assert.equal(logged('The callback of broken'), before + 1);
    assert.deepEqual(await ask(office, ['0']), { status: 200, auth: { 0: hmac('0') } });
    assert.deepEqual((await ask(user, ['private-orders.5', 'private-orders.1', 'admin-chat'])).auth, { 'private-orders.5': null, 'private-orders.1': hmac('private-orders.1'), 'admin-chat': null });
    assert.deepEqual((await ask(guestA, ['private-orders.1', `private-${a}`])).auth, { 'private-orders.1': null, [`private-${a}`]: hmac(a) });
    const hundred = Array.from({ length: 100 }, (_, i) => `news.${i}`);
    assert.deepEqual((await ask(stranger, hundred)).auth, Object.fromEntries(hundred.map((name) => [name, hmac(name)])));
    const form = await guestA.request.post(`${SITE}/broadcasting/auth`, { form: { socket_id: ok.socket_id, 'channel_names[0]': a, 'channel_names[1]': 'private-orders.1' } });
    assert.deepEqual(await form.json(), { auth: { [a]: hmac(a), 'private-orders.1': null } });
    const latin1 = await guestA.request.post(`${SITE}/broadcasting/auth`, {
      headers: { 'Content-Type': 'application/x-www-form-urlencoded' }, data: `socket_id=${ok.socket_id}&channel_names[]=caf%e9&channel_names[]=news`,
    });
    assert.deepEqual(await latin1.json(), { auth: { 'caf\ufffd': null, news: hmac('news') } });

    for (const names of [[...hundred, 'one more'], [], 'news', { a: 'news' }, [['news']], ['news', 5], ['news', null], null, true]) {
      const { status, message, auth } = await ask(office, names);
      assert.deepEqual([status, message, auth], [422, 'channel_names has to be a list of 1 to 100 names.', undefined], JSON.stringify(names).slice(0, 50));
    }
    for (const socket_id of ['a:b', undefined, ['x']]) assert.equal((await ask(office, ['news'], { socket_id })).status, 403);
  });
  await t.test('403 a browser that was never here', async () => assert.equal((await sign(stranger, ok)).status(), 403));
  await t.test('a POST without X-XSRF-TOKEN is a 419', async () => {
    const response = await guestA.request.post(`${SITE}/chat/${idA}/messages`, { data: { body: 'x' }, headers: { Accept: 'application/json' } });
    assert.equal(response.status(), 419);
  });
});

test('the daemon is away: messages are stored, the pages come back, fetch them and show each once', async () => {
  const was = logged('BroadcastException');
  await stopDaemon();
  for (const { page } of [tab1, tab2, admin]) await page.locator('[data-joined="false"]').waitFor();
  const lost = [await send(tab1, 'Are you still there?'), await send(admin, 'Yes, I am looking it up.')];
  assert.deepEqual(rows('id').slice(-2).map(({ id }) => id), lost);
  const reports = log().split(/^(?=\[\d{4}-)/m).filter((entry) => entry.includes('BroadcastException'));
  assert.equal(reports.length, was + 2);
  assert.match(reports.at(-1), new RegExp(`${daemonUrl}/broadcast did not answer: .*(refused|Couldn't connect|Failed to connect)`));

  await startDaemon();
  const ofA = rows('id', `session_id = '${idA}'`).map(({ id }) => id);
  for (const someone of [tab1, tab2, admin]) {
    await joined(someone);
    await shows(someone, lost[1]);
    const shown = await someone.page.locator('li').evaluateAll((items) => items.map((item) => Number(item.dataset.id)));
    assert.deepEqual(shown, ofA, 'every message once, in order');
  }
  await joined(other);
  const next = await send(tab1, 'Thank you!');
  await shows(admin, next);
  await mark(`chat-session.${idA}`, admin, tab1, tab2);
  assert.equal(admin.received(next), 1);
  assert.equal(tab2.received(next), 1);
  assert.equal(tab1.received(next), 0, 'X-Socket-ID is that of the new connection');
  await tab1.page.screenshot({ path: `${ARTIFACTS}/widget-after-restart.png` });
  await admin.page.screenshot({ path: `${ARTIFACTS}/admin-after-restart.png` });
});

test('plain JavaScript and Vue: one more visitor, on two pages', async () => {
  const guest = await visitor();
  plain = watch(await guest.newPage());
  vue = watch(await guest.newPage());
  for (const [{ page }, path] of [[plain, '/chat'], [vue, '/vue']]) await page.goto(SITE + path);
  for (const someone of [plain, vue]) await until(() => someone.left('joined-session') === 1, 'the page is in its room');

  const question = await send(plain, 'Do you ship to Bandung?');
  await lists(admin, (idC = rows('session_id').at(-1).session_id));
  await admin.page.click(`[data-session="${idC}"]`);
  await joined(admin);
  const answer = await send(admin, 'Yes, within three days.');
  for (const { page } of [plain, vue]) await page.getByText('Yes, within three days.').waitFor();
  await mark(`chat-session.${idC}`, plain, vue);
  assert.deepEqual([plain.received(question), vue.received(question)], [0, 1], 'toOthers()');
  assert.deepEqual([plain.received(answer), vue.received(answer)], [1, 1]);
  await plain.page.screenshot({ path: `${ARTIFACTS}/plain.png` });
  await vue.page.screenshot({ path: `${ARTIFACTS}/vue.png` });

  const other_ = await send(other, 'Not for them');
  await mark(`chat-session.${idC}`, plain, vue);
  assert.equal(plain.received(other_) + vue.received(other_), 0);

  const fromVue = await send(vue, 'And to Lima?');
  await plain.page.getByText('And to Lima?').waitFor();
  await mark(`chat-session.${idC}`, plain, vue);
  assert.deepEqual([plain.received(fromVue), vue.received(fromVue)], [1, 0], 'toOthers()');
});

test('a message that Laravel does not store stays in the form, and the page says so', async () => {
  const react = await open(guestB, '/');
  for (const { page } of [plain, vue, react]) {
    const items = await page.locator('li').count();
    for (const [answer, text] of [[{ status: 419, json: {} }, 'answered 419: reload the page'], [{ status: 422, json: {} }, 'answered 422'], ['abort', 'Failed to fetch']]) {
      await page.route('**/messages', (route) => (answer === 'abort' ? route.abort() : route.fulfill(answer)), { times: 1 });
      await page.locator('input[name=body]').fill('Do not lose me');
      await page.locator('button:text("Send")').click();
      await page.getByText(`Not sent: `).and(page.getByText(text)).waitFor();
      assert.equal(await page.locator('input[name=body]').inputValue(), 'Do not lose me');
      assert.equal(await page.locator('li').count(), items);
    }
    await page.locator('button:text("Send")').click(); // once more, and Laravel takes it
    await page.locator('li', { hasText: 'Do not lose me' }).waitFor();
    await page.getByText('Not sent').waitFor({ state: 'detached' });
    assert.equal(await page.locator('input[name=body]').inputValue(), '');
  }
  await react.page.close();
});

test('a chat that had Pusher: Echo, its hooks in React and Vue, and pusher-js alone', async () => {
  const enter = async (user, chat, name = 'chat') => {
    const page = await (await context()).newPage();
    const someone = Object.assign(watch(page), { asked: [], log: '' });
    page.on('request', (request) => request.url().endsWith('/broadcasting/auth') && someone.asked.push(...new URLSearchParams(request.postData()).getAll('channel_names[]')));
    page.on('console', (message) => (someone.log += `${message.text()}\n`));
    await page.goto(`${MOVED}/login/${user}`);
    await page.goto(`${MOVED}/chat/${chat}/${name}`);
    return someone;
  };
  const [one, two, elsewhere] = [await enter(1, 1), await enter(2, 1), await enter(1, 2)];
  const [hooks, vue, plain] = [await enter(2, 1, 'hooks'), await enter(2, 1, 'vue'), await enter(2, 1, 'plain')];
  const all = [one, two, elsewhere, hooks, vue, plain];
  const members = async (channel, event = 'count') => {
    const headers = { Authorization: `Bearer ${SECRET}` };
    return (await (await fetch(`${daemonUrl}/broadcast`, { method: 'POST', headers, body: JSON.stringify({ channel, event }) })).json()).delivered;
  };
  const inside = async () => {
    await until(async () => (await members('private-chat.1')) === 5, 'five are in the chat');
    await until(async () => (await members('private-chat.2')) === 1, 'one is elsewhere');
    await until(async () => (await members('news')) === 2, 'two are in a public channel');
    await until(async () => (await members('private-App.Models.User.2')) === 1, 'one hears notifications');
  };
  const heard = ({ events }) => events.filter(([, { event }]) => event === 'App\\Events\\MessageSent').map(([, { data }]) => data.message.body);
  const line = async ({ page }, text) => {
    await page.locator('li', { hasText: text }).first().waitFor();
    assert.equal(await page.locator('li', { hasText: text }).count(), 1, text);
  };
  const type = ({ page }) => page.locator('input[name=body]').pressSequentially('a');
  await inside();
  for (const someone of all) {
    assert.equal(someone.sockets.length, 1);
    assert.ok(someone.asked.includes('private-chat.1') || someone.asked.includes('private-chat.2'), String(someone.asked));
    assert.equal(new Set(someone.asked).size, someone.asked.length, `StrictMode, and Laravel is asked once: ${someone.asked}`);
  }

  const speak = async (text) => {
    await send(one, `${text} from Echo`);
    for (const someone of [two, hooks, vue, plain]) await line(someone, `${text} from Echo`);
    await plain.page.locator('input[name=body]').fill(`${text} from pusher-js`);
    await plain.page.click('button');
    for (const someone of [one, two, hooks, vue]) await line(someone, `${text} from pusher-js`);
    await two.page.request.get(`${MOVED}/publish/${text} news`);
    for (const someone of [hooks, plain]) await line(someone, `${text} news`);
    await two.page.request.get(`${MOVED}/pay/2/${text.length}`);
    await line(hooks, `paid ${text.length}`);
    await line(one, `${text} from Echo`); // once, from the answer to the POST: toOthers()
    await line(plain, `${text} from pusher-js`);
    await members('private-chat.2', 'mark');
    await until(() => elsewhere.events.some(([, { event }]) => event === 'mark'), 'the mark arrives');
    assert.deepEqual(heard(elsewhere), []);
  };
  await speak('Hello');
  assert.equal(await two.page.locator('li').first().innerText(), 'admin@example.com: Hello from Echo');
  assert.deepEqual([heard(one), heard(plain)], [['Hello from pusher-js'], ['Hello from Echo']]);

  await type(hooks);
  await plain.page.getByText('2 is typing').waitFor();
  await type(plain);
  await hooks.page.getByText('plain is typing').waitFor();

  await hooks.page.getByText('/broadcasting/auth answered 403').and(hooks.page.getByText('there are no presence channels')).waitFor();
  assert.match(hooks.log, /socketio: private-chat\.99: \/broadcasting\/auth answered 403/);
  assert.match(hooks.log, /socketio: presence-room: there are no presence channels/);
  const ask = (credentials, channel_name) => two.page.evaluate(async ([credentials, channel_name]) =>
    (await fetch('/broadcasting/auth', { method: 'POST', credentials, body: new URLSearchParams({ socket_id: 'abc', channel_name }) })).status, [credentials, channel_name]);
  assert.deepEqual(await Promise.all(['private-chat.1', 'private-chat.2', 'chat.1', 'news'].map((name) => ask('include', name))), [200, 403, 200, 200]);
  assert.deepEqual(await Promise.all(['private-chat.1', 'chat.1', 'news'].map((name) => ask('omit', name))), [403, 403, 200], 'who has not logged in');
  // With cached routes Laravel runs no file of routes: the callbacks have to be known all the same, also to who asks without prefix.
  const names = ['private-chat.1', 'private-chat.2', 'chat.1', 'chat.2', 'news'];
  const beside = () => two.page.evaluate(async (names) => (await fetch('/beside/auth', {
    method: 'POST',
    headers: { Accept: 'application/json', 'X-XSRF-TOKEN': decodeURIComponent(/XSRF-TOKEN=([^;]*)/.exec(document.cookie)[1]) },
    body: new URLSearchParams([['socket_id', 'abc'], ...names.map((name) => ['channel_names[]', name])]),
  })).json(), names);
  const artisan = (command) => execFileSync('php', [`${MOVED_APP}/artisan`, command], { env: { ...process.env, BROADCAST_DRIVER: 'log' } });
  artisan('config:cache'); // from now on another connection than the daemon's is the default one, as where this file is used
  for (const command of ['route:clear', 'route:cache']) {
    artisan(command);
    assert.equal(existsSync(`${MOVED_APP}/bootstrap/cache/routes-v7.php`), command === 'route:cache');
    const { auth } = await beside();
    assert.deepEqual(names.map((name) => /^[0-9a-f]{64}$/.test(auth[name])), [true, false, true, false, true], command);
  }
  artisan('route:clear');
  artisan('config:clear');

  await stopDaemon();
  for (const { page } of [hooks, vue, plain]) await page.locator('[data-status="connecting"]').waitFor();
  await startDaemon();
  for (const { page } of [hooks, vue, plain]) await page.locator('[data-status="connected"]').waitFor();
  await inside();
  await speak('Here again');
  await two.page.click('#leave');
  await until(async () => (await members('private-chat.1')) === 4, 'the component goes');
  await hooks.page.screenshot({ path: `${ARTIFACTS}/hooks.png` });
  for (const { page } of all) await page.context().close();
});

test('recipes: typing without Echo, an administrator is there, the visitor has left', async () => {
  const { io } = await import(new URL('../socket.io-client/build/esm/index.js', `file://${PLAYWRIGHT}`));
  const { typing } = await import(`${APP}/resources/js/typing.js`);
  const signature = async (socket_id, channel_name) => (await (await sign(guestA, { socket_id, channel_name })).json()).auth;
  const heard = [];
  const [writer, reader] = [0, 1].map(() => io(daemonUrl, { forceNew: true, transports: ['websocket'] }));
  after(() => [writer, reader].forEach((socket) => socket.close()));
  const keys = [writer, reader].map((socket) => typing(socket, idA, signature, (data) => heard.push(data)));
  await until(() => (keys[0]({ name: 'A' }), heard.length > 0), 'the other hears it');
  keys[0]({ name: 'at once' });
  await until(() => (keys[1]({ name: 'B' }), heard.some(({ name }) => name === 'B')), 'and the other way');
  assert.deepEqual(new Set(heard.map(({ name }) => name)), new Set(['A', 'B']));

  const online = async () => (await (await guestA.request.get(`${SITE}/chat/online`)).json()).online;
  assert.equal(await online(), true);
  await admin.page.goto('about:blank');
  await until(async () => !(await online()), 'the administrator has gone');
  await admin.page.goto(`${SITE}/admin`);
  await until(online, 'and is back');
  await admin.page.click(`[data-session="${idC}"]`);
  await joined(admin);

  const left = async () => (await office.request.get(`${SITE}/admin/left`)).json();
  assert.equal((await guestA.request.get(`${SITE}/admin/left`)).status(), 403);
  assert.equal((await (await context()).request.post(`${SITE}/chat/seen`, { headers: { Accept: 'application/json' } })).status(), 419);
  assert.equal((await guestA.request.post(`${SITE}/chat/seen`, { headers: await xsrf(guestA) })).status(), 204);
  assert.deepEqual(await left(), []);
  execFileSync('php', ['-r', '(new PDO("sqlite:".$argv[1]))->exec("update visitors set last_seen = datetime(\'now\', \'-121 seconds\')");', `${APP}/database/database.sqlite`]);
  assert.deepEqual(await left(), [idA]);
  assert.equal((await guestA.request.post(`${SITE}/chat/seen`, { headers: await xsrf(guestA) })).status(), 204);
  assert.deepEqual(await left(), []);

  assert.equal((await probe({ url: daemonUrl, secret: SECRET, seen: 'two-tabs' })).returned, 204, 'two tabs at once');
});

test('the Node server takes over, and gives back: pages, broadcaster and all stay as they are', async () => {
  const pages = [tab1, tab2, admin];
  await stopDaemon();
  for (const { page } of pages) await page.locator('[data-joined="false"]').waitFor();
  const node = spawn('node', [new URL('node.mjs', import.meta.url).pathname], {
    env: { ...process.env, NODE_MODULES: new URL('..', `file://${PLAYWRIGHT}`).pathname, SOCKET_PORT: DAEMON_PORT },
    stdio: 'inherit',
  });
  const back = async () => {
    const were = [plain, vue].map((someone) => someone.left('joined-session'));
    await until(async () => (await fetch(`${daemonUrl}/health`).catch(() => null))?.ok, 'the server is up');
    for (const someone of pages) await joined(someone);
    for (const [i, someone] of [plain, vue].entries()) await until(() => someone.left('joined-session') > were[i], 'the page is in its room');
    const reply = await send(admin, 'Here we are again.');
    for (const { page } of [plain, vue]) await page.getByText('Here we are again.').last().waitFor();
    await until(() => plain.received(reply) === 1 && vue.received(reply) === 1, 'both hear it');
    const id = await send(tab1, 'Hello again.');
    for (const someone of [tab1, tab2]) await shows(someone, id);
    await until(() => admin.received(id) === 1, 'the administrator hears it');
    assert.equal(await admin.page.locator('.error').count(), 0);
  };
  try {
    await back();
  } finally {
    node.kill();
    await once(node, 'exit');
    await startDaemon();
  }
  await back();
});

test('who has lost the right is put out by reconnect(), and the others come back by themselves', async () => {
  const right = (is) => execFileSync('php', ['-r', '(new PDO("sqlite:".$argv[1]))->exec("update users set is_admin = $argv[2] where email = \'admin@example.com\'");', `${APP}/database/database.sqlite`, is]);
  const reconnect = async (...channels) => (await probe({ url: daemonUrl, secret: SECRET, reconnect: channels })).returned;
  const guestsWere = tab1.sockets.length;
  right(0);
  const before = await send(tab1, 'Who hears this?');
  await until(() => admin.received(before) === 1, 'an open page still hears the room');
  assert.equal(await reconnect('admin-chat'), 1);
  await admin.page.getByText('(403)').first().waitFor();
  await until(async () => (await health()).admins === 0, 'the room is empty');
  const secret = await send(tab1, 'And this?');
  await shows(tab2, secret);
  assert.equal(admin.received(secret), 0);
  assert.equal(tab1.sockets.length, guestsWere, 'a visitor is in another room');

  right(1);
  await admin.page.reload();
  await joined(admin);
  await admin.page.click(`[data-session="${idA}"]`);
  await joined(admin);
  const members = [tab1, tab2, admin];
  const were = members.map(({ sockets }) => sockets.length);
  assert.equal(await reconnect(`private-chat-session.${idA}`), 3, "A's two tabs and the administrator");
  for (const [i, someone] of members.entries()) await until(() => someone.sockets.length > were[i] && someone.page.locator('[data-joined="true"]').count(), 'all come back');
  const next = await send(tab1, 'Here again');
  for (const someone of [tab2, admin]) await shows(someone, next);
});

test("a phone: the server's own Origin, and a token in place of the cookie", async () => {
  const { io } = await import(new URL('../socket.io-client/build/esm/index.js', `file://${PLAYWRIGHT}`));
  const phone = await context();
  const socket = io(SOCKET, { transports: ['websocket'], rejectUnauthorized: false, extraHeaders: { Origin: SOCKET } });
  after(() => socket.close());
  await until(() => socket.connected, 'the phone is connected');
  const ask = (token) => phone.request.post(`${SITE}/api/broadcasting/auth`, {
    data: { socket_id: socket.id, channel_name: 'admin-chat' },
    headers: { Accept: 'application/json', ...(token && { Authorization: `Bearer ${token}` }) },
  });
  assert.equal((await ask()).status(), 401);
  assert.equal((await ask('token-of-user')).status(), 403);
  const { auth } = await (await ask('token-of-admin')).json();
  assert.deepEqual(await socket.timeout(10_000).emitWithAck('join-admin', { auth }), { room: 'admin-room' });
  const heard = new Promise((resolve) => socket.on('message.sent', resolve));
  const id = await send(tab1, 'Is there an app?');
  assert.equal((await heard).id, id);
  socket.close();
});

test('development: *.test pages against open mode, and a container against a secret', async (t) => {
  const daemonWith = async (env) => {
    const child = spawn(DAEMON, { env: { SOCKET_PORT: '0', ...env }, stdio: ['ignore', 'ignore', 'pipe'] });
    after(() => child.kill());
    let log = '';
    child.stderr.setEncoding('utf8').on('data', (text) => (log += text));
    await until(() => /msg=listening addr=\S+:\d+/.test(log), 'the daemon listens');
    return /msg=listening addr=\S+:(\d+)/.exec(log)[1];
  };
  // Valet and Herd serve 80 and 443. Here the two have ports, and so have the origins.
  const plainSite = http.createServer((request, response) => response.setHeader('Content-Type', 'text/html').end('<!doctype html>')).listen(0, '127.0.0.1');
  after(() => plainSite.close().closeAllConnections());
  await once(plainSite, 'listening');
  const sites = [`http://myapp.test:${plainSite.address().port}`, SITE.replace('localhost', 'myapp.test')];
  for (const origins of [sites.join(), sites.join().replaceAll('myapp', '*')]) {
    const port = await daemonWith({ CORS_ORIGINS: origins });
    for (const site of sites) {
      await t.test(`${site} with CORS_ORIGINS=${origins}`, async () => {
        const page = await guestB.newPage();
        await page.goto(site);
        await page.addScriptTag({ path: new URL('../socket.io-client/dist/socket.io.min.js', `file://${PLAYWRIGHT}`).pathname });
        const came = await page.evaluate((url) => new Promise((resolve) => {
          const socket = window.io(url, { forceNew: true, reconnection: false });
          socket.on('connect', () => socket.emit('join-session', { sessionId: 1 }));
          socket.on('joined-session', ({ roomName }) => (socket.close(), resolve(roomName)));
          socket.on('connect_error', (error) => resolve(String(error)));
        }), `http://localhost:${port}`);
        assert.equal(came, 'session-1');
        await page.close();
      });
    }
  }
  for (const [env, headers, status] of [[{ SOCKETIO_SECRET: SECRET }, { Authorization: `Bearer ${SECRET}` }, 200], [{}, {}, 403]]) {
    await t.test(`a container gets ${status} ${env.SOCKETIO_SECRET ? 'with' : 'without'} a secret`, async () => {
      const port = await daemonWith({ SOCKET_HOST: '0.0.0.0', CORS_ORIGINS: 'http://localhost', ...env });
      for (const host of ['host.docker.internal', 'socketio']) {
        const request = http.request({ port, host: '127.0.0.1', path: '/broadcast', method: 'POST', headers: { Host: `${host}:${port}`, ...headers } });
        request.end('{"channel": "admin-chat", "event": "e"}');
        const [response] = await once(request, 'response');
        assert.equal(response.resume().statusCode, status, host);
      }
    });
  }
});

test('components share one connection and its rooms, and the last one closes it', async () => {
  const elsewhere = (await health()).sessions;
  const several = await open(office, '/admin/several', 3); // two widgets of the session "demo", and the administrators' view
  const { page } = several;
  assert.equal((await health()).sessions, elsewhere + 1);
  await page.click(`[data-session="${idA}"]`);
  await joined(several, 3);
  await shows(several, await send(tab1, 'Do you hear me?'));
  assert.equal(await page.locator('.widget li').count(), 0, 'the widgets are in the room of another session');

  await page.click('#first'); // the second widget is still in the room
  await page.click('#management');
  await page.click('#management');
  await joined(several, 2); // so the daemon has had all that was sent before
  assert.equal((await health()).sessions, elsewhere + 1);
  await page.click('#second');
  await until(async () => (await health()).sessions === elsewhere, 'nobody is in the room any more');
  await page.click('#first');
  await joined(several, 2);
  assert.equal((await health()).sessions, elsewhere + 1);

  const { admins } = await health();
  const left = several.left('left-admin');
  await page.click('#management'); // the administrator logs out, and the widget keeps the connection
  await until(async () => (await health()).admins === admins - 1, 'the administrator has left');
  await page.click('#management');
  await joined(several, 2);
  assert.equal((await health()).admins, admins);
  await page.click(`[data-session="${idA}"]`); // another session, for which the same component joins anew
  await joined(several, 2);
  assert.equal(several.left('left-admin'), left + 1);
  assert.equal(several.sockets.length, 1);

  const { admins: both } = await health();
  await page.click('#logout'); // whose cookie goes, and whose page stays
  await until(async () => (await health()).admins === both - 1, 'the connection ends with the account');
  await page.locator('[data-joined="false"]').nth(1).waitFor();
  await page.reload();
  await joined(several, 3);
  await page.click('#second');
  await joined(several, 2);
  assert.equal(several.sockets.length, 2);

  const closed = several.sockets[1].waitForEvent('close');
  await page.click('#first');
  await page.click('#management');
  await closed;
  await page.click('#management');
  await joined(several);
  assert.equal(several.sockets.length, 3);
  await page.close();
});

test('CORS_ORIGINS=* lets in a client that sends credentials, and nothing of another site without Origin', async () => {
  const lax = spawn(DAEMON, { env: { SOCKET_PORT: '0', SOCKETIO_SECRET: SECRET, CORS_ORIGINS: '*' }, stdio: ['ignore', 'ignore', 'pipe'] });
  after(() => lax.kill());
  let log = '';
  lax.stderr.setEncoding('utf8').on('data', (text) => (log += text));
  await until(() => /msg=listening addr=(\S+)/.test(log), 'the daemon listens');
  const url = `http://${/msg=listening addr=(\S+)/.exec(log)[1]}`;
  const page = await guestB.newPage();
  await page.goto(SITE);
  await page.addScriptTag({ path: new URL('../socket.io-client/dist/socket.io.min.js', `file://${PLAYWRIGHT}`).pathname });
  for (const transport of ['polling', 'websocket']) {
    const came = await page.evaluate(([url, transport]) => new Promise((resolve) => {
      const socket = window.io(url, { transports: [transport], withCredentials: true, forceNew: true, reconnection: false });
      socket.on('connect', () => socket.timeout(10_000).emit('ping', (error) => (socket.close(), resolve(error ?? 'pong'))));
      socket.on('connect_error', (error) => resolve(String(error)));
    }), [url, transport]);
    assert.equal(came, 'pong', transport);
  }
  // As an <img> asks, without Origin; the answer to that one Chromium keeps even from Playwright.
  const answered = page.waitForResponse((response) => response.url().endsWith('&no-cors'));
  await page.evaluate((url) => void fetch(`${url}/socket.io/?EIO=4&transport=polling&no-cors`, { mode: 'no-cors' }), url);
  assert.equal((await answered).status(), 403);
  await page.close();
});

test('errors say what to check', async (t) => {
  const answers = [
    [{ status: 419, json: {} }, 'Laravel misses the CSRF token (419)'],
    [{ status: 404, json: {} }, '/broadcasting/auth answered 404: is broadcasting switched on'],
    [{ status: 401, json: {} }, '/broadcasting/auth answered 401: is broadcasting switched on'],
    [{ status: 200, body: '' }, 'is BROADCAST_CONNECTION (BROADCAST_DRIVER up to Laravel 10) "socketio"?'],
  ];
  for (const [answer, text] of answers) {
    await t.test(text, async () => {
      const page = await guestB.newPage();
      await page.route('**/broadcasting/auth', (route) => route.fulfill(answer));
      await page.goto(SITE);
      await page.getByText(text).waitFor();
      await page.close();
    });
  }
  await t.test('an origin that is not in CORS_ORIGINS', async () => {
    const page = await guestB.newPage();
    await page.goto(SITE.replace('localhost', '127.0.0.1'));
    await page.getByText(`is ${SITE.replace('localhost', '127.0.0.1')} in its CORS_ORIGINS?`).waitFor();
    await page.close();
  });
  await t.test('a path in the URL of the daemon', async () => {
    const page = await guestB.newPage();
    await page.route('**/build/react19.js', async (route) => {
      const response = await route.fetch();
      await route.fulfill({ response, body: (await response.text()).replaceAll(SOCKET, `${SOCKET}/chat`) });
    });
    await page.goto(SITE);
    await page.getByText(`No connection to ${SOCKET}/chat (Invalid namespace): is there a path in VITE_SOCKETIO_SERVER_URL?`).waitFor();
    await page.close();
  });
  await t.test('Laravel is away for a moment: the hook tries again', async () => {
    const page = await guestB.newPage();
    await page.route('**/broadcasting/auth', (route) => route.fulfill({ status: 502 }), { times: 2 }); // StrictMode asks twice
    await page.route('**/messages', (route) => route.abort(), { times: 1 });
    await page.goto(SITE);
    await page.getByText('/broadcasting/auth answered 502').waitFor();
    await page.getByText('Failed to fetch').waitFor();
    await page.locator('[data-joined="true"] li').first().waitFor();
    assert.equal(await page.locator('.error').count(), 0);
    await page.close();
  });
});

test('the broadcaster', async (t) => {
  const answer = { status: 200, body: '{"success":true}' };
  const busy = { status: 503, headers: { 'Retry-After': '1' }, body: '{"success":false,"error":"the server is stopping"}' };
  let requests = [];
  let answers = [];
  const server = http.createServer(async (request, response) => {
    let body = '';
    for await (const chunk of request) body += chunk;
    requests.push({ method: request.method, path: request.url, token: request.headers.authorization, type: request.headers['content-type'], body, at: Date.now() });
    const next = answers.shift() ?? answer;
    if (next.hang) return;
    if (next.reset) return request.socket.destroy();
    response.writeHead(next.status, next.headers).end(next.body);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const url = `http://127.0.0.1:${server.address().port}`;
  const broadcast = async (input, ...scripted) => {
    requests = [];
    answers = scripted;
    return probe({ url, secret: SECRET, ...input });
  };
  const failed = (result, pattern, url_ = url) => {
    assert.equal(result.class, 'Illuminate\\Broadcasting\\BroadcastException', JSON.stringify(result));
    assert.match(result.message, pattern);
    if (url_) assert.ok(result.message.startsWith(`${url_}/broadcast `), result.message);
  };

  await t.test('an empty payload is {}', async () => {
    assert.equal((await broadcast({})).ok, true);
    assert.equal(requests.length, 1);
    const { method, path, token, body } = requests[0];
    assert.deepEqual([method, path, token], ['POST', '/broadcast', `Bearer ${SECRET}`]);
    assert.equal(body, '{"event":"probe","data":{},"channel":"chat-session.5"}');
  });
  await t.test('toOthers() and several channels: one request', async () => {
    const channels = ['private-chat-session.5', 'presence-chat-session.6', 'admin-chat'];
    assert.equal((await broadcast({ channels, data: { socket: 'no', n: [] }, socket: 'abc', url: `${url}/` })).ok, true);
    assert.deepEqual(requests.map(({ body }) => JSON.parse(body)), [
      { event: 'probe', data: { n: [] }, channels: ['chat-session.5', 'chat-session.6', 'admin-chat'], socket: 'abc' },
    ]);
  });
  await t.test("the chat's own channels go without prefix, and others with theirs", async () => {
    const channels = ['private-orders.5', 'orders.5', 'presence-orders.5', 'private-encrypted-orders.5', 'private-admin-chat', 'private-encrypted-chat-session.5'];
    assert.equal((await broadcast({ channels })).ok, true);
    assert.deepEqual(JSON.parse(requests[0].body).channels, [...channels.slice(0, 4), 'admin-chat', 'chat-session.5']);
  });
  await t.test('201 channels: 100 a request', async () => {
    const channels = Array.from({ length: 201 }, (_, i) => `private-user.${i}`);
    assert.equal((await broadcast({ channels, data: { n: 1 }, socket: 'abc' })).ok, true);
    const part = (more) => ({ event: 'probe', data: { n: 1 }, ...more, socket: 'abc' });
    assert.deepEqual(requests.map(({ body }) => JSON.parse(body)), [
      part({ channels: channels.slice(0, 100) }), part({ channels: channels.slice(100, 200) }), part({ channel: channels[200] }),
    ]);
    failed(await broadcast({ channels }, answer, { status: 400, body: '{"success":false,"error":"no"}' }), /answered 400: no/);
    assert.equal(requests.length, 2);
  });
  await t.test('a proxy in the environment gets nothing', async () => {
    let asked = 0;
    const proxy = http.createServer((request, response) => (asked++, response.end(answer.body))).listen(0, '127.0.0.1');
    await once(proxy, 'listening');
    requests = [];
    const env = Object.fromEntries(['HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy'].map((name) => [name, `http://127.0.0.1:${proxy.address().port}`]));
    assert.equal((await probe({ url, secret: SECRET }, { ...env, NO_PROXY: '', no_proxy: '' })).ok, true);
    proxy.close().closeAllConnections();
    assert.deepEqual([requests.length, asked], [1, 0]);
  });
  await t.test('a success is the daemon\'s {"success": true}, and nothing else', async () => {
    for (const [status, body] of [[200, '<h1>It works</h1>'], [200, ''], [204, ''], [200, '{}'], [200, 'true'], [200, '"success"'], [200, '{"success":1}'],
      [200, '{"success":"true"}'], [200, '{"success":false,"error":"no"}'], [200, '[{"success":true}]'], [500, '{"error":{"code":1}}']]) {
      failed(await broadcast({}, { status, body }), new RegExp(`answered ${status}: what answers there is not the daemon. Is SOCKETIO_SERVER_URL right`));
      assert.equal(requests.length, 1);
    }
    assert.equal((await broadcast({}, { status: 200, body: '{"success": true, "message": "Message broadcasted", "delivered": 0}' })).ok, true);
  });
  await t.test('data that is not JSON', async () => {
    for (const data of ['latin1', 'nan', 'deep']) {
      failed(await broadcast({ php: data }), /^The data of the event probe is not JSON: /, null);
      assert.equal(requests.length, 0);
    }
  });
  await t.test("the body is what Laravel's Http::post() makes of it", async () => {
    for (const data of ['values', 'ampersands']) {
      assert.equal((await broadcast({ php: data })).ok, true);
      assert.equal((await probe({ url, secret: SECRET, php: data, http: true })).ok, true);
      assert.equal(requests.length, 2);
      assert.equal(requests[0].body, requests[1].body);
      assert.equal(requests[0].type, 'application/json');
    }
  });
  await t.test('503 is tried again once, after the second that Retry-After asks for', async () => {
    assert.equal((await broadcast({}, busy)).ok, true);
    assert.equal(requests.length, 2);
    assert.ok(requests[1].at - requests[0].at >= 950);
    failed(await broadcast({}, busy, busy), /answered 503: the server is stopping/);
    assert.equal(requests.length, 2);
  });
  await t.test('504 is told to the log, and not sent again: by a queue worker neither', async () => {
    const lost = { status: 504, body: '{"success":false,"error":"it was sent, and no answer came"}' };
    const before = logged('answered 504: it was sent, and no answer came');
    for (const env of [{}, { APP_RUNNING_IN_CONSOLE: 'false' }]) {
      requests = [];
      answers = [lost];
      const result = await probe({ url, secret: SECRET }, env);
      assert.equal(result.ok, true, JSON.stringify(result));
      assert.equal(requests.length, 1);
    }
    assert.equal(logged('answered 504: it was sent, and no answer came'), before + 2);
    failed(await broadcast({}, { status: 504, body: '<h1>504 Gateway Time-out</h1>' }), /answered 504: what answers there is not the daemon/); // a proxy's
  });
  await t.test('reconnect() ends the connections of the members of channels', async () => {
    assert.equal((await broadcast({ reconnect: ['admin-chat'] }, { status: 200, body: '{"success":true,"delivered":3}' })).returned, 3);
    assert.deepEqual(requests.map(({ body }) => JSON.parse(body)), [{ channels: ['admin-chat'], reconnect: true }]);
    const channels = ['private-chat-session.5', 'private-orders.5', ...Array.from({ length: 99 }, (_, i) => `private-user.${i}`)];
    const two = { status: 200, body: '{"success":true,"delivered":2}' };
    assert.equal((await broadcast({ reconnect: channels }, two, two)).returned, 4);
    assert.deepEqual(requests.map(({ body }) => JSON.parse(body)), [
      { channels: ['chat-session.5', ...channels.slice(1, 100)], reconnect: true }, { channels: [channels[100]], reconnect: true },
    ]);
    failed(await broadcast({ reconnect: ['admin-chat'] }, { status: 400, body: '{"success":false,"error":"no"}' }), /answered 400: no/);
  });
  await t.test('an event on a presence channel is told to its author, and goes to the others', async () => {
    const before = logged('The event probe reaches nobody in');
    assert.equal((await broadcast({ channels: ['presence-room', 'private-room'] })).ok, true);
    assert.equal(requests.length, 1);
    assert.equal(logged('The event probe reaches nobody in presence-room: '), 1);
    assert.equal((await broadcast({ channels: ['presence-chat-session.5', 'private-presence-room', 'admin-chat'] })).ok, true);
    assert.equal(logged('The event probe reaches nobody in'), before + 1, 'those of the chat are rooms');
  });
  await t.test('503 is not tried again while a page waits', async () => {
    requests = [];
    answers = [busy];
    const result = await probe({ url, secret: SECRET }, { APP_RUNNING_IN_CONSOLE: 'false' });
    failed(result, /answered 503: the server is stopping/);
    assert.equal(requests.length, 1);
    assert.ok(result.seconds < 0.9, `${result.seconds} s`);
  });
  await t.test('a redirect is not followed', async () => {
    failed(await broadcast({}, { status: 302, headers: { Location: `${url}/elsewhere` } }), /answered 302: .*SOCKETIO_SERVER_URL/);
    assert.deepEqual(requests.map(({ path }) => path), ['/broadcast']);
  });
  await t.test('500 with HTML', async () => {
    failed(await broadcast({}, { status: 500, body: '<h1>no</h1>' }), /answered 500: .*SOCKETIO_SERVER_URL/);
    assert.equal(requests.length, 1);
  });
  await t.test('a connection that is cut', async () => failed(await broadcast({}, { reset: true }), /did not answer: cURL error (52|56)/));
  await t.test('no answer in 3 seconds', async () => {
    const result = await broadcast({}, { hang: true });
    failed(result, /did not answer: cURL error 28/);
    assert.ok(result.seconds > 2.9 && result.seconds < 3.8, `${result.seconds} s`);
  });
  await t.test('nobody listens', async () => {
    const closed = net.createServer().listen(0, '127.0.0.1');
    await once(closed, 'listening');
    const nobody = `http://127.0.0.1:${closed.address().port}`;
    await new Promise((done) => closed.close(done));
    failed(await broadcast({ url: nobody }), /did not answer: cURL error 7/, nobody);
  });
  await t.test('a host that drops packets: 1 second to connect', async () => {
    // Linux does not answer connections to a full backlog: as good as a lost packet.
    const full = spawn('python3', ['-c', 'import socket,sys\ns=socket.socket();s.bind(("127.0.0.1",0));s.listen(0)\nc=[]\nfor _ in range(4):\n x=socket.socket();x.setblocking(False);x.connect_ex(s.getsockname());c.append(x)\nprint(s.getsockname()[1],flush=True)\nsys.stdin.read()']);
    const [line] = await once(full.stdout, 'data');
    const result = await broadcast({ url: `http://127.0.0.1:${String(line).trim()}` });
    full.kill();
    assert.ok(result.seconds > 0.9 && result.seconds < 1.8, `${result.seconds} s`);
    assert.match(result.message, /cURL error 28/);
  });
  await t.test('the real daemon names the wrong secret, and the wrong channel', async () => {
    failed(await broadcast({ url: daemonUrl, secret: 'wrong' }), /answered 401: .*SOCKETIO_SECRET/, daemonUrl);
    failed(await broadcast({ url: daemonUrl, channels: ['no channel'] }), /answered 400: .*channel/, daemonUrl);
    assert.equal((await broadcast({ url: daemonUrl })).ok, true);
  });
  await t.test('what phpunit.xml sets goes before .env, and nothing is posted', async () => {
    requests = [];
    const result = await probe({ url, secret: SECRET }, { BROADCAST_CONNECTION: 'null', BROADCAST_DRIVER: 'null' });
    assert.deepEqual([result.ok, result.default, requests.length], [true, null, 0]);
  });
  await t.test('SOCKETIO_SERVER_URL=null, or empty, is the default', async () => {
    for (const SOCKETIO_SERVER_URL of ['null', '']) assert.equal((await probe({ url, secret: SECRET }, { SOCKETIO_SERVER_URL })).configured, 'http://127.0.0.1:3001');
  });
  await t.test('rescue(fn () => broadcast(…)) lets the exception out', async () => {
    failed(await broadcast({ rescue: true }, { status: 400, body: '{"error":"no"}' }), /answered 400: no/);
  });
  server.closeAllConnections();
  server.close();
});

// The last one: it uses up what guests of this address may send.
test('nobody sends without bound', async () => {
  const post = (who, headers) => who.request.post(`${SITE}/chat/${idA}/messages`, { headers, data: { body: 'flood' } });
  const headers = await xsrf(guestA);
  const statuses = [];
  while (statuses.at(-1) !== 429 && statuses.length < 125) statuses.push((await post(guestA, headers)).status());
  assert.deepEqual([...new Set(statuses)], [201, 429]);
  assert.ok(statuses.length <= 2 * 60 + 1, `${statuses.length}`); // twice 60, where a minute ends meanwhile
  assert.equal((await guestA.request.post(`${SITE}/chat/seen`, { headers })).status(), 204);
  assert.equal((await post(office, await xsrf(office))).status(), 201, 'an administrator has a limit of his own');
});

// --- the parts

/** A test that, when it fails, leaves pictures of all open pages. ONLY is a regular expression of names. */
function test(name, body) {
  if (!new RegExp(ONLY).test(name)) return;
  nodeTest(name, async (t) => {
    await body(t).catch(async (failure) => {
      const pages = browser?.contexts().flatMap((context) => context.pages()) ?? [];
      for (const [i, page] of pages.entries()) {
        await page.screenshot({ path: `${ARTIFACTS}/failed-${i}.png` });
        console.log(page.url(), await page.locator('body').innerHTML());
      }
      throw failure;
    });
  });
}

async function startDaemon() {
  const env = { SOCKET_PORT: DAEMON_PORT, SOCKETIO_SECRET: SECRET, CORS_ORIGINS: `${SITE},${MOVED}` };
  daemon = spawn(DAEMON, { env, stdio: ['ignore', 'ignore', 'pipe'] });
  daemon.stderr.setEncoding('utf8').on('data', (text) => writeFileSync(`${ARTIFACTS}/daemon.log`, text, { flag: 'a' }));
  await until(async () => (await fetch(`${daemonUrl}/health`).catch(() => null))?.ok, 'the daemon is up');
}

async function stopDaemon() {
  if (!daemon || daemon.exitCode !== null) return;
  const exited = once(daemon, 'exit');
  daemon.kill('SIGTERM');
  assert.deepEqual(await exited, [0, null]);
}

/** A browser that has been on the page which gives a visitor his chat. */
async function visitor() {
  const guest = await context();
  await guest.request.get(`${SITE}/chat`);
  return guest;
}

async function context() {
  const context = await browser.newContext({ ignoreHTTPSErrors: true, viewport: { width: 760, height: 480 } });
  context.setDefaultTimeout(30_000); // CI's machine may have other things to do
  return context;
}

/** A page, with the frames of all its WebSockets to the daemon. */
function watch(page) {
  const watched = { page, sockets: [], events: [] };
  page.on('websocket', (socket) => {
    if (!socket.url().startsWith(SOCKET.replace('https', 'wss'))) return;
    watched.sockets.push(socket);
    socket.on('framereceived', ({ payload }) => {
      if (String(payload).startsWith('42')) watched.events.push(JSON.parse(payload.slice(2)));
    });
  });
  watched.left = (answer) => watched.events.filter(([event]) => event === answer).length;
  watched.received = (id) => watched.events.filter(([event, message]) => event === 'message.sent' && message.id === id).length;
  return watched;
}

async function open(context, path, components = 1) {
  const watched = watch(await context.newPage());
  await watched.page.goto(SITE + path);
  await joined(watched, components);
  return watched;
}

const joined = ({ page }, components = 1) => page.locator('[data-joined="true"]').nth(components - 1).waitFor();

/** Sends by the page's form, as a person does, and gives the id that Laravel stored it under. */
async function send({ page }, body) {
  const posted = page.waitForResponse((response) => response.request().method() === 'POST' && response.url().endsWith('/messages'));
  await page.locator('input[name=body]').fill(body);
  await page.locator('button:text("Send")').click();
  const response = await posted;
  assert.equal(response.status(), 201);
  return (await response.json()).id;
}

const shows = ({ page }, id) => page.locator(`li[data-id="${id}"]`).waitFor();
const lists = ({ page }, session) => page.locator(`[data-session="${session}"]`).waitFor();

/** Broadcasts an event that the pages ignore and waits until it is there: what was sent before has arrived then, or never will. */
let marks = 0;
async function mark(channel, ...pages) {
  const name = `mark-${++marks}`;
  const response = await fetch(`${daemonUrl}/broadcast`, {
    method: 'POST',
    headers: { Authorization: `Bearer ${SECRET}` },
    body: JSON.stringify({ channel, event: name }),
  });
  assert.equal(response.status, 200);
  for (const { events } of pages) await until(() => events.some(([event]) => event === name), `${name} arrives`);
}

const health = async () => (await fetch(`${daemonUrl}/health`)).json();
const sign = (context, data) => context.request.post(`${SITE}/broadcasting/auth`, { data, headers: { Accept: 'application/json' } });

async function xsrf(context) {
  const cookie = (await context.cookies()).find(({ name }) => name === 'XSRF-TOKEN');
  return { 'X-XSRF-TOKEN': decodeURIComponent(cookie.value) };
}

function rows(columns, where = '1') {
  const php = 'echo json_encode((new PDO("sqlite:".$argv[1]))->query($argv[2])->fetchAll(PDO::FETCH_ASSOC));';
  return JSON.parse(execFileSync('php', ['-r', php, `${APP}/database/database.sqlite`, `select ${columns} from messages where ${where} order by id`]));
}

/** How many entries of Laravel's log have the text. */
const logged = (text) => log().split(/^(?=\[\d{4}-)/m).filter((entry) => entry.includes(text)).length;
const log = () => readFileSync(`${APP}/storage/logs/laravel.log`, { encoding: 'utf8', flag: 'a+' });

/** probe.php, which must not block this process: the fake daemon that it talks to is in it. */
async function probe(input, env = {}) {
  const [command, ...first] = PHP.split(' ');
  const php = spawn(command, [...first, `${PHP_APP}/probe.php`], { env: { ...process.env, ...env }, stdio: ['pipe', 'pipe', 'inherit'] });
  php.stdin.end(JSON.stringify(input));
  let output = '';
  for await (const chunk of php.stdout) output += chunk;
  return JSON.parse(output);
}

async function until(condition, what) {
  const deadline = Date.now() + 30_000;
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, `in 30 s: ${what}`);
    await new Promise((done) => setTimeout(done, 25));
  }
}
