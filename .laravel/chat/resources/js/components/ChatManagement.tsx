import { useState } from 'react';
import { useMessages } from '../hooks/useMessages';
import { MessageForm, MessageList } from './MessageParts';

/** The administrators' page: all sessions, and the one that is open. */
export function ChatManagement() {
  const [selected, setSelected] = useState<string>();
  const { messages, send, connected, joined, error, socketId } = useMessages({ admin: true, sessionId: selected });
  const sessions = [...new Set(messages.map((message) => String(message.session_id)))];
  return (
    <section className="management" data-joined={joined} data-socket={socketId} data-selected={selected}>
      <nav>
        {sessions.map((id) => (
          <button key={id} aria-pressed={id === selected} onClick={() => setSelected(id)} data-session={id}>
            Visitor {id.slice(0, 4)} <small>{messages.filter((message) => String(message.session_id) === id).length}</small>
          </button>
        ))}
      </nav>
      <div>
        <h2>{selected ? `Visitor ${selected.slice(0, 4)}` : 'Choose a visitor'}</h2>
        <MessageList messages={messages.filter((message) => String(message.session_id) === selected)} mine="admin" />
        {error && <p className="error">{error}</p>}
        {selected && <MessageForm key={selected} onSend={send} placeholder={connected ? 'Write a reply' : 'Reconnecting…'} />}
      </div>
    </section>
  );
}
