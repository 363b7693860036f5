import { useEffect, useState } from 'react';
import { usePusher } from '../hooks/usePusher';
import type { Message } from '../Message';

export function PlainChat({ chat }: { chat: string }) {
  const [heard, setHeard] = useState<string[]>([]);
  const [typing, setTyping] = useState('');
  const add = (line: string) => setHeard((all) => [...all, line]);
  const { state, channel, socketId } = usePusher<{ message: Message }>(`private-chat.${chat}`, 'App\\Events\\MessageSent', ({ message }) => add(message.body));
  usePusher<{ title: string }>('news', 'App\\Events\\Published', ({ title }) => add(title));
  useEffect(() => void channel?.bind('client-typing', ({ name }: { name: string }) => setTyping(`${name} is typing`)), [channel]);
  const send = (body: string) =>
    fetch(`/chat/${chat}/messages`, {
      method: 'POST',
      headers: {
        Accept: 'application/json',
        'Content-Type': 'application/json',
        'X-XSRF-TOKEN': decodeURIComponent(/XSRF-TOKEN=([^;]*)/.exec(document.cookie)![1]!),
        'X-Socket-ID': socketId()!,
      },
      body: JSON.stringify({ body }),
    }).then((response) => response.json()).then((message: Message) => add(message.body));

  return (
    <form data-status={state} onSubmit={(event) => { event.preventDefault(); void send(String(new FormData(event.currentTarget).get('body'))); }}>
      <ol>{heard.map((line, i) => <li key={i}>{line}</li>)}</ol>
      <p id="typing">{typing}</p>
      <input name="body" onChange={() => channel?.trigger('client-typing', { name: 'plain' })} />
      <button>Send</button>
    </form>
  );
}
