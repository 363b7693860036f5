// What the tests' clients have in common.

import { createHmac } from 'node:crypto';
import { connect } from 'node:net';
import { secret } from './processes.mjs';

export function signed(id, sessionId) {
  return { sessionId, auth: sign(`${id}:chat-session.${sessionId}`) };
}

export function sign(text) {
  return createHmac('sha256', secret).update(text).digest('hex');
}

// sink is a raw WebSocket in a session, that counts the "counted" events it gets.
export async function sink(daemon, sessionId) {
  const socket = connect(new URL(daemon.url).port, '127.0.0.1');
  const self = { socket, events: 0 };
  const send = (text) => {
    const payload = Buffer.from(text);
    const header = payload.length < 126 ? [0x81, 0x80 | payload.length] : [0x81, 0xfe, payload.length >> 8, payload.length & 255];
    socket.write(Buffer.concat([Buffer.from([...header, 0, 0, 0, 0]), payload])); // masked with zeros
  };
  socket.write(`GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ${Buffer.alloc(16).toString('base64')}\r\n\r\n`);
  await new Promise((resolve, reject) => {
    let tail = '', state = 'open';
    socket.once('error', reject);
    socket.on('data', (data) => {
      const pings = (tail.slice(-2) + data.toString('latin1')).split('\x81\x012').length - 1; // a frame of one "2"
      for (let i = 0; i < pings; i++) send('3');
      tail += data.toString('latin1');
      if (state === 'open' && /0\{.*"sid":/.test(tail)) {
        send('40');
        state = 'connect';
      }
      const connected = /40\{"sid":"([^"]+)"\}/.exec(tail);
      if (state === 'connect' && connected) {
        send(`42${JSON.stringify(['join-session', signed(connected[1], sessionId)])}`);
        state = 'join';
      }
      if (state === 'join' && tail.includes('joined-session')) {
        state = 'joined';
        resolve();
      }
      const parts = tail.split('42["counted"');
      self.events += parts.length - 1;
      if (state === 'joined') tail = parts.at(-1).slice(-12);
    });
  });
  return self;
}
