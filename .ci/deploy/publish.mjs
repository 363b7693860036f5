// A thread that plays Laravel: every 10 ms a message to the next of fifty sessions, until it is told to stop. It hands
// back what became of each: {n, at, status, delivered}. Not in the test's thread, where 500 clients would hold it up.
import { parentPort } from 'node:worker_threads';
import { broadcast } from './chat.mjs';

const posts = [];
const publisher = setInterval(() => {
  const n = posts.length;
  posts.push(broadcast({ channel: `chat-session.room-${n % 50}`, event: 'message.sent', data: { n } })
    .then((answer) => ({ n, at: Date.now(), ...answer })));
}, 10);
parentPort.once('message', async () => {
  clearInterval(publisher);
  parentPort.postMessage(await Promise.all(posts));
});
