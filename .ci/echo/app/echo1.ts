// laravel-echo 1.19, whose Echo takes no types.
import Echo from 'laravel-echo';
import Pusher from './pusher-socketio';

export const echo = new Echo({ broadcaster: 'pusher', key: 'key', Pusher, host: import.meta.env.VITE_SOCKETIO_SERVER_URL });
