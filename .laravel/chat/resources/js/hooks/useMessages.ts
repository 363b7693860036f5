import { useState } from 'react';
import { laravelHeaders, mergeMessages, useSocket } from './useSocket';
import type { ChatMessage } from './useSocket';

export interface Message extends ChatMessage { // MessageSent::broadcastWith()
  sender: 'guest' | 'admin';
  body: string;
}

/** The chat of one session, or with admin of all: what useSocket returns, the messages, and a function that sends one. */
export function useMessages({ sessionId, admin = false }: { sessionId?: string | undefined; admin?: boolean }) {
  const [messages, setMessages] = useState<Message[]>([]);
  const add = (more: Message[]) => setMessages((list) => mergeMessages(list, more));
  const load = async () => {
    if (admin || sessionId) add(await laravel<Message[]>(admin ? '/admin/messages' : `/chat/${sessionId}/messages`));
  };
  const socket = useSocket<Message>({ sessionId, admin, onMessage: (message) => add([message]), onReconnect: load });
  /** A promise that is rejected where Laravel has not stored the message. */
  const send = async (body: string) => add([await laravel<Message>(`/chat/${sessionId}/messages`, { body })]);
  return { ...socket, messages: admin ? messages : messages.filter((message) => String(message.session_id) === sessionId), send };
}

async function laravel<T>(path: string, body?: object): Promise<T> {
  const response = await fetch(path, { headers: laravelHeaders(), ...(body && { method: 'POST', body: JSON.stringify(body) }) });
  if (!response.ok) throw new Error(`${path} answered ${response.status}${response.status === 419 ? ': reload the page' : ''}`);
  return response.json();
}
