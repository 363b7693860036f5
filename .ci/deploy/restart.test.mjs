// What clients and Laravel live through when the daemon dies, hangs, or is restarted.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { once } from 'node:events';
import { after, before, describe, test } from 'node:test';
import { setInterval as ticks, setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { Worker } from 'node:worker_threads';
import { broadcast, connect, disconnectAll, health, until } from './chat.mjs';

const systemctl = (...args) => promisify(execFile)(new URL('./debian', import.meta.url).pathname, ['in', process.env.DEPLOY_VPS, 'systemctl', ...args]);
const seconds = (ms) => `${(ms / 1000).toFixed(2)} s`;
const ways = { websocket: ['websocket', 'polling'], polling: ['polling'], upgrade: ['polling', 'websocket'] };

describe('the daemon ends without a word, and systemd starts it again', () => {
  const clients = [];
  before(async () => {
    for (const [session, transports] of Object.entries(ways)) clients.push(connect({ session, transports }));
    await until(() => clients.every((c) => c.joinedAt.length === 1), 5000, 'three clients joined');
  });
  after(disconnectAll);

  // A stopped process is found out by the watchdog: WatchdogSec=30 after its last word, then RestartSec=1.
  for (const [signal, deadline] of [['KILL', 3000], ['STOP', 35_000]]) {
    test(`kill -${signal}: serving again within ${seconds(deadline)}, and the clients back by themselves`, async (t) => {
      const joins = clients[0].joinedAt.length;
      const start = Date.now();
      await systemctl('kill', '--signal', signal, 'socketio');
      for await (const _ of ticks(20)) {
        if ((await broadcast({ channel: 'admin-chat', event: 'message.sent', data: {} })).status === 200) break;
        assert.ok(Date.now() - start < deadline + 3000, 'not serving');
      }
      const served = Date.now() - start;
      await until(() => clients.every((c) => c.joinedAt.length > joins), 15_000, 'the clients are back');
      t.diagnostic(`serving again after ${seconds(served)}, the last client back after ${seconds(Date.now() - start)}`);
      assert.ok(served < deadline);

      const channels = clients.map((c) => `chat-session.${c.session}`);
      const n = `after ${signal}`;
      assert.equal((await broadcast({ channels, event: 'message.sent', data: { n } })).delivered, clients.length);
      await until(() => clients.every((c) => c.got.includes(n)), 5000, 'each receives again');
      assert.ok(clients.every((c) => !c.leftFor.includes('io server disconnect')));
    });
  }
});

// crowd is ten offices, in sessions of ten: of five clients three come by WebSocket, one by polling, and one upgrades.
async function crowd(t, size, subnet, keepAlive) {
  const clients = Array.from({ length: size }, (_, i) => connect({
    session: `room-${Math.floor(i / 10)}`,
    from: `${subnet}.${1 + (i % 10)}`,
    keepAlive,
    transports: i % 5 < 3 ? ways.websocket : i % 5 < 4 ? ways.polling : ways.upgrade,
  }));
  t.after(disconnectAll);
  await until(() => clients.every((c) => c.joinedAt.length === 1), 30_000, `${size} clients joined`);
  return clients;
}

test('300 people behind one address, who all load the page at once, get in at the first attempt', async (t) => {
  const start = Date.now();
  const clients = Array.from({ length: 300 }, (_, i) => connect({ session: `office-${i}`, from: '127.0.3.1', transports: ways.upgrade }));
  t.after(disconnectAll);
  await until(() => clients.every((c) => c.joinedAt.length === 1 && c.socket.io.engine.transport.name === 'websocket'), 30_000, 'all joined and upgraded');
  t.diagnostic(`the last is in after ${seconds(Date.now() - start)}`);
  assert.deepEqual(clients.flatMap((c) => [...c.errors, ...c.leftFor]), []);
});

const size = Number(process.env.DEPLOY_CROWD ?? 500);

test(`systemctl restart nginx three times with ${size} clients: all back within 10 s, all upgraded, and the memory as before`, async (t) => {
  // Without keep-alive: when a kept connection is cut, node's XMLHttpRequest (xmlhttprequest-ssl) makes its poll anew and never
  // sends it, so that the client hangs until its ping timeout. Browsers have their own.
  const clients = await crowd(t, size, '127.0.2', false);
  await settled(size);
  const before = (await health()).memory;
  // A WebSocket is cut. A polling client may ask again within its session, and then has missed nothing.
  const back = (c, i, round) => (i % 5 === 3 ? c.joinedAt.length > c.leftFor.length : c.joinedAt.length > round);
  for (let round = 1; round <= 3; round++) {
    const start = Date.now();
    await systemctl('restart', 'nginx');
    const restarted = Date.now() - start;
    try {
      await until(() => clients.every((c, i) => back(c, i, round)), 10_000, 'all back and joined');
    } finally {
      const late = clients.filter((c, i) => !back(c, i, round)).length;
      t.diagnostic(`systemctl restart nginx took ${seconds(restarted)}; ${late ? `${late} are not back` : 'the last client is back'} ${seconds(Date.now() - start - restarted)} after it`);
    }
    const channels = Array.from({ length: size / 10 }, (_, i) => `chat-session.room-${i}`);
    await broadcast({ channels, event: 'message.sent', data: { n: round } });
    await until(() => clients.every((c) => c.got.at(-1) === round && c.got.length === round), 10_000, 'all get a message, once');
    await settled(size); // the sessions that nginx has cut are gone
    await until(() => clients.every((c, i) => c.socket.io.engine.transport.name === (i % 5 === 3 ? 'polling' : 'websocket')), 5000, 'all upgraded');
  }
  // Sessions that are kept would be 7 MB for 500 in each round.
  let memory;
  for (let left = 100; left > 0; left--) {
    ({ memory } = await health());
    if (memory <= before + 4e6) break;
    await sleep(100);
  }
  t.diagnostic(`the daemon's memory: ${(before / 1e6).toFixed(1)} MB before, ${(memory / 1e6).toFixed(1)} MB after`);
  assert.ok(memory <= before + 4e6);
});

// settled waits until the daemon has so many connections, and no more.
async function settled(connections) {
  const deadline = Date.now() + 60_000; // a polling session that nobody polls lives for 45 s
  for await (const _ of ticks(100)) {
    const now = (await health()).connections;
    if (now === connections) return;
    assert.ok(Date.now() < deadline, `${now} connections, want ${connections}`);
  }
}

test('systemctl restart with 500 clients: all back within 10 s, and no accepted message lost', async (t) => {
  const clients = await crowd(t, 500, '127.0.1');

  const publisher = new Worker(new URL('./publish.mjs', import.meta.url));
  t.after(() => publisher.terminate());
  await sleep(2000);
  const start = Date.now();
  await systemctl('restart', 'socketio');
  const restarted = Date.now() - start;
  try {
    await until(() => clients.every((c) => c.joinedAt.length > 1), 10_000, 'all back and joined');
  } finally {
    const back = clients.map((c) => (c.joinedAt[1] ?? Infinity) - start).sort((a, b) => a - b);
    t.diagnostic(`systemctl restart took ${seconds(restarted)}; clients back: first ${seconds(back[0])}, median ${seconds(back[249])}, last ${seconds(back[499])}`);
  }
  await sleep(1000);
  publisher.postMessage('stop');
  const [answers] = await once(publisher, 'message');

  // What the daemon accepted came to as many clients as it said, to each once; what it refused came to nobody.
  const last = answers.filter((a) => a.status === 200).at(-1);
  await until(() => clients.reduce((sum, c) => sum + c.got.includes(last.n), 0) === last.delivered, 5000, 'the last message has arrived');
  const arrived = new Map(answers.map((a) => [a.n, 0]));
  for (const c of clients) {
    for (const n of c.got) arrived.set(n, arrived.get(n) + 1);
    assert.equal(new Set(c.got).size, c.got.length, 'nobody gets a message twice');
  }
  const tally = (list) => JSON.stringify(list.reduce((counts, x) => ({ ...counts, [x]: (counts[x] ?? 0) + 1 }), {}));
  const refused = answers.filter((a) => a.status !== 200).map((a) => a.at);
  t.diagnostic(`/broadcast refused for ${seconds(Math.max(...refused) - Math.min(...refused))}`);
  t.diagnostic(`${answers.length} messages posted: ${tally(answers.map((a) => a.status))}, ${[...arrived.values()].reduce((a, b) => a + b)} deliveries; clients left for ${tally(clients.flatMap((c) => c.leftFor))}`);
  for (const a of answers) {
    // The kernel resets what waits to be accepted when the port closes: refused, too, if nobody got it.
    assert.ok([200, 503, 'ECONNREFUSED', 'ECONNRESET'].includes(a.status), `message ${a.n} was neither accepted nor refused: ${a.status}`);
    assert.equal(arrived.get(a.n), a.delivered ?? 0, `clients that got message ${a.n} (${a.status}, ${a.at - start} ms after the restart), against delivered`);
  }
  assert.ok(clients.every((c) => !c.leftFor.includes('io server disconnect')));
});
