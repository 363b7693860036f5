// The processes that the test starts: each on a free loopback port, each ended by its own id.

import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { connect, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

const children = new Set();
process.on('exit', () => children.forEach((child) => child.kill('SIGKILL')));

export const secret = 'redis-test-secret-0123456789abcdef';

// Process is a program that can be started again, as it was.
class Process {
  log = '';

  spawn(command, args, env = {}) {
    const child = spawn(command, args, { env: { PATH: process.env.PATH, ...env }, stdio: ['ignore', 'pipe', 'pipe'] });
    this.child = child;
    children.add(child);
    this.exited = new Promise((resolve) => child.once('exit', (code, signal) => {
      children.delete(child);
      resolve(code ?? signal);
    }));
    child.once('error', (error) => { throw error; });
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (data) => { this.log += data; });
  }

  signal(name) {
    this.child.kill(name);
  }

  // end resolves to the exit status, or to the signal that it took.
  async end(name) {
    this.signal(name);
    return this.exited;
  }

  // cpu is what the process has used since it began, in seconds (proc(5): ticks of 10 ms).
  cpu() {
    const fields = readFileSync(`/proc/${this.child.pid}/stat`, 'utf8').split(') ')[1].split(' ');
    return (Number(fields[11]) + Number(fields[12])) / 100;
  }
}

export class Redis extends Process {
  password = 'pa ss%/@word'; // everything that has to be escaped in a URL

  // The lines come behind the ones that redis.conf needs here.
  constructor(port, { tls = false, lines = [] } = {}) {
    super();
    this.port = port;
    this.tls = tls;
    this.lines = lines;
    this.dir = mkdtempSync(join(tmpdir(), 'redis-'));
    this.certificate = join(this.dir, 'cert.pem');
  }

  url(database) {
    return `${this.tls ? 'rediss' : 'redis'}://:${encodeURIComponent(this.password)}@127.0.0.1:${this.port}/${database}`;
  }

  // start resolves to the moment at which it answers.
  async start() {
    const key = join(this.dir, 'key.pem');
    if (this.tls) {
      execFileSync('openssl', ['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '1',
        '-keyout', key, '-out', this.certificate, '-subj', '/CN=redis', '-addext', 'subjectAltName=IP:127.0.0.1'], { stdio: 'ignore' });
    }
    const conf = join(this.dir, 'redis.conf');
    writeFileSync(conf, [
      'bind 127.0.0.1', 'save ""', `dir ${this.dir}`, `requirepass ${JSON.stringify(this.password)}`, `masterauth ${JSON.stringify(this.password)}`,
      ...(this.tls
        ? ['port 0', `tls-port ${this.port}`, `tls-cert-file ${this.certificate}`, `tls-key-file ${key}`, `tls-ca-cert-file ${this.certificate}`, 'tls-auth-clients no']
        : [`port ${this.port}`]),
      ...this.lines,
    ].join('\n'));
    const from = this.log.length;
    this.spawn('redis-server', [conf]);
    await until('redis to answer', () => this.tls ? this.log.includes('Ready to accept connections', from) : this.answers());
    return performance.now();
  }

  answers() {
    return new Promise((resolve) => {
      const socket = connect(this.port, '127.0.0.1', () => socket.write('PING\r\n'));
      socket.once('data', () => socket.destroy());
      socket.once('error', () => {});
      socket.once('close', () => resolve(socket.bytesRead > 0));
    });
  }

  // command has the administrator send one command, and resolves to Redis's answer as it was sent.
  command(...words) {
    const encode = (words) => `*${words.length}\r\n${words.map((word) => `$${Buffer.byteLength(`${word}`)}\r\n${word}\r\n`).join('')}`;
    return new Promise((resolve, reject) => {
      const socket = connect(this.port, '127.0.0.1', () => socket.write(encode(['AUTH', this.password]) + encode(words) + encode(['QUIT'])));
      let answer = '';
      socket.on('data', (data) => { answer += data; });
      socket.once('error', reject);
      socket.once('close', () => {
        answer = answer.replace('+OK\r\n', ''); // to AUTH
        if (answer.startsWith('-') || answer === '') reject(new Error(`${words.join(' ')}: ${answer}`));
        else resolve(answer);
      });
    });
  }
}

// Link is the network between a daemon and Redis. What is held goes on when it is let through again, as
// packets do that are sent again.
export class Link {
  connections = new Set();
  cutOff = false;
  through = { up: true, down: true }; // to Redis, to the daemon
  rate = Infinity; // bytes a second to the daemon
  forgets = Infinity; // ms of silence after which a connection is forgotten: then all that is sent on it gets lost, without a word

  // listen resolves once there is a port to reach Redis at.
  async listen(redis) {
    this.target = redis.port; // of the connections that are to come
    this.server = createServer((socket) => this.accept(socket)).listen(0, '127.0.0.1');
    await once(this.server, 'listening');
    this.port = this.server.address().port;
  }

  accept(socket) {
    if (this.cutOff) return void socket.resetAndDestroy();
    const connection = { daemon: socket, redis: connect(this.target, '127.0.0.1'), held: { up: [], down: [] }, at: performance.now() };
    this.connections.add(connection);
    for (const [direction, from, to] of [['up', socket, connection.redis], ['down', connection.redis, socket]]) {
      const pass = (send) => {
        const now = performance.now();
        if (now - connection.at > this.forgets) return;
        connection.at = now;
        if (this.through[direction]) send();
        else connection.held[direction].push(send);
      };
      let free = 0; // the moment from which there is room for more
      from.on('data', (data) => pass(() => {
        if (direction === 'up' || this.rate === Infinity) return to.write(data);
        free = Math.max(free, performance.now()) + data.length / this.rate * 1_000;
        setTimeout(() => to.write(data), free - performance.now());
      }));
      from.on('error', () => {}); // a close comes, too
      from.on('close', () => pass(() => {
        to.end();
        this.connections.delete(connection);
      }));
    }
  }

  // cut ends all connections at once, and the ones to come.
  cut() {
    this.cutOff = true;
    this.reset();
  }

  reset() {
    for (const { daemon, redis } of this.connections) for (const socket of [daemon, redis]) socket.resetAndDestroy();
  }

  hold(...directions) {
    for (const direction of directions) this.through[direction] = false;
  }

  heal() {
    this.cutOff = false;
    this.rate = Infinity;
    for (const direction of ['up', 'down']) {
      this.through[direction] = true;
      for (const { held } of this.connections) for (const send of held[direction].splice(0)) send();
    }
  }

  close() {
    this.server.close();
    this.reset();
  }
}

export class Daemon extends Process {
  constructor(name, env = {}, binary = process.env.SOCKETIO) {
    super();
    this.name = name;
    this.binary = binary;
    this.env = { SOCKETIO_SECRET: secret, SOCKET_PORT: '0', ...env };
  }

  // start resolves once it listens, with or without Redis.
  async start() {
    const from = this.log.length;
    this.spawn(this.binary, [], this.env);
    const listening = () => /msg=listening addr="?127\.0\.0\.1:(\d+)/.exec(this.log.slice(from));
    await until(`daemon ${this.name} to listen`, () => listening() || this.child.exitCode !== null);
    assert.ok(listening(), this.log.slice(from));
    this.port = listening()[1];
    this.url = `http://127.0.0.1:${this.port}`;
  }

  async health() {
    const response = await fetch(`${this.url}/health`);
    return { code: response.status, ...await response.json() };
  }

  // broadcast posts once, and resolves to what was answered; status 0: nothing was, so nobody knows.
  async broadcast(request) {
    const began = performance.now();
    try {
      const response = await fetch(`${this.url}/broadcast`, {
        method: 'POST',
        headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${secret}` },
        body: JSON.stringify(request),
      });
      const body = await response.json();
      return { ...body, status: response.status, retryAfter: response.headers.get('Retry-After'), ms: performance.now() - began };
    } catch (error) {
      return { status: 0, error: String(error.cause ?? error), ms: performance.now() - began };
    }
  }
}

// Nginx spreads clients over the daemons by their address, as the README has it.
export class Nginx extends Process {
  constructor(port) {
    super();
    this.port = port;
  }

  async start(daemons) {
    const dir = mkdtempSync(join(tmpdir(), 'nginx-'));
    const temporary = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map((name) => `${name}_temp_path ${dir}/${name};`);
    writeFileSync(join(dir, 'nginx.conf'), `
      daemon off;
      master_process off;
      pid ${dir}/pid;
      error_log ${dir}/error.log;
      events { worker_connections 8192; }
      http {
        access_log off;
        ${temporary.join('\n        ')}
        map $http_upgrade $connection_upgrade { default upgrade; '' ''; }
        upstream socketio {
          hash $remote_addr consistent;
          ${daemons.map((daemon) => `server 127.0.0.1:${daemon.port} fail_timeout=1s;`).join('\n          ')}
          keepalive 64;
        }
        server {
          listen 127.0.0.1:${this.port} backlog=4096;
          location /socket.io/ {
            proxy_pass http://socketio;
            proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_read_timeout 60s;
            proxy_buffering off;
          }
        }
      }`);
    this.spawn('nginx', ['-p', dir, '-c', join(dir, 'nginx.conf')]);
    await until('nginx to listen', () => new Promise((resolve) => {
      const socket = connect(this.port, '127.0.0.1', () => { socket.destroy(); resolve(true); });
      socket.once('error', () => resolve(false));
    }));
  }
}

// until looks every few milliseconds, and rejects when it has not come about within the deadline.
export async function until(what, comesAbout, deadline = 10_000) {
  const end = performance.now() + deadline;
  for (let found; ; await pause(5)) {
    if (found = await comesAbout()) return found;
    assert.ok(performance.now() < end, `${what}: not within ${deadline} ms`);
  }
}

export function pause(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

const given = new Set();

// freePort is outside the range of outgoing connections (32768 and up), so that it stays free while its
// process is away.
export async function freePort() {
  for (;;) {
    const port = 20_000 + Math.floor(Math.random() * 10_000);
    if (given.has(port)) continue;
    given.add(port);
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
