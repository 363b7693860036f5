import { useState } from 'react';
import type { FormEvent } from 'react';
import type { Message } from '../hooks/useMessages';

export function MessageList({ messages, mine }: { messages: Message[]; mine: Message['sender'] }) {
  return (
    <ol>
      {messages.map((message) => (
        <li key={message.id} data-id={message.id} className={message.sender === mine ? 'mine' : 'theirs'}>
          {message.body}
        </li>
      ))}
    </ol>
  );
}

/** Empties itself once the message is stored; until then, and where it fails, the text stays. */
export function MessageForm({ onSend, placeholder }: { onSend: (body: string) => Promise<void>; placeholder: string }) {
  const [failure, setFailure] = useState<string>();
  const [sending, setSending] = useState(false);
  const submit = async (event: FormEvent<HTMLFormElement>) => {
    event.preventDefault();
    const input = event.currentTarget.elements.namedItem('body') as HTMLInputElement;
    const body = input.value;
    setSending(true);
    try {
      await onSend(body);
      setFailure(undefined);
      if (input.value === body) input.value = ''; // who has typed on keeps that
    } catch (cause) {
      setFailure(`Not sent: ${cause instanceof Error ? cause.message : String(cause)}`);
    } finally {
      setSending(false);
    }
  };
  return (
    <form onSubmit={submit}>
      <input name="body" placeholder={placeholder} autoComplete="off" required maxLength={2000} />
      <button disabled={sending}>Send</button>
      {failure && <p className="error" role="alert">{failure}</p>}
    </form>
  );
}
