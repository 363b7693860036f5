// Tells the others in a chat that somebody types, and calls onTyping with what they tell. It takes the page's socket, and returns
// the function to call at each key: const key = typing(socket, sessionId, signature, ({ name }) => …); key({ name: 'Ada' });
// signature(socketId, channel) asks Laravel, as in hooks/useSocket.ts. With useSocket, in an effect below it, where key is a useRef:
// key.current = typing(pageSocket(), sessionId, signature, onTyping), and an input's onChange calls key.current({ name }).
export function typing(socket, sessionId, signature, onTyping) {
  const channel = `private-chat-session.${sessionId}`; // by this name it can be whispered to
  const join = async () => socket.emit('join', { channel, auth: await signature(socket.id, channel) });
  socket.on('connect', join);
  if (socket.connected) join();
  socket.on('broadcast', (message) => {
    if (message.channel === channel && message.event === 'client-typing') onTyping(message.data);
  });

  let last = 0;
  return (data) => {
    if (!socket.connected || Date.now() - last < 1000) return; // the daemon takes 5 messages a second
    last = Date.now();
    socket.emit('whisper', { channel, event: 'typing', data });
  };
}
