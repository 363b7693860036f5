// What the tests beside this file share: official clients that come through nginx as browsers do, and
// Laravel's two parts, the signature of a join and the POST to /broadcast. `run` sets the environment.
import { createHmac } from 'node:crypto';
import { EventEmitter, once } from 'node:events';
import { readFileSync } from 'node:fs';
import http from 'node:http';
import https from 'node:https';
import { createSecureContext } from 'node:tls';
import { io } from 'socket.io-client';

const { DEPLOY_DOMAIN: domain, DEPLOY_SECRET: secret, DEPLOY_DAEMON: daemon, DEPLOY_CERTIFICATE: certificate } = process.env;
if (!domain || !secret || !daemon || !certificate) throw new Error('start these tests by .ci/deploy/run');

// The domain is this machine, reached from any of its loopback addresses: nginx takes each for another visitor.
const here = { address: '127.0.0.1', family: 4 };
const lookup = (_, { all }, done) => (all ? done(null, [here]) : done(null, here.address, here.family));
// One context for all: node spends 3 ms on each new one, which would look as if the daemon were slow.
const secureContext = createSecureContext({ ca: readFileSync(certificate) });
const agents = new Map();
function agentFrom(localAddress, keepAlive) {
  const key = `${localAddress} ${keepAlive}`;
  if (!agents.has(key)) agents.set(key, new https.Agent({ keepAlive, lookup, localAddress, secureContext }));
  return agents.get(key);
}

const clients = [];
const changes = new EventEmitter(); // 'change': something happened to one of them

// connect opens a client that joins its session whenever it connects, as the README's useSocket does, and
// keeps a record of it.
export function connect({ session, transports, port = 443, from = '127.0.0.1', keepAlive = true, origin = `https://${domain}` }) {
  const socket = io(`https://${domain}:${port}`, {
    transports, forceNew: true, agent: agentFrom(from, keepAlive), extraHeaders: { Origin: origin },
  });
  const client = { socket, session, got: [], joinedAt: [], leftFor: [], errors: [] };
  const note = (list, entry) => { list.push(entry); changes.emit('change'); };
  socket.on('connect', async () => {
    const { id } = socket;
    const answer = await socket.timeout(20_000).emitWithAck('join-session', { sessionId: session, auth: sign(id, `chat-session.${session}`) })
      .catch((error) => ({ error: error.message }));
    if (answer.error) note(client.errors, answer.error);
    else if (socket.id === id) note(client.joinedAt, Date.now());
  });
  socket.on('message.sent', ({ n }) => note(client.got, n));
  socket.io.on('open', () => socket.io.engine.once('upgrade', () => changes.emit('change')));
  socket.on('disconnect', (reason) => note(client.leftFor, reason));
  socket.on('connect_error', (error) => note(client.errors, error.message));
  clients.push(client);
  return client;
}

export function disconnectAll() {
  for (const { socket } of clients.splice(0)) socket.disconnect();
}

// until waits, from one change to the next, for a condition; the deadline is in milliseconds.
export async function until(condition, deadline, what) {
  const signal = AbortSignal.timeout(deadline);
  while (!condition()) {
    await once(changes, 'change', { signal }).catch(() => { throw new Error(`not within ${deadline} ms: ${what}`); });
  }
}

// sign is what Laravel's /broadcasting/auth answers.
export const sign = (id, channel) => createHmac('sha256', secret).update(`${id}:${channel}`).digest('hex');

// broadcast posts as Laravel does, on a connection of its own and for 3 s at most. It resolves to the status and
// the answer; where there is none, the status is the error's code, ECONNREFUSED or worse.
export async function broadcast(body) {
  try {
    const request = http.request(`${daemon}/broadcast`, {
      method: 'POST', agent: false, signal: AbortSignal.timeout(3000),
      headers: { 'Content-Type': 'application/json', Authorization: `Bearer ${secret}` },
    });
    request.end(JSON.stringify(body));
    const [response] = await once(request, 'response');
    let text = '';
    for await (const chunk of response) text += chunk;
    return { status: response.statusCode, ...JSON.parse(text) };
  } catch (error) {
    return { status: error.code ?? String(error) };
  }
}

// health is what the daemon says of itself to this machine.
export const health = async () => (await fetch(`${daemon}/health`)).json();
