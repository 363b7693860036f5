// A chat through nginx: each transport, on each port that nginx serves.
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { broadcast, connect, disconnectAll, sign, until } from './chat.mjs';

after(disconnectAll);

const ways = [['websocket'], ['polling'], ['polling', 'websocket']];
let n = 0;

for (const port of (process.env.DEPLOY_PORTS ?? '443 3001').split(' ')) {
  for (const transports of ways) {
    test(`${transports} on ${port}: join, refused join, receive, ping, leave`, async () => {
      const session = `chat-${++n}`;
      const client = connect({ session, transports, port });
      const { socket } = client;
      const joined = new Promise((resolve) => socket.once('joined-session', resolve));
      await until(() => client.joinedAt.length, 5000, 'joined');
      assert.deepEqual(await joined, { sessionId: session, roomName: `session-${session}` });

      if (transports.length > 1 && socket.io.engine.transport.name !== 'websocket') {
        await new Promise((resolve) => socket.io.engine.once('upgrade', resolve));
      }
      assert.equal(socket.io.engine.transport.name, transports.at(-1));

      const stranger = await socket.emitWithAck('join-session', { sessionId: 'other', auth: sign('another socket', 'chat-session.other') });
      assert.match(stranger.error, /auth/);

      assert.deepEqual(await broadcast({ channel: 'chat-session.other', event: 'message.sent', data: { n: -1 } }),
        { status: 200, success: true, message: 'Message broadcasted', delivered: 0 });
      assert.equal((await broadcast({ channel: `private-chat-session.${session}`, event: 'message.sent', data: { n } })).delivered, 1);
      await until(() => client.got.length, 5000, 'received');
      assert.deepEqual(client.got, [n]);

      const pong = new Promise((resolve) => socket.once('pong', resolve));
      socket.emit('ping');
      assert.match((await pong).timestamp, /^\d{4}-.*\.\d{3}Z$/);

      await socket.emitWithAck('leave-session', { sessionId: session });
      assert.equal((await broadcast({ channel: `chat-session.${session}`, event: 'message.sent', data: { n } })).delivered, 0);
      assert.deepEqual(client.errors, []);
      socket.disconnect();
    });
  }
}

for (const transports of ways.slice(0, 2)) {
  test(`${transports} from a page of another origin is refused`, async () => {
    const client = connect({ session: 'foreign', transports, origin: 'https://foreign.example' });
    await until(() => client.errors.length, 5000, 'refused');
    assert.equal(client.joinedAt.length, 0);
    client.socket.disconnect();
  });
}
