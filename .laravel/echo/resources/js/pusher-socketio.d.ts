// To TypeScript it is pusher-js, whose types Laravel Echo's own need: the package stays installed.
import PusherJs from 'pusher-js';
import type { ManagerOptions, SocketOptions } from 'socket.io-client';

export type { Channel, Options } from 'pusher-js';

// Of pusher-js's own options authEndpoint, auth, authorizer and channelAuthorization count.
export interface SocketIoOptions {
  host?: string | null | undefined; // the daemon's address; without it the page's own
  socketio?: Partial<ManagerOptions & SocketOptions> | undefined; // more of the official client's options
  [option: string]: any;
}

export default class Pusher extends PusherJs {
  constructor(key: string | null, options?: SocketIoOptions);
}
