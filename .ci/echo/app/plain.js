// An application's own JavaScript, which checkJs looks into.
import Pusher from './pusher-socketio';

/** @type {Pusher | undefined} */
let shared;

/** @param {string} name */
export function listen(name) {
  shared = shared ?? new Pusher('key', { host: 'https://yourdomain.com' });
  return shared.subscribe(name).bind('event', () => {});
}
