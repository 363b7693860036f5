import type { Message } from '../Message';

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

export function MessageForm({ onSend, placeholder }: { onSend: (body: string) => void; placeholder: string }) {
  return (
    <form
      onSubmit={(event) => {
        event.preventDefault();
        const form = event.currentTarget;
        onSend(String(new FormData(form).get('body')));
        form.reset();
      }}
    >
      <input name="body" placeholder={placeholder} autoComplete="off" />
      <button>Send</button>
    </form>
  );
}
