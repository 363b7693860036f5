// The same on Bun, with Socket.IO's own engine for it.
import { Server as Engine } from '@socket.io/bun-engine';
import { Server } from 'socket.io';
import { broadcast, mayPost, serve } from './rooms.mjs';

const io = new Server();
const engine = new Engine({ path: '/socket.io/', cors: { origin: 'https://chat.example.com' } });
io.bind(engine);
serve(io);
const handler = engine.handler();
Bun.serve({
  ...handler,
  hostname: '127.0.0.1',
  port: Number(process.env.SOCKET_PORT),
  async fetch(request, server) {
    const { pathname } = new URL(request.url);
    if (pathname === '/broadcast' && request.method === 'POST') {
      if (!mayPost(request.headers.get('authorization'))) return Response.json({ success: false }, { status: 401 });
      broadcast(io, await request.json());
      return Response.json({ success: true, message: 'Message broadcasted' });
    }
    if (pathname === '/health') return Response.json({ status: 'ok', connections: engine.clientsCount });
    return handler.fetch(request, server);
  },
});
