import { useState } from 'react';
import type { Message } from '../Message';
import { MessageForm, MessageList } from './parts';

export function LiveChatWidget({ sessionId }: { sessionId: string }) {
  // README
  return (
    <section className="widget" data-joined={joined} data-socket={socketId}>
      <h2>Talk to us</h2>
      <MessageList messages={messages} mine="guest" />
      {error && <p className="error">{error}</p>}
      <MessageForm onSend={send} placeholder={connected ? 'Write a message' : 'Reconnecting…'} />
    </section>
  );
}
