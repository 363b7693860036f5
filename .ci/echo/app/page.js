// Vite with JavaScript: what resources/js/echo.js of a Laravel application does.
import Echo from 'laravel-echo';
import Pusher from './pusher-socketio';

window.Pusher = Pusher;
window.Echo = new Echo({ broadcaster: 'pusher', key: 'key', Pusher, host: import.meta.env.VITE_SOCKETIO_SERVER_URL });
