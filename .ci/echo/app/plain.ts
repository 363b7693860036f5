// pusher-js without Echo, and without Vite. Pusher serves as a type, too.
import Pusher from './pusher-socketio';
import type { Channel } from './pusher-socketio';

let shared: Pusher | undefined;

export function listen(name: string, onEvent: (data: { id: number }) => void): Channel {
  const pusher = (shared ??= new Pusher('key', {
    host: 'https://yourdomain.com',
    cluster: 'mt1',
    forceTLS: true,
    authEndpoint: '/broadcasting/auth',
    auth: { headers: { 'X-A': 'a' } },
    socketio: { transports: ['polling'] },
  }));
  pusher.connection.bind('state_change', ({ current }: { current: string }) => console.log(current, pusher.connection.socket_id));
  const channel = pusher.subscribe(name);
  channel.bind('event', onEvent);
  channel.trigger('client-typing', {});
  return channel;
}
