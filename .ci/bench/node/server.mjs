// On Node: Express and Socket.IO.
import { createServer } from 'node:http';
import express from 'express';
import { Server } from 'socket.io';
import { broadcast, mayPost, serve } from './rooms.mjs';

const app = express();
const http = createServer(app);
const io = new Server(http, { cors: { origin: 'https://chat.example.com' } });
serve(io);
app.use(express.json({ limit: '1mb' }));
app.get('/health', (request, response) => response.json({ status: 'ok', connections: io.engine.clientsCount }));
app.post('/broadcast', (request, response) => {
  if (!mayPost(request.headers.authorization)) return response.status(401).json({ success: false });
  broadcast(io, request.body);
  response.json({ success: true, message: 'Message broadcasted' });
});
http.listen(process.env.SOCKET_PORT, '127.0.0.1');
