// What only a browser shows, in Chromium: .laravel/echo as three bundlers have built it, and the connections of .laravel/chat's pages.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync, symlinkSync } from 'node:fs';
import http from 'node:http';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, describe, test } from 'node:test';
import vue from '@vitejs/plugin-vue';
import esbuild from 'esbuild';
import { chromium } from 'playwright-core';
import { build } from 'vite';
import { Daemon, Laravel, proxy, until } from './parts.mjs';

const require = createRequire(import.meta.url);
const here = import.meta.dirname;
const files = join(here, '../../.laravel');
const { FOLDER = join(files, 'echo/resources/js') } = process.env; // of the file that takes pusher-js's place
const app = mkdtempSync(join(tmpdir(), 'echo-'));
const folder = join(app, 'resources/js');
const laravel = new Laravel();
const pages = new Map(); // by path: [type, text], beside what lies in app
const site = http.createServer((request, response) => {
  const { pathname } = new URL(request.url, 'http://localhost');
  if (pathname === '/broadcasting/auth') return void laravel.answer(request, response);
  const [type, text, headers] = pages.get(pathname) ?? (pathname.endsWith('/messages') ? ['application/json', '[]'] : ['text/javascript', existsSync(app + pathname) ? readFileSync(app + pathname) : '']);
  response.writeHead(200, { 'Content-Type': type, ...headers }).end(text);
});
let daemon, chrome, context;

before(async () => {
  await once(site.listen(0, '127.0.0.1'), 'listening');
  await laravel.start();
  const origin = `http://localhost:${site.address().port}`;
  daemon = await new Daemon({ CORS_ORIGINS: origin }).start();
  for (const from of [join(here, 'app'), join(files, 'chat/resources/js'), FOLDER]) cpSync(from, folder, { recursive: true });
  symlinkSync(join(here, 'node_modules'), join(app, 'node_modules'));
  const bundle = (entry, more) => esbuild.build({ absWorkingDir: app, entryPoints: [join('resources/js', entry)], bundle: true, outfile: entry.replace(/\.\w+$/, '.js'), logLevel: 'error', jsx: 'automatic', define: { 'import.meta.env': 'env' }, ...more });
  await bundle('script.js');
  await bundle('hook.tsx');
  process.env.VITE_SOCKETIO_SERVER_URL = daemon.url;
  for (const entry of ['page.js', 'chat-vue.js']) {
    const define = entry === 'chat-vue.js' ? { 'import.meta.env.VITE_SOCKETIO_SERVER_URL': 'env.VITE_SOCKETIO_SERVER_URL' } : {};
    await build({ root: app, logLevel: 'error', configFile: false, publicDir: false, define, plugins: [vue()], build: { outDir: 'vite', emptyOutDir: false, rollupOptions: { input: join(folder, entry), output: { entryFileNames: '[name].js' } } } });
  }
  await new Promise((resolve, reject) => require('webpack')({ mode: 'production', context: app, entry: './resources/js/mix.js', output: { path: app, filename: 'mix.js' } }, (error) => (error ? reject(error) : resolve())));
  // Playwright switches the back/forward cache off, and Debian's Chromium runs as root here.
  chrome = await chromium.launch({ executablePath: '/usr/bin/chromium', args: ['--no-sandbox'], ignoreDefaultArgs: ['--disable-back-forward-cache'] });
});
after(async () => {
  await chrome?.close();
  await daemon?.stop();
  laravel.stop();
  site.close();
  site.closeAllConnections();
  rmSync(app, { recursive: true });
});
afterEach(async () => {
  await context?.close();
  laravel.answers.clear();
  laravel.asked.length = 0;
});

/** A page with the script, and with what Chromium says of it. */
async function open(script, { session = '', headers, path = `/${script}.html`, host = daemon.url } = {}) {
  if (!pages.has(path)) {
    pages.set(path, ['text/html', `<!doctype html><script>env = { VITE_SOCKETIO_SERVER_URL: '${host}' }</script><div id="app" data-session-id="${session}"></div><script type="module" src="/${script}"></script>`, headers]);
  }
  context = context?.pages().length ? context : await chrome.newContext();
  const page = await context.newPage();
  Object.assign(page, { said: '', threw: [] });
  page.on('console', (message) => (page.said += `${message.text()}\n`));
  page.on('pageerror', (error) => page.threw.push(error.message));
  await page.goto(`http://localhost:${site.address().port}${path}`);
  return page;
}
/** Leaves the page, and has it back as it was: Chromium has kept it. */
async function awayAndBack(page) {
  pages.set('/other.html', ['text/html', '<!doctype html>']);
  await page.evaluate(() => addEventListener('pageshow', (event) => (window.persisted = event.persisted)));
  await page.goto(`http://localhost:${site.address().port}/other.html`);
  await page.evaluate(() => void history.back()).catch(() => {});
  await page.waitForFunction(() => window.persisted);
}
const members = async (name) => (await daemon.broadcast(name, 'count')).delivered;
const isIn = (name, ms) => until(async () => (await members(name)) === 1, `one is in ${name}`, ms);

for (const script of ['script.js', 'mix.js', 'vite/page.js']) {
  test(`${script}: window.Pusher subscribes and hears`, async () => {
    const page = await open(script);
    const heard = await page.evaluate(async (host) => {
      const channel = (window.Echo?.connector.pusher ?? new window.Pusher('key', { host })).subscribe('private-built');
      await new Promise((done, fail) => channel.bind('pusher:subscription_succeeded', done).bind('pusher:subscription_error', ({ error }) => fail(new Error(error))));
      window.heard = new Promise((done) => channel.bind('event', done));
    }, daemon.url).then(() => daemon.broadcast('private-built', 'event', { n: 1 })).then(() => page.evaluate(() => window.heard));
    assert.deepEqual(heard, { n: 1 });
  });
}

test('3: callbacks of the application that throw are reported, and stop nothing: not the joins, the other callbacks, or the way back', async () => {
  const page = await open('script.js');
  await page.evaluate((host) => {
    const pusher = window.pusher = new window.Pusher('key', { host });
    window.seen = [];
    const boom = (what) => (error) => {
      window.seen.push(what);
      throw new Error(`of ${what}: ${error?.error.data.code.x}`);
    };
    for (const state of ['state_change', 'connected', 'connecting', 'unavailable', 'error']) pusher.connection.bind(state, boom(state));
    const channel = pusher.subscribe('private-boom');
    for (const event of ['pusher:subscription_succeeded', 'event']) channel.bind(event, boom(event)).bind(event, () => window.seen.push(`${event}, the next`));
    pusher.subscribe('private-calm');
  }, daemon.url);
  await isIn('private-boom');
  await isIn('private-calm');
  await daemon.broadcast('private-boom', 'event');
  await daemon.stop();
  await page.waitForFunction(() => window.pusher.connection.state === 'unavailable', null, { timeout: 30_000 });
  await daemon.start();
  await isIn('private-boom');
  await isIn('private-calm');
  const seen = await page.evaluate(() => window.seen);
  assert.deepEqual(['connected', 'event', 'event, the next', 'pusher:subscription_succeeded, the next', 'unavailable'].filter((what) => !seen.includes(what)), []);
  assert.equal(seen.filter((what) => what === 'connected').length, 2);
  assert.ok(page.threw.length >= 6, `${page.threw}`);
});

test('9: a page from the back/forward cache connects anew, by polling too', async () => {
  const page = await open('script.js');
  await page.evaluate((host) => {
    window.pusher = new window.Pusher('key', { host, socketio: { transports: ['polling'] } });
    window.pusher.subscribe('private-back');
  }, daemon.url);
  await isIn('private-back');
  const id = await page.evaluate(() => window.pusher.connection.socket_id);
  await awayAndBack(page);
  await page.waitForFunction((id) => window.pusher.connection.socket_id && window.pusher.connection.socket_id !== id, id, { timeout: 5000 });
  await page.waitForFunction(() => window.pusher.channel('private-back').subscribed, null, { timeout: 5000 });
});

describe('10: a Content-Security-Policy without the daemon', () => {
  const headers = { 'Content-Security-Policy': "connect-src 'self'" };
  const causes = /nothing answers.*CORS_ORIGINS.*Content-Security-Policy.*connect-src, as https: and as wss:|Does the daemon answer.*CORS_ORIGINS.*Content-Security-Policy.*connect-src, as https: and as wss:/;
  test('the console names the three causes that look alike', async () => {
    const page = await open('script.js', { headers, path: '/csp.html' });
    await page.evaluate((host) => void new window.Pusher('key', { host }), daemon.url);
    await until(() => causes.test(page.said), 'told', 30_000);
  });
  test('so does the hook', async () => {
    const page = await open('hook.js', { headers, path: '/hook-csp.html', session: 'csp' });
    await page.getByText(causes).waitFor();
  });
});

describe('the pages of .laravel/chat', () => {
  const plain = (host, session) => readFileSync(join(files, 'chat/resources/views/chat.blade.php'), 'utf8')
    .replace('@json($sessionId)', JSON.stringify(session)).replace(/@json\(config\([^)]*\)\)/, JSON.stringify(host)).replace('@json(csrf_token())', '""');

  test('6: where a WebSocket opens and passes nothing they poll, within 30 s', async () => {
    pages.set('/js/socket.io.esm.min.js', ['text/javascript', readFileSync(join(here, 'node_modules/socket.io-client/dist/socket.io.esm.min.js'))]);
    const proxies = [];
    for (const eats of ['everything', 'what the page sends']) {
      const { host, seen, stop } = await proxy(daemon.port, eats);
      proxies.push({ seen, stop });
      const key = eats.length;
      pages.set(`/plain-${key}`, ['text/html', plain(host, `plain-${key}`)]);
      await open('plain', { path: `/plain-${key}` });
      await open('hook.js', { path: `/hook-${key}`, session: `hook-${key}`, host });
      await open('vite/chat-vue.js', { path: `/vue-${key}`, session: `vue-${key}`, host });
    }
    const start = performance.now();
    for (const key of ['everything', 'what the page sends'].map(({ length }) => length)) {
      for (const kind of ['plain', 'hook', 'vue']) await isIn(`chat-session.${kind}-${key}`, 30_000 - (performance.now() - start));
    }
    for (const { seen, stop } of proxies) {
      assert.ok(seen.webSockets >= 3 && seen.polls > 3);
      stop();
    }
  });

  test('9: the hook, from the back/forward cache', async () => {
    const page = await open('hook.js', { path: '/hook-back', session: 'back' });
    await isIn('chat-session.back');
    const id = await page.locator('p').getAttribute('data-socket');
    await awayAndBack(page);
    await page.waitForFunction((id) => (({ joined, socket }) => joined === 'true' && socket !== id)(document.querySelector('p').dataset), id, { timeout: 5000 });
  });

  test('11: the hook tells of a session that has expired', async () => {
    const page = await open('hook.js', { path: '/hook-expired', session: 'expired' });
    await isIn('chat-session.expired');
    laravel.answers.set('chat-session.expired', [403]);
    await daemon.restart();
    await page.getByText('The session has expired, or a right was taken away (403). Reload the page.').waitFor();
    assert.equal(laravel.askedFor('chat-session.expired').length, 2);
  });
});
