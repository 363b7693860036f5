import { useMessages } from '../hooks/useMessages';
import { MessageForm, MessageList } from './MessageParts';

/** The visitor's chat. sessionId is the chat_session_id that routes/chat.php has put into his Laravel session. */
export function LiveChatWidget({ sessionId }: { sessionId: string }) {
  const { messages, send, connected, joined, error, socketId } = useMessages({ sessionId });
  return (
    <section className="widget" data-joined={joined} data-socket={socketId}>
      <h2>Talk to us</h2>
      <MessageList messages={messages} mine="guest" />
      {error && <p className="error">{error}</p>}
      <MessageForm onSend={send} placeholder={connected ? 'Write a message' : 'Reconnecting…'} />
    </section>
  );
}
