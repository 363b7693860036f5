// The rooms and POST /broadcast of the Node server that the daemon replaces: it acknowledges no join, asks for no signature,
// and reads one "channel". NODE_MODULES says where socket.io is, SOCKET_PORT where to listen.
import { createServer } from 'node:http';

const { Server } = await import(`${process.env.NODE_MODULES}/socket.io/wrapper.mjs`);
const server = createServer(async (request, response) => {
  if (request.url === '/health') return response.end('{"status":"ok"}');
  let body = '';
  for await (const chunk of request) body += chunk;
  const { channel, event, data } = JSON.parse(body);
  io.to(channel.replace('chat-session.', 'session-')).to('admin-room').emit(event, data);
  response.end('{"success":true,"message":"Message broadcasted"}');
});
const io = new Server(server, { cors: { origin: '*' } });
io.on('connection', (socket) => {
  socket.on('join-session', ({ sessionId }) => {
    socket.join(`session-${sessionId}`);
    socket.emit('joined-session', { sessionId, roomName: `session-${sessionId}` });
  });
  socket.on('join-admin', () => {
    socket.join('admin-room');
    socket.emit('joined-admin', { room: 'admin-room' });
  });
});
server.listen(process.env.SOCKET_PORT, '127.0.0.1');
