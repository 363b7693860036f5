// Messages a second, and the CPU time of one, through two daemons on one Redis.
//
//   PATH=$PATH:/usr/sbin node bench.mjs [-rounds=5] [-seconds=5] /path/to/old /path/to/new
//
// The binaries take turns, so that what else runs on the machine falls on all of them alike; the medians count.
// Sixteen publishers with the secret, eight on each daemon, post one message after the other to a room that has
// three members on each daemon. A round counts only if each member has heard each message.

import assert from 'node:assert/strict';
import { connect } from 'node:net';
import { basename } from 'node:path';
import { sink } from './clients.mjs';
import { Daemon, Redis, freePort, secret, until } from './processes.mjs';

const publishers = 8; // on each daemon
const members = 3; // on each daemon
const option = (name, otherwise) => Number(process.argv.find((word) => word.startsWith(`-${name}=`))?.split('=')[1] ?? otherwise);
const rounds = option('rounds', 5);
const seconds = option('seconds', 5);
const binaries = process.argv.slice(2).filter((word) => !word.startsWith('-'));
assert.ok(binaries.length > 0, 'name the binaries');

const redis = new Redis(await freePort());
await redis.start();
const results = binaries.map(() => []);
for (let round = 0; round < rounds; round++) {
  for (const [i, binary] of binaries.entries()) results[i].push(await measure(binary));
}
redis.signal('SIGKILL');

const medians = results.map((each) => Object.keys(each[0]).map((key) => median(each.map((result) => result[key]))));
console.log('\n| medians | messages a second | CPU a message, both daemons | CPU a message, Redis | ms from post to answer |\n| --- | --- | --- | --- | --- |');
for (const [i, [rate, daemon, server, latency]] of medians.entries()) {
  console.log(`| ${basename(binaries[i])} | ${rate.toFixed(0)} | ${daemon.toFixed(1)} µs | ${server.toFixed(1)} µs | ${latency.toFixed(2)} |`);
}
if (medians.length === 2) {
  const [rate, daemon] = [0, 1].map((column) => medians[1][column] / medians[0][column]);
  console.log(`\nThe second has ${rate.toFixed(2)} × the messages, at ${daemon.toFixed(2)} × the CPU time.`);
}

async function measure(binary) {
  const daemons = ['a', 'b'].map((name) => new Daemon(name, { REDIS_URL: redis.url(1) }, binary));
  for (const daemon of daemons) await daemon.start();
  await until('both to know of each other', async () => {
    const each = await Promise.all(daemons.map((daemon) => daemon.health()));
    return each.every(({ nodes }) => nodes === 2);
  });
  const sinks = await Promise.all(daemons.flatMap((daemon) => Array.from({ length: members }, () => sink(daemon, 'bench'))));
  const sockets = await Promise.all(daemons.flatMap((daemon) => Array.from({ length: publishers }, () => open(daemon))));
  const body = JSON.stringify({ channel: 'chat-session.bench', event: 'counted', data: { text: 'x'.repeat(200) } });
  const request = `POST /broadcast HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer ${secret}\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n${body}`;
  const run = async (ms) => {
    const end = performance.now() + ms;
    const accepted = await Promise.all(sockets.map(async (socket) => {
      let accepted = 0;
      for (; performance.now() < end; accepted++) await post(socket, request);
      return accepted;
    }));
    return accepted.reduce((x, y) => x + y);
  };
  const warm = await run(1_000);
  const cpu = () => [daemons[0].cpu() + daemons[1].cpu(), redis.cpu()];
  const before = cpu(), began = performance.now();
  const accepted = await run(seconds * 1_000);
  const took = (performance.now() - began) / 1_000, after = cpu();
  await until('all deliveries', () => sinks.every((sink) => sink.events >= warm + accepted));
  assert.ok(sinks.every((sink) => sink.events === warm + accepted), 'a member heard a message twice');
  for (const socket of [...sockets, ...sinks.map((sink) => sink.socket)]) socket.destroy();
  for (const daemon of daemons) await daemon.end('SIGTERM');
  const [daemon, server] = after.map((end, i) => (end - before[i]) / accepted * 1e6);
  const result = { rate: accepted / took, daemon, server, latency: took * 1_000 * publishers * daemons.length / accepted };
  console.log(`${basename(binary)}: ${result.rate.toFixed(0)} messages a second, ${daemon.toFixed(1)} µs in the daemons and ${server.toFixed(1)} µs in Redis each`);
  return result;
}

function open(daemon) {
  return new Promise((resolve, reject) => {
    const socket = connect(daemon.port, '127.0.0.1', () => resolve(socket));
    socket.setNoDelay();
    socket.once('error', reject);
  });
}

// post resolves once the answer to a request is there. (fetch takes more CPU time than the daemons do.)
function post(socket, request) {
  return new Promise((resolve) => {
    let answer = '';
    const read = (data) => {
      answer += data.toString('latin1');
      const [, length] = /\r\nContent-Length: (\d+)\r\n/i.exec(answer) ?? [];
      if (!length || answer.length < answer.indexOf('\r\n\r\n') + 4 + Number(length)) return;
      socket.off('data', read);
      assert.ok(answer.startsWith('HTTP/1.1 200 '), answer);
      resolve();
    };
    socket.on('data', read);
    socket.write(request);
  });
}

function median(numbers) {
  return numbers.toSorted((x, y) => x - y)[numbers.length >> 1];
}
