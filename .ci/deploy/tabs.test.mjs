// A browser in which eight tabs of one site poll, as where WebSockets are blocked. By HTTP/1.1 it has six connections to a host,
// and each poll keeps one.
import assert from 'node:assert/strict';
import { after, before, test } from 'node:test';
import { chromium } from 'playwright-core';
import { broadcast, sign } from './chat.mjs';

const site = `https://${process.env.DEPLOY_DOMAIN}/`;
const tabs = Number(process.env.DEPLOY_TABS ?? 8);
const path = new URL('./node_modules/socket.io-client/dist/socket.io.min.js', import.meta.url).pathname;
let browser, context;

before(async () => {
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    args: ['--no-sandbox', `--host-resolver-rules=MAP ${process.env.DEPLOY_DOMAIN} 127.0.0.1`],
  });
  context = await browser.newContext({ ignoreHTTPSErrors: true });
  await context.exposeFunction('sign', sign);
  await context.route(site, (route) => route.fulfill({ contentType: 'text/html', body: '<!doctype html>' })); // what Laravel would answer
});
after(() => browser?.close());

// open is a tab that joins a session; it resolves to whether that was done in 10 s.
async function open(n) {
  const page = await context.newPage();
  await page.goto(site);
  await page.addScriptTag({ path });
  const joined = await page.evaluate((sessionId) => new Promise((resolve) => {
    window.got = new Promise((heard) => {
      const socket = io({ transports: ['polling'] });
      socket.on('connect', async () => socket.emit('join-session', { sessionId, auth: await sign(socket.id, `chat-session.${sessionId}`) }));
      socket.on('joined-session', () => resolve(true));
      socket.on('message.sent', heard);
    });
    setTimeout(resolve, 10_000, false);
  }), `tab-${n}`);
  return { page, joined };
}

test(`${tabs} tabs that poll: each gets its message, and the first one's own request is answered`, async (t) => {
  const all = [];
  for (let n = 1; n <= tabs; n++) all.push(await open(n));
  const channels = all.map((_, i) => `chat-session.tab-${i + 1}`);
  const start = Date.now();
  const fetched = await all[0].page.evaluate(() => fetch('/health', { signal: AbortSignal.timeout(5000) }).then((r) => r.status, String));
  t.diagnostic(`the first tab's fetch: ${fetched}, after ${Date.now() - start} ms`);
  await broadcast({ channels, event: 'message.sent', data: { n: 1 } });
  const heard = await Promise.all(all.map(({ page }) => page.evaluate(() => Promise.race([got, new Promise((done) => setTimeout(done, 5000))]))));
  const protocols = await all[0].page.evaluate(() => performance.getEntriesByType('resource').map((entry) => entry.nextHopProtocol));
  t.diagnostic(`joined: ${all.filter((tab) => tab.joined).length} of ${tabs}; have the message: ${heard.filter(Boolean).length}; by ${[...new Set(protocols)]}`);
  assert.deepEqual(heard, all.map(() => ({ n: 1 })));
  assert.equal(fetched, 200);
});
