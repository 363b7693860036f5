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
