// As in Laravel's React starter kit.
import { configureEcho, echo, useEcho } from '@laravel/echo-react';
import { useState } from 'react';
import Pusher from './pusher-socketio';

configureEcho({ broadcaster: 'reverb', Pusher, host: import.meta.env.VITE_SOCKETIO_SERVER_URL });

export function Orders() {
  const [ids, setIds] = useState<number[]>([]);
  useEcho<{ id: number }>('orders.5', 'OrderShipped', ({ id }) => setIds((all) => [...all, id]));
  return <p title={echo().socketId() ?? ''}>{ids.join()}</p>;
}
