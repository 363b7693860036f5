// The Node server that the daemon replaces, with the two checks that it had not: who joins shows Laravel's signature, and who
// posts shows the secret. server.mjs has it on Node, server.bun.mjs on Bun's engine.
import { createHmac, timingSafeEqual } from 'node:crypto';

const secret = process.env.SOCKETIO_SECRET;
const equal = (a, b) => a.length === b.length && timingSafeEqual(a, b);
const bearer = Buffer.from(`Bearer ${secret}`);

export const mayPost = (authorization) => equal(Buffer.from(authorization ?? ''), bearer);

function mayJoin(socket, channel, auth) {
  const signature = createHmac('sha256', secret).update(`${socket.id}:${channel}`).digest('hex');
  if (equal(Buffer.from(String(auth)), Buffer.from(signature))) return true;
  socket.emit('error', { message: `auth does not sign ${channel}` });
  return false;
}

export function serve(io) {
  io.engine.on('connection', (raw) => { raw.request = null; }); // Socket.IO's page on memory: else its headers stay
  io.on('connection', (socket) => {
    socket.on('join-session', ({ sessionId, auth }) => {
      if (!mayJoin(socket, `chat-session.${sessionId}`, auth)) return;
      socket.join(`session-${sessionId}`);
      socket.emit('joined-session', { sessionId, roomName: `session-${sessionId}` });
    });
    socket.on('join-admin', ({ auth } = {}) => {
      if (!mayJoin(socket, 'admin-chat', auth)) return;
      socket.join('admin-room');
      socket.emit('joined-admin', { room: 'admin-room' });
    });
    socket.on('leave-session', ({ sessionId }) => socket.leave(`session-${sessionId}`));
    socket.on('ping', () => socket.emit('pong', { timestamp: new Date().toISOString() }));
  });
}

export function broadcast(io, { channel, event, data }) {
  if (channel.startsWith('chat-session.')) io.to(`session-${channel.slice(13)}`).to('admin-room').emit(event, data);
  else if (channel === 'admin-chat') io.to('admin-room').emit(event, data);
}
