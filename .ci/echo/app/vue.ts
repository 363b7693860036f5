// As in Laravel's Vue starter kit.
import { configureEcho, useEcho } from '@laravel/echo-vue';
import { ref } from 'vue';
import Pusher from './pusher-socketio';

configureEcho({ broadcaster: 'pusher', Pusher, host: import.meta.env.VITE_SOCKETIO_SERVER_URL });

const ids = ref<number[]>([]);
useEcho<{ id: number }>('orders.5', 'OrderShipped', ({ id }) => void ids.value.push(id));
