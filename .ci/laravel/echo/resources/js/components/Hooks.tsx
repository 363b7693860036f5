import { echo, useConnectionStatus, useEcho, useEchoNotification, useEchoPublic } from '@laravel/echo-react';
import { useEffect, useState } from 'react';
import type { Message } from '../Message';

export function Hooks({ chat, user }: { chat: string; user: string }) {
  const [heard, setHeard] = useState<string[]>([]);
  const [typing, setTyping] = useState('');
  const [refused, setRefused] = useState('');
  const add = (line: string) => setHeard((all) => [...all, line]);
  const status = useConnectionStatus();
  const { channel } = useEcho<{ message: Message }>(`chat.${chat}`, 'MessageSent', ({ message }) => add(message.body));
  useEchoNotification<{ amount: number }>(`App.Models.User.${user}`, ({ amount }) => add(`paid ${amount}`));
  useEchoPublic<{ title: string }>('news', 'Published', ({ title }) => add(title));
  useEffect(() => {
    channel()!.listenForWhisper('typing', ({ name }: { name: string }) => setTyping(`${name} is typing`));
    for (const other of [echo().private('chat.99'), echo().join('room')]) {
      other.error(({ error }: { error: string }) => setRefused((all) => `${all} ${error}`));
    }
    return () => echo().leave('chat.99');
  }, []);

  return (
    <form data-status={status}>
      <ol>{heard.map((line, i) => <li key={i}>{line}</li>)}</ol>
      <p id="typing">{typing}</p>
      <p id="refused">{refused}</p>
      <input name="body" onChange={() => channel()!.whisper('typing', { name: user })} />
    </form>
  );
}
