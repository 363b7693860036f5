// new Echo, in a TypeScript of Vite's.
import Echo from 'laravel-echo';
import Pusher from './pusher-socketio';

declare global {
  interface Window {
    Pusher: typeof Pusher;
    Echo: Echo<'reverb'>;
  }
}

window.Pusher = Pusher;
window.Echo = new Echo({ broadcaster: 'reverb', key: import.meta.env.VITE_REVERB_APP_KEY, Pusher, host: import.meta.env.VITE_SOCKETIO_SERVER_URL });
