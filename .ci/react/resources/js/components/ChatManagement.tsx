import { useState } from 'react';
import { laravelHeaders, mergeMessages, useSocket } from '../hooks/useSocket';
import type { Message } from '../Message';
import { MessageForm, MessageList } from './parts';

export function ChatManagement() {
  const [selected, setSelected] = useState<string>();
  const [messages, setMessages] = useState<Message[]>([]);
  const add = (more: Message[]) => setMessages((list) => mergeMessages(list, more));
  const load = () => fetch('/admin/messages', { headers: laravelHeaders() }).then((response) => response.json()).then(add);
  const { connected, joined, error, socketId } = /* README */;
  const reply = (body: string) =>
    fetch(`/chat/${selected}/messages`, { method: 'POST', headers: laravelHeaders(), body: JSON.stringify({ body }) })
      .then((response) => response.json()).then((message: Message) => add([message]));
  const sessions = [...new Set(messages.map((message) => message.session_id))];
  return (
    <section className="management" data-joined={joined} data-socket={socketId} data-selected={selected}>
      <nav>
        {sessions.map((id) => (
          <button key={id} aria-pressed={id === selected} onClick={() => setSelected(String(id))} data-session={id}>
            Visitor {String(id).slice(0, 4)} <small>{messages.filter((message) => message.session_id === id).length}</small>
          </button>
        ))}
      </nav>
      <div>
        <h2>{selected ? `Visitor ${selected.slice(0, 4)}` : 'Choose a visitor'}</h2>
        <MessageList messages={messages.filter((message) => message.session_id === selected)} mine="admin" />
        {error && <p className="error">{error}</p>}
        <MessageForm onSend={reply} placeholder={connected ? 'Write a reply' : 'Reconnecting…'} />
      </div>
    </section>
  );
}
