import axios from 'axios';
import { useEffect, useState } from 'react';
import type { Message } from '../Message';

export function LiveChatWidget({ sessionId }: { sessionId: string }) {
  const [text, setText] = useState('');
  const [messages, setMessages] = useState<Message[]>([]);
  const add = (more: Message[]) => setMessages((list) => [...list, ...more]);
  const url = `/chat/${sessionId}/messages`;
  useEffect(() => {
    axios.get(url).then(({ data }) => setMessages(data));
    window.Echo.private(`chat.${sessionId}`).listen('MessageSent', (e: { message: Message }) => add([e.message]));
    return () => window.Echo.leave(`chat.${sessionId}`);
  }, [sessionId]);
  const send = (body: string) => axios.post(url, { body }).then(({ data }) => add([data]));

  return (
    <form onSubmit={(event) => { event.preventDefault(); void send(text); setText(''); }}>
      <ol>{messages.map((message) => <li key={message.id} data-id={message.id}>{message.user.email}: {message.body}</li>)}</ol>
      <input name="body" value={text} onChange={(event) => setText(event.target.value)} />
      <button>Send</button>
    </form>
  );
}
