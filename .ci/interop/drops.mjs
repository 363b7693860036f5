// What a page shows of 10,000 messages whose connection drops for 2 s ten times: on the daemon, where it fetches after each
// join, and on the Node server that the daemon replaces, without and with Socket.IO's connection state recovery. README.md,
// Performance, has the figures.
//
//	npm install && SOCKETIO=/path/to/the/binary node drops.mjs
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import http from 'node:http';
import net from 'node:net';
import { Server } from 'socket.io';
import { io } from 'socket.io-client-4';

const messages = 10_000, seconds = 80, drops = 10, away = 2000;
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const closed = []; // what ends the servers

// node is the Node server: its rooms and its broadcast, on a port of its own.
async function node(options) {
  const server = http.createServer();
  const sio = new Server(server, options);
  sio.on('connection', (socket) => {
    socket.on('join-session', ({ sessionId }) => {
      socket.join(`session-${sessionId}`);
      socket.emit('joined-session', { sessionId });
    });
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  closed.push(() => sio.close());
  return { port: server.address().port, broadcast: async (id) => void sio.to('session-5').emit('message.sent', { id }) };
}

async function daemon() {
  const child = spawn(process.env.SOCKETIO, { env: { SOCKET_PORT: '0' } });
  closed.push(() => child.kill());
  let log = '';
  while (!/addr=127.0.0.1:(\d+)/.test(log)) log += (await once(child.stderr, 'data'))[0];
  child.stderr.resume();
  const port = Number(/addr=127.0.0.1:(\d+)/.exec(log)[1]);
  const broadcast = (id) =>
    fetch(`http://127.0.0.1:${port}/broadcast`, {
      method: 'POST',
      body: JSON.stringify({ channel: 'chat-session.5', event: 'message.sent', data: { id } }),
    }).then((response) => response.text());
  return { port, broadcast };
}

// link is a network that can be away: it cuts what is open, and lets nothing in.
async function link(port) {
  const open = new Set();
  let down = false;
  const server = net.createServer((socket) => {
    if (down) return socket.destroy();
    const other = net.connect(port, '127.0.0.1');
    socket.pipe(other).pipe(socket);
    for (const s of [socket, other]) open.add(s.on('error', () => {}).on('close', () => (open.delete(s), socket.destroy(), other.destroy())));
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  closed.push(() => server.close());
  return {
    port: server.address().port,
    set down(value) {
      down = value;
      if (down) for (const socket of open) socket.destroy();
    },
  };
}

// shown runs one page, whose messages are all in the database, and returns how many it shows.
async function shown(server, fetches) {
  const network = await link(server.port);
  const database = [], page = new Set();
  const socket = io(`http://127.0.0.1:${network.port}`, { transports: ['websocket'] });
  socket.on('connect', () => socket.recovered || socket.emit('join-session', { sessionId: 5 }));
  socket.on('joined-session', () => fetches && database.forEach((id) => page.add(id)));
  socket.on('message.sent', ({ id }) => page.add(id));
  await once(socket, 'joined-session');
  const began = Date.now();
  const posting = (async () => {
    for (let id = 0; id < messages; id++) {
      database.push(id);
      await server.broadcast(id);
      const early = (id / messages) * seconds * 1000 - (Date.now() - began);
      if (early > 0) await sleep(early);
    }
  })();
  for (let drop = 1; drop <= drops; drop++) {
    await sleep(began + (drop * seconds * 1000) / (drops + 1) - Date.now());
    network.down = true;
    await sleep(away);
    network.down = false;
  }
  await posting;
  await sleep(1000); // for the last to arrive
  socket.close();
  return page.size;
}

const [here, plain, recovering] = await Promise.all([
  daemon().then((server) => shown(server, true)),
  node({}).then((server) => shown(server, false)),
  node({ connectionStateRecovery: {} }).then((server) => shown(server, false)),
]);
console.log(`of ${messages} messages, with ${drops} drops of ${away} ms, a page shows: ${here} here; ${plain} of the Node server's; ${recovering} with connection state recovery`);
for (const end of closed) end();
if (here !== messages) process.exitCode = 1;
