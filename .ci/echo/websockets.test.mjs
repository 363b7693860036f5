// Networks in which a WebSocket fails, and restarts, in which all do: .laravel/echo in Node. FILE is the file to test.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import http from 'node:http';
import net from 'node:net';
import { describe, test } from 'node:test';
import { proxy, site, until } from './parts.mjs';

const { default: Pusher } = await import(process.env.FILE);
const { daemon, open, listen } = site(Pusher);

describe('6: WebSockets that open and pass nothing', () => {
  for (const eats of ['everything', 'what the page sends']) {
    test(`a proxy eats ${eats}: it polls within 30 s`, { timeout: 60_000 }, async () => {
      const { seen, host, stop } = await proxy(daemon.port, eats);
      const page = open({ host });
      listen(page, 'private-a');
      const start = performance.now();
      await page.heard.next('in', 30_000);
      assert.ok(performance.now() - start < 30_000);
      assert.equal(page.socket.io.engine.transport.name, 'polling');
      assert.ok(seen.webSockets >= 1 && seen.polls > 1);
      stop();
    });
  }

  test('a WebSocket that is refused, as by a proxy that strips its headers: it polls at once', async () => {
    const server = http.createServer((request, response) => {
      const up = http.request({ port: daemon.port, path: request.url, method: request.method, headers: request.headers }, (answer) => answer.pipe(response.writeHead(answer.statusCode, answer.headers)));
      request.pipe(up.on('error', () => response.destroy()));
    });
    server.on('upgrade', (_, socket) => socket.end('HTTP/1.1 400 Bad Request\r\n\r\n'));
    await once(server.listen(0, '127.0.0.1'), 'listening');
    const page = open({ host: `http://127.0.0.1:${server.address().port}` });
    listen(page, 'private-a');
    await page.heard.next('in', 3000);
    server.close();
    server.closeAllConnections();
  });

  test('a restart, with 502 for 3 s, makes 500 pages on WebSockets poll 0 times', { timeout: 120_000 }, async () => {
    const seen = { polls: 0, upgrades: 0, refused: 0 };
    let down = false;
    const server = http.createServer((_, response) => {
      seen.polls++;
      response.writeHead(502).end();
    });
    server.on('upgrade', (request, socket, head) => {
      seen.upgrades++;
      socket.on('error', () => {});
      if (down) {
        seen.refused++;
        return socket.end('HTTP/1.1 502 Bad Gateway\r\n\r\n');
      }
      const up = net.connect(daemon.port, '127.0.0.1', () => {
        up.write(`GET ${request.url} HTTP/1.1\r\n${request.rawHeaders.map((text, i) => (i % 2 ? `${text}\r\n` : `${text}: `)).join('')}\r\n`);
        up.write(head);
        up.pipe(socket);
        socket.pipe(up);
      }).on('error', () => socket.destroy());
      socket.on('close', () => up.destroy());
    });
    await once(server.listen(0, '127.0.0.1'), 'listening');
    const host = `http://127.0.0.1:${server.address().port}`;
    const pages = Array.from({ length: 500 }, () => open({ host }));
    for (const page of pages) listen(page, 'private-a');
    const allIn = (times) => until(() => pages.every(({ heard }) => heard.count('in') === times), 'all are in', 60_000);
    await allIn(1);
    const before = seen.upgrades;
    down = true;
    await daemon.stop();
    await until(() => seen.refused >= 1000, 'each was refused twice', 30_000);
    down = false;
    await daemon.start();
    await allIn(2);
    assert.ok(seen.upgrades >= before + 1500);
    assert.equal(seen.polls, 0);
    server.close();
  });
});
