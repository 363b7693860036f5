// What the tests of .laravel/echo share: the daemon, a Laravel of a few lines, and callbacks that can be waited for.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createHmac } from 'node:crypto';
import { once } from 'node:events';
import http from 'node:http';
import net from 'node:net';
import { after, afterEach, before } from 'node:test';

export const secret = process.env.SECRET ?? 'a-secret-for-this-run-only-01234';

const running = new Set(); // daemons, which end with the test
process.on('exit', () => running.forEach((daemon) => daemon.kill('SIGKILL')));

export const sign = (id, channel) =>
  createHmac('sha256', secret).update(`${id}:${channel.replace(/^private-(?=chat-session\.|admin-chat$)/, '')}`).digest('hex');

/** The daemon, in secured mode, on a port that stays the same over restarts. */
export class Daemon {
  constructor(env = {}, port = 0) { Object.assign(this, { env, port, log: '' }); }
  get url() { return `http://127.0.0.1:${this.port}`; }
  async start() {
    const env = { PATH: process.env.PATH, SOCKET_PORT: String(this.port), SOCKETIO_SECRET: secret, ...this.env };
    this.log = '';
    this.process = spawn(process.env.DAEMON, { env, stdio: ['ignore', 'ignore', 'pipe'] });
    this.process.stderr.setEncoding('utf8').on('data', (text) => (this.log += text));
    this.exited = once(this.process, 'exit');
    running.add(this.process);
    await until(() => this.log.includes('msg=listening'), 'the daemon listens');
    this.port = Number(/.*msg=listening addr=\S+:(\d+)/s.exec(this.log)[1]);
    return this;
  }
  async stop() {
    this.process.kill('SIGTERM');
    await this.exited;
  }
  async restart() {
    await this.stop();
    return this.start();
  }
  async broadcast(channel, event, data, more) {
    const headers = { Authorization: `Bearer ${secret}` };
    const response = await fetch(`${this.url}/broadcast`, { method: 'POST', headers, body: JSON.stringify({ channel, event, data, ...more }) });
    assert.equal(response.status, 200, await response.clone().text());
    return response.json();
  }
  async health() { return (await fetch(`${this.url}/health`)).json(); }
}

/** /broadcasting/auth. `asked` is what it was asked, a row for each request; `answers` are statuses that a channel gets in place of a signature. */
export class Laravel {
  constructor({ knowsMany = true } = {}) {
    Object.assign(this, { asked: [], answers: new Map(), status: 200, knowsMany, requests: 0 });
    this.server = http.createServer((request, response) => void this.answer(request, response));
  }
  get endpoint() { return `http://127.0.0.1:${this.server.address().port}/broadcasting/auth`; }
  async start() {
    await once(this.server.listen(0, '127.0.0.1'), 'listening');
    return this;
  }
  stop() {
    this.server.close();
    this.server.closeAllConnections();
  }
  askedFor(name) { return this.asked.filter(({ names }) => names.includes(name)); }
  async answer(request, response) {
    let body = '';
    for await (const chunk of request) body += chunk;
    this.requests++;
    const fields = request.headers['content-type']?.includes('json') ? new Map(Object.entries(JSON.parse(body))) : new URLSearchParams(body);
    const many = fields.getAll?.('channel_names[]') ?? [];
    const names = many.length ? many : [fields.get('channel_name')];
    const id = fields.get('socket_id');
    this.asked.push({ ...Object.fromEntries(fields), names, many: many.length > 0, headers: request.headers, at: performance.now() });
    const origin = { 'Access-Control-Allow-Origin': request.headers.origin ?? '*', 'Access-Control-Allow-Headers': '*' };
    const end = (status, answer) => response.writeHead(status, { ...origin, 'Content-Type': 'application/json' }).end(JSON.stringify(answer));
    if (request.method === 'OPTIONS') return end(204);
    if (this.status !== 200) return end(this.status);
    if (many.length && !this.knowsMany) return end(403); // a broadcaster that looks for channel_name alone
    const statuses = names.map((name) => this.answers.get(name)?.shift() ?? 200);
    const away = statuses.find((status) => status >= 419);
    if (away || (!many.length && statuses[0] !== 200)) return end(away ?? statuses[0]);
    const signed = names.map((name, n) => [name, statuses[n] === 200 ? sign(id, name) : null]);
    end(200, { auth: many.length ? Object.fromEntries(signed) : signed[0][1] });
  }
}

/** What a test file needs whose pages are `new Pusher`: they are closed after each test. */
export function site(Pusher) {
  const daemon = new Daemon();
  const laravel = new Laravel();
  const pushers = [];
  const open = (options) => {
    const pusher = new Pusher('key', { host: daemon.url, authEndpoint: laravel.endpoint, cluster: 'mt1', ...options });
    pushers.push(pusher);
    return Object.assign(pusher, { heard: hears() });
  };
  const listen = (pusher, name) =>
    pusher.subscribe(name).bind('pusher:subscription_succeeded', () => pusher.heard('in')(name)).bind('pusher:subscription_error', (error) => pusher.heard('no')({ name, ...error }));
  const close = () => pushers.splice(0).forEach((pusher) => pusher.disconnect());
  before(async () => {
    await daemon.start();
    await laravel.start();
  });
  after(async () => {
    close();
    await daemon.stop();
    laravel.stop();
  });
  afterEach(() => {
    close();
    Object.assign(laravel, { asked: [], requests: 0, status: 200, knowsMany: true });
    laravel.answers.clear();
  });
  return { daemon, laravel, pushers, open, listen };
}

/** A proxy on the way: it passes what the daemon and the page send, but what `eats` says of a WebSocket. */
export async function proxy(port, eats) {
  const seen = { polls: 0, webSockets: 0 };
  const server = net.createServer((page) => {
    const up = net.connect(port, '127.0.0.1');
    let webSocket = false;
    page.once('data', (head) => {
      webSocket = /^upgrade: websocket/im.test(head);
      seen[webSocket ? 'webSockets' : 'polls']++;
      up.write(head);
      page.on('data', (data) => {
        if (!webSocket) {
          seen.polls += /^(GET|POST) /.test(data);
          up.write(data);
        } else if (eats === 'nothing') up.write(data);
      });
    });
    let answered = false;
    up.on('data', (data) => {
      const head = !answered && data.indexOf('\r\n\r\n') + 4;
      answered = true;
      if (!webSocket || eats !== 'everything') page.write(data);
      else if (head) page.write(data.subarray(0, head)); // 101, and nothing after it
    });
    for (const [a, b] of [[page, up], [up, page]]) a.on('close', () => b.destroy()).on('error', () => {});
  });
  await once(server.listen(0, '127.0.0.1'), 'listening');
  return { seen, host: `http://127.0.0.1:${server.address().port}`, stop: () => server.close() };
}

/** heard('x') is a callback, heard.next('x') what it was called with, in order. */
export function hears() {
  const all = new Map();
  const of = (name) => all.get(name) ?? all.set(name, []).get(name);
  const heard = (name) => (data) => of(name).push(data);
  heard.next = async (name, ms) => (await until(() => of(name).length, name, ms), of(name).shift());
  heard.count = (name) => of(name).length;
  heard.forget = () => all.clear();
  return heard;
}

export async function until(condition, what, ms = 20_000) {
  const deadline = performance.now() + ms;
  while (!(await condition())) {
    assert.ok(performance.now() < deadline, `in ${ms / 1000} s: ${what}`);
    await new Promise((done) => setTimeout(done, 10));
  }
}
