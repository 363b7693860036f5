/// <reference types="vite/client" />
import { useEffect, useRef, useState } from 'react';
import type { Socket } from 'socket.io-client';
import { connect } from '../connect';

export type ChatMessage = { id: number; session_id: string | number };

export interface UseSocketOptions<M extends ChatMessage> {
  sessionId?: string | number | undefined; // whose messages to hear: the visitor's own chat, or the one an administrator has open
  admin?: boolean; // hear those of all sessions
  onMessage: (message: M) => void;
  onReconnect?: () => unknown; // after every join, the first too: fetch what the page may have missed; a rejected promise is tried again
}

// joined: messages arrive
const offline = { connected: false, joined: false, error: null as string | null, socketId: undefined as string | undefined };

let shared: Socket | undefined;
const uses = new Map<string, number>(); // how many components use a session's room, the administrators', and the connection

export function useSocket<M extends ChatMessage>(options: UseSocketOptions<M>): typeof offline {
  const { sessionId, admin = false } = options;
  const [state, setState] = useState(offline);
  const latest = useRef(options); // so that new callbacks, which every render brings, do not join anew
  useEffect(() => void (latest.current = options));

  useEffect(() => {
    const socket = (shared ??= connect(serverUrl()));
    let mounted = true;
    let retry: ReturnType<typeof setTimeout> | undefined;
    let wasJoined = false;

    const join = async () => {
      const { id } = socket;
      if (!id) return;
      const gone = () => !mounted || socket.id !== id;
      try {
        if (sessionId !== undefined) {
          const auth = await signature(id, `chat-session.${sessionId}`);
          if (gone()) return;
          await ask(socket, 'join-session', { sessionId, userType: admin ? 'admin' : 'guest', auth });
        }
        if (admin) {
          const auth = await signature(id, 'admin-chat');
          if (gone()) return;
          await ask(socket, 'join-admin', { auth });
        }
        if (gone()) return;
        wasJoined = true;
        setState({ connected: true, joined: sessionId !== undefined || admin, error: null, socketId: id });
        await latest.current.onReconnect?.();
      } catch (cause) {
        if (gone()) return;
        const expired = wasJoined && cause instanceof Refused && cause.status; // this visitor was let in before
        const error = expired ? `The session has expired, or a right was taken away (${expired}). Reload the page.` : cause instanceof Error ? cause.message : String(cause);
        setState({ connected: true, joined: false, error, socketId: id });
        if (!(cause instanceof Refused)) retry = setTimeout(join, 3000 + 3000 * Math.random()); // Laravel is away: not all at once
      }
    };
    const handlers = {
      connect() {
        clearTimeout(retry);
        setState({ connected: true, joined: false, error: null, socketId: socket.id });
        void join(); // at each connect: the id is a new one, and so must be the signature
      },
      disconnect() {
        clearTimeout(retry);
        setState(offline); // socket.io-client comes back by itself
      },
      connect_error(cause: Error) {
        // Not active: the daemon has answered, with a "no", and socket.io-client does not try again. A path in the URL is a namespace.
        const check = socket.active ? `three causes look alike. Does the daemon answer there (an https page needs an https address)? Is ${location.origin} in its CORS_ORIGINS? Does the page's Content-Security-Policy have this address in connect-src, as https: and as wss:?` : 'is there a path in VITE_SOCKETIO_SERVER_URL?';
        setState({ ...offline, error: `No connection to ${serverUrl()} (${cause.message}): ${check}` });
      },
      'message.sent'(message: M) { // MessageSent::broadcastAs(). The rooms of the page's other components come in here too.
        if (admin || String(message.session_id) === String(sessionId)) latest.current.onMessage(message);
      },
    };

    const mine = ['connection', ...(admin ? ['admin'] : []), ...(sessionId !== undefined ? [`session ${sessionId}`] : [])];
    for (const use of mine) uses.set(use, (uses.get(use) ?? 0) + 1);
    for (const [event, handler] of Object.entries(handlers)) socket.on(event, handler);
    if (socket.connected) handlers.connect();

    return () => {
      mounted = false;
      clearTimeout(retry);
      for (const [event, handler] of Object.entries(handlers)) socket.off(event, handler);
      for (const use of mine) uses.set(use, uses.get(use)! - 1);
      const unused = (use: string) => !uses.get(use) && socket.connected;
      if (sessionId !== undefined && unused(`session ${sessionId}`)) socket.emit('leave-session', { sessionId });
      // Not at once: StrictMode, and a change of page, mount again right after they unmount.
      setTimeout(() => {
        if (admin && unused('admin')) socket.emit('leave-admin');
        if (uses.get('connection') || shared !== socket) return;
        socket.disconnect();
        shared = undefined;
      });
    };
  }, [sessionId, admin]);

  return state;
}

/** Headers for requests to Laravel. Call it when you send: the socket's id changes with every connection. */
export function laravelHeaders(): Record<string, string> {
  const xsrf = /(?:^|; )XSRF-TOKEN=([^;]*)/.exec(document.cookie)?.[1] ?? '';
  return {
    Accept: 'application/json',
    'Content-Type': 'application/json',
    'X-XSRF-TOKEN': decodeURIComponent(xsrf),
    ...(shared?.id ? { 'X-Socket-ID': shared.id } : {}), // toOthers() leaves this connection out
  };
}

/** The list with more messages merged in: each one once, in the database's order. */
export function mergeMessages<M extends ChatMessage>(list: M[], more: M[]): M[] {
  const byId = new Map([...list, ...more].map((message) => [message.id, message]));
  return [...byId.values()].sort((a, b) => a.id - b.id);
}

/** The page's connection, in effects after useSocket's own. */
export const pageSocket = () => shared!;

const serverUrl = (): string => import.meta.env.VITE_SOCKETIO_SERVER_URL || location.origin;

/** A "no" that asking again would not change; status: where it is Laravel's, to this visitor. */
class Refused extends Error {
  constructor(message: string, readonly status?: number) { super(message); }
}

/** Asks Laravel for the signature that lets this connection join the channel. */
export async function signature(socketId: string, channel: string): Promise<string> {
  const body = JSON.stringify({ socket_id: socketId, channel_name: channel });
  const response = await fetch('/broadcasting/auth', { method: 'POST', headers: laravelHeaders(), body });
  const { status } = response;
  if (status >= 500 || status === 429) throw new Error(`/broadcasting/auth answered ${status}: see Laravel's log.`);
  if (status === 403) throw new Refused(`Laravel refuses ${channel} (403): does its callback in routes/channels.php say yes to this visitor?`, status);
  if (status === 419) throw new Refused('Laravel misses the CSRF token (419): reload the page; does it set the cookie XSRF-TOKEN, on this domain?', status);
  if (!response.ok) throw new Refused(`/broadcasting/auth answered ${status}: is broadcasting switched on, with the middleware "web" and without "auth"?`, status === 401 ? status : undefined);
  const answer = (await response.json().catch(() => null)) as { auth?: string } | null;
  if (!answer?.auth) throw new Refused('/broadcasting/auth gave no signature: is BROADCAST_CONNECTION (BROADCAST_DRIVER up to Laravel 10) "socketio"?');
  return answer.auth;
}

/** Asks to join. The Node server gives no acknowledgement, but both send the event joined-… */
function ask(socket: Socket, event: string, argument: { sessionId?: string | number; userType?: string; auth: string }): Promise<void> {
  const joined = event.replace('join', 'joined');
  return new Promise((resolve, reject) => {
    const heard = (answer: { sessionId?: unknown }) => {
      if (String(answer.sessionId) === String(argument.sessionId)) resolve();
    };
    socket.on(joined, heard);
    socket.timeout(10_000).emit(event, argument, (late: Error | null, answer?: { error?: string }) => {
      socket.off(joined, heard);
      if (late) reject(late);
      else if (answer?.error) reject(new Refused(answer.error));
      else resolve();
    });
  });
}
