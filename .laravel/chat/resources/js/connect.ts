import { io } from 'socket.io-client';
import type { Socket } from 'socket.io-client';

/**
 * The official client, in every network: it polls where WebSockets are refused, or open and pass nothing, as behind some
 * proxies and virus scanners. Where one has passed something, a later one that fails is a restart: then it does not poll.
 */
export function connect(url: string): Socket {
  const socket = io(url, { transports: ['websocket', 'polling'], tryAllTransports: true });
  const { opts } = socket.io;
  const pollFirst = () => Object.assign(opts, { transports: ['polling', 'websocket'] });
  const passed = () => Object.assign(opts, { transports: ['websocket', 'polling'], tryAllTransports: false });
  let opened = false; // and CONNECT is not answered yet
  let lost = 0; // when the connection was
  socket.io.on('open', () => void (opened = true));
  socket.on('connect', () => {
    opened = false;
    if (socket.io.engine.transport.name === 'websocket') passed();
    else socket.io.engine.once('upgrade', passed);
  });
  socket.on('disconnect', () => {
    if (opened) pollFirst();
    opened = false;
    lost = Date.now();
  });
  socket.on('connect_error', ({ message }) => {
    if (message === 'timeout') pollFirst();
    if (Date.now() - lost > 20_000) opts.tryAllTransports = true; // this is no restart: the network may be another one
  });
  addEventListener('pageshow', ({ persisted }) => { // from the back/forward cache, where the connection has died unnoticed
    if (persisted && socket.active) socket.disconnect().connect();
  });
  return socket;
}
