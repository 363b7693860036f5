/// <reference types="vite/client" />
import { useEffect, useState } from 'react';
import Pusher, { type Channel } from 'pusher-js';

let shared: Pusher | undefined;

export function usePusher<T>(name: string, event: string, onEvent: (data: T) => void) {
  const [state, setState] = useState('');
  const [channel, setChannel] = useState<Channel>();

  useEffect(() => {
    const pusher = (shared ??= new Pusher(import.meta.env.VITE_PUSHER_APP_KEY, {
      cluster: import.meta.env.VITE_PUSHER_APP_CLUSTER,
      authEndpoint: '/broadcasting/auth',
    }));
    const changed = ({ current }: { current: string }) => setState(current);
    setState(pusher.connection.state);
    pusher.connection.bind('state_change', changed);
    const channel = pusher.subscribe(name);
    channel.bind(event, onEvent);
    setChannel(channel);
    return () => {
      channel.unbind(event, onEvent);
      pusher.unsubscribe(name);
      pusher.connection.unbind('state_change', changed);
    };
  }, [name, event]);

  return { state, channel, socketId: () => shared?.connection.socket_id };
}
