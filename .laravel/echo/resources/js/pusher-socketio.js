// In place of pusher-js, under Laravel Echo and without it: the same calls and events, over Socket.IO.
// One plain file for every build.
// @ts-nocheck: its types are in pusher-socketio.d.ts, which lies beside it.
import { io } from 'socket.io-client';

const maxChannels = 100; // that the daemon lets one connection join
const burst = 104; // messages at once. The daemon takes 108; CONNECT, an upgrade's two and a PONG are the client's own
const interval = 210; // ms for each message in the long run. The daemon takes one in 200: the rest is for PONGs
const spared = 52; // of the burst, which whispers leave for joins and leaves
const maxWhisper = 8192; // bytes: a message of over 16 KiB ends the connection
const [nothing, failure, refusal, full] = [0, 1, 2, 3]; // what an application is told of a channel
const noSignIn = 'there is no sign-in; a private channel of the user\'s own, as App.Models.User.5, does what it is for';

const said = new Set();
/** Tells the developer once for each text. */
function sayOnce(text) {
  if (!said.has(text)) console.warn(`socketio: ${text}`);
  said.add(text);
}

class Emitter {
  constructor() {
    this.bound = []; // of { event, callback, context }; '*' is every event
  }
  bind(event, callback, context) {
    this.bound = [...this.bound, { event, callback, context }];
    return this;
  }
  unbind(event, callback, context) {
    const other = (wanted, is) => wanted && wanted !== is;
    this.bound = this.bound.filter((one) => other(event, one.event) || other(callback, one.callback) || other(context, one.context));
    return this;
  }
  unbind_all(callback) { return this.unbind(undefined, callback); }
  bind_global(callback) { return this.bind('*', callback); }
  unbind_global(callback) { return this.unbind('*', callback); }
  emit(event, data) {
    for (const one of this.bound) {
      try {
        if (one.event === '*') one.callback(event, data);
        else if (one.event === event) one.callback.call(one.context, data);
      } catch (error) { // the application's: it is reported, and stops nobody else
        setTimeout(() => { throw error; });
      }
    }
  }
}

class Channel extends Emitter {
  constructor(name, pusher) {
    super();
    this.name = name;
    this.pusher = pusher;
    this.subscribed = false;
    this.wasSubscribed = false;
    this.told = nothing; // since it was subscribed (tell)
    if (name.startsWith('presence-')) this.members = { members: {}, count: 0, myID: null, me: null, each() {}, get: () => null };
    this.renew();
  }
  /** Forgets what belonged to another connection. */
  renew() {
    this.subscribed = false;
    this.refused = false; // so that it is asked again at the next connect, or by subscribe()
    this.failures = 0;
    this.after = 0; // when Laravel may be asked again
  }
  get subscriptionPending() { return !this.subscribed && !this.refused; }
  trigger(event, data) { return this.pusher.whisper(this, event, data); }
  subscribe() { this.pusher.subscribe(this.name); }
  unsubscribe() { this.pusher.unsubscribe(this.name); }
}

class Channels {
  constructor() {
    this.channels = Object.create(null); // by name: where Echo looks for them
  }
  all() { return Object.values(this.channels); }
  find(name) { return this.channels[name]; }
}

class Connection extends Emitter {
  constructor(pusher) {
    super();
    this.pusher = pusher;
    this.state = 'connecting';
    this.socket_id = undefined;
  }
  connect() { this.pusher.connect(); }
  disconnect() { this.pusher.disconnect(); }
  isUsingTLS() { return this.pusher.shouldUseTLS(); }
  send_event(event, data, channel) { return this.pusher.send_event(event, data, channel); }
}

/**
 * What may be sent, in the daemon's own measure. A message is in flight until its acknowledgement is back, and counts from then
 * on: the daemon has counted it before. So a network that holds messages up cannot make too many of them arrive at once.
 */
class Budget {
  constructor() {
    this.flying = 0;
    this.paid = -Infinity; // the time up to which the messages that have arrived have used it up
  }
  /** The ms until so many more may be sent. */
  wait(cost) {
    const now = performance.now();
    return Math.max(this.paid, now - burst * interval) + (this.flying + cost) * interval - now;
  }
  arrive(cost) {
    this.flying -= cost;
    this.paid = Math.max(this.paid, performance.now() - burst * interval) + cost * interval;
  }
}

export default class Pusher extends Emitter {
  constructor(key, options = {}) {
    super();
    this.key = key;
    this.config = this.options = options; // the object itself: applications put a new token into its auth.headers
    this.channels = new Channels();
    this.connection = new Connection(this);
    this.budget = new Budget();
    this.has = new Map(); // by name, how far this connection has come: { asked (Laravel), signature, sent (join), joined }
    this.asking = false; // Laravel, for several channels at once
    this.alone = false; // the application's endpoint signs for one channel at a time
    this.due = false; // work()
    this.waiting = false; // joins or leaves, for the budget
    this.timer = undefined;
    this.since = performance.now(); // of the connection's state
    if (!options.host) sayOnce("the option \"host\" is not set: this page's own origin is taken for the daemon's address. Give it, as in host: import.meta.env.VITE_SOCKETIO_SERVER_URL");
    const host = options.host || '/';
    const socket = this.socket = io(host, { transports: ['websocket', 'polling'], tryAllTransports: true, ...options.socketio });
    pollWhereWebSocketsFail(socket);
    let restoring = false;
    socket.on('connect', () => {
      this.budget = new Budget();
      this.has.clear();
      this.asking = false;
      for (const channel of this.allChannels()) channel.renew(); // the id is a new one, and so must be the signatures
      this.workSoon();
      this.become('connected');
    });
    socket.on('disconnect', () => {
      for (const channel of this.allChannels()) channel.subscribed = false;
      this.become(socket.active || restoring ? 'connecting' : 'disconnected');
    });
    socket.on('connect_error', ({ message }) => {
      const refused = !socket.active; // by the server, so that it is not tried again
      if (this.connection.state === 'connecting' && (refused || performance.now() - this.since > 10000)) {
        console.error(`socketio: no connection to ${host} (${message}). Three causes look alike: nothing answers there (an https page needs an https address); this page's origin is not in the daemon's CORS_ORIGINS; the page's Content-Security-Policy has not this address in connect-src, as https: and as wss:`);
        this.become('unavailable');
      }
      if (refused) this.complain(message);
    });
    socket.on('error', ({ message }) => {
      console.error(`socketio: ${message}`);
      this.complain(message);
    });
    socket.on('broadcast', ({ channel, event, data }) => {
      const target = this.channel(channel);
      if (!target) return; // it is being left
      target.emit(event, data);
      this.emit(event, data);
    });
    if (typeof window !== 'undefined' && window.addEventListener) {
      window.addEventListener('pageshow', (event) => { // from the back/forward cache, where the connection has died unnoticed
        if (!event.persisted || !socket.active) return;
        restoring = true;
        socket.disconnect();
        restoring = false;
        socket.connect();
      });
    }
    Pusher.instances.push(this);
  }

  connect() {
    if (!this.socket.active) this.become('connecting');
    this.socket.connect();
  }
  disconnect() {
    this.socket.disconnect();
    this.become('disconnected');
  }
  become(current) {
    const { connection } = this;
    const previous = connection.state;
    const socket_id = this.socket.id;
    if (current === previous) return;
    this.since = performance.now();
    Object.assign(connection, { state: current, socket_id });
    connection.emit('state_change', { previous, current });
    connection.emit(current, { socket_id });
  }
  /** Emits an error in which callbacks written for pusher-js find data.code and error.data.code. */
  complain(message) {
    const data = { code: null, message };
    this.connection.emit('error', { type: 'PusherError', data, error: { type: 'PusherError', data } });
  }

  channel(name) { return this.channels.find(name); }
  allChannels() { return this.channels.all(); }
  subscribe(name) {
    const channel = this.channel(name) || new Channel(name, this);
    this.channels.channels[name] = channel;
    channel.refused = false;
    this.workSoon();
    return channel;
  }
  unsubscribe(name) {
    const channel = this.channel(name);
    if (channel) channel.subscribed = false;
    delete this.channels.channels[name];
    this.workSoon();
  }
  subscribeAll() { this.allChannels().forEach((channel) => channel.subscribe()); }
  unsubscribe_all() { this.allChannels().forEach((channel) => channel.unsubscribe()); }
  shouldUseTLS() { return !!this.socket.io.engine?.secure; }

  send_event(event, data, name) {
    const channel = name && this.channel(name);
    if (channel && event.startsWith('client-')) return channel.trigger(event, data);
    sayOnce(`send_event("${event}"): a page can send to the members of a channel, as client-*, and nothing else`);
    return false;
  }
  signin() { sayOnce(`signin(): ${noSignIn}`); }
  get user() {
    sayOnce(`user: ${noSignIn}`);
    return Object.assign(new Emitter(), { watchlist: new Emitter() });
  }
  switchCluster() { sayOnce('switchCluster(): there are no clusters'); }

  workSoon() { // React's StrictMode subscribes, leaves and subscribes at once: Laravel is asked once
    if (!this.due) void Promise.resolve().then(() => this.work());
    this.due = true;
  }
  /** Compares what the page wants with what the connection has, and does what the budget allows. */
  work() {
    this.due = false;
    clearTimeout(this.timer);
    const { id } = this.socket;
    if (!id) return;
    const ask = [], joins = [], leaves = [], calls = [];
    let again = Infinity; // ms until Laravel may be asked again
    for (const [name, { asked, sent }] of this.has) {
      if (this.channel(name) || asked) continue;
      if (sent) leaves.push(name);
      else this.has.delete(name);
    }
    const wanted = this.allChannels().filter(({ refused }) => !refused);
    let room = maxChannels - wanted.filter(({ name }) => this.has.get(name)?.sent).length;
    for (const channel of wanted) {
      const { name } = channel;
      const has = this.has.get(name) || {};
      const after = channel.after - performance.now();
      if (has.joined) calls.push(() => this.succeed(channel));
      if (has.sent) continue;
      if (channel.told === full && room > 0) channel.told = nothing;
      if (/^(presence|private-encrypted)-/.test(name)) {
        const kind = name.startsWith('presence-') ? 'presence channels: nobody learns who is there' : 'encrypted channels';
        calls.push(() => this.fail(channel, { message: `there are no ${kind}. A private channel has events and whispers`, status: 400 }));
      } else if (room-- <= 0) {
        calls.push(() => this.tell(channel, full, `a page may be in ${maxChannels} channels at once: this one waits until another is left`, 400));
      } else if (after > 50) again = Math.min(again, after); // ms: who failed together is asked for together
      else if (has.signature) joins.push(name);
      else if (!has.asked) ask.push(name);
    }
    let places = maxChannels - [...this.has.values()].filter(({ sent }) => sent).length;
    this.waiting = false;
    while (!this.waiting && joins.length + leaves.length) { // joins first: somebody looks at what they bring
      const [first, step] = joins.length && places > 0 ? [joins, -1] : [leaves, 1];
      this.waiting = !first.length || !this[step < 0 ? 'join' : 'leave'](first[0]);
      if (this.waiting) again = Math.min(again, this.budget.wait(1));
      else first.shift();
      places += step;
    }
    if (again < Infinity) this.timer = setTimeout(() => this.work(), again);
    if (ask.length) void this.ask(ask, id);
    for (const call of calls) call();
  }
  /** Sends what the budget allows beyond what it is to spare. */
  send(event, argument, done, spare = 0) {
    const { budget } = this;
    const cost = 1 + Math.floor((bytes([event, argument]) + 20) / 1024); // 20 for what the client puts in front
    if (budget.wait(cost + spare) > 0) return false;
    budget.flying += cost;
    this.socket.emit(event, argument, (answer) => {
      budget.arrive(cost);
      if (budget === this.budget) done(answer);
    });
    return true;
  }
  join(name) {
    const has = this.has.get(name);
    has.sent = this.send('join', { channel: name, auth: has.signature }, ({ error }) => {
      if (this.has.get(name) === has) {
        has.joined = !error;
        if (error) this.refuse(name, { message: error, status: 400 });
      }
      this.work();
    });
    return has.sent;
  }
  leave(name) {
    const sent = this.send('leave', { channel: name }, () => this.work());
    if (sent) this.has.delete(name);
    return sent;
  }
  /** Drops what the budget does not allow, and a whisper waits for nothing. */
  whisper(channel, event, data) {
    if (!event.startsWith('client-')) throw new Error(`socketio: ${event} does not start with client-`);
    const plain = data === undefined ? null : JSON.parse(JSON.stringify(data)); // as pusher-js sends it: no binary message
    const size = bytes([event, plain]);
    if (size > maxWhisper) console.error(`socketio: ${event} has ${size} bytes: ${maxWhisper} may be whispered`);
    if (!channel.subscribed || size > maxWhisper || this.waiting) return false;
    return this.send('whisper', { channel: channel.name, event: event.slice('client-'.length), data: plain }, () => {}, spared);
  }

  /** Has Laravel sign for the channels, all in one request, unless the application signs one by one. */
  async ask(names, id) {
    const { authorizer, channelAuthorization: own } = this.options;
    const alone = this.alone || authorizer || own?.customHandler;
    if (this.asking && !alone) return; // who comes meanwhile is asked for in the next request
    for (const name of names) this.has.set(name, { asked: true });
    const random = 1 + Math.random(); // one for all
    const settle = async (name, answer) => {
      let auth, cause;
      try {
        auth = signature(await answer);
      } catch (error) {
        cause = error;
      }
      if (this.socket.id !== id) return;
      if (auth) this.has.set(name, { signature: auth });
      else this.refuse(name, cause, random);
      this.workSoon();
      return auth;
    };
    if (!alone) {
      this.asking = true;
      const { auth, cause } = await this.post({ socket_id: id, 'channel_names[]': names }).catch((cause) => ({ cause }));
      if (this.socket.id !== id) return;
      this.asking = false;
      const { status } = Object(cause);
      // A broadcaster that does not know this question answers 403; an endpoint of the application's own may break off, with 500.
      const again = status === 500 && names.some((name) => this.channel(name)?.failures);
      if (auth && typeof auth === 'object') {
        const no = (name) => Promise.reject(answered(this.endpoint(), 403, ` for ${name}: does its callback in routes/channels.php say yes to this user?`));
        for (const name of names) void settle(name, auth[name] ? { auth: auth[name] } : no(name));
        return;
      }
      if (cause && !again && (passes(status) || status === 401 || status === 419)) {
        for (const name of names) void settle(name, Promise.reject(cause));
        return;
      }
    }
    for (const name of names) void settle(name, this.sign(name, id)).then((signed) => (this.alone = this.alone || !!signed));
  }
  /** Has Laravel, or a handler of the application's, sign for one channel. */
  async sign(name, socketId) {
    const { authorizer, channelAuthorization: own, auth } = this.options;
    if (!authorizer && !own?.customHandler) return this.post({ socket_id: socketId, channel_name: name });
    return new Promise((resolve, reject) => {
      const done = (error, answer) => (error ? reject(error === true ? answer : error) : resolve(answer));
      if (own?.customHandler) own.customHandler({ socketId, channelName: name }, done);
      else authorizer(this.channel(name), { authTransport: 'ajax', authEndpoint: this.endpoint(), ...(auth && { auth }) }).authorize(socketId, done);
    });
  }
  endpoint() { return this.options.channelAuthorization?.endpoint || this.options.authEndpoint || '/broadcasting/auth'; }
  async post(asked) {
    const { auth, channelAuthorization: own } = this.options;
    const endpoint = this.endpoint();
    const here = typeof document !== 'undefined' && new URL(endpoint, location.href).origin === location.origin;
    const token = here && /(?:^|; )XSRF-TOKEN=([^;]*)/.exec(document.cookie)?.[1];
    const fields = { ...auth?.params, ...own?.params, ...own?.paramsProvider?.(), ...asked };
    const response = await fetch(endpoint, {
      method: 'POST',
      headers: {
        Accept: 'application/json',
        'Content-Type': 'application/x-www-form-urlencoded',
        ...(token && { 'X-XSRF-TOKEN': decodeURIComponent(token) }),
        ...auth?.headers, ...own?.headers, ...own?.headersProvider?.(),
      },
      body: Object.entries(fields).flatMap(([name, values]) => [values].flat().map((value) => `${encodeURIComponent(name)}=${encodeURIComponent(value)}`)).join('&'),
    });
    if (!response.ok) throw answered(endpoint, response.status);
    return (await response.json().catch(() => null)) || {};
  }

  succeed(channel) {
    if (this.channel(channel.name) !== channel || channel.subscribed) return;
    Object.assign(channel, { subscribed: true, wasSubscribed: true, told: nothing });
    channel.emit('pusher:subscription_succeeded', {});
  }
  /** For a channel that this connection does not get into, now or at all. */
  refuse(name, cause, random = 1) {
    this.has.delete(name);
    const channel = this.channel(name);
    if (channel) this.fail(channel, cause, random);
  }
  fail(channel, cause, random) {
    // It can also come from an authorizer: axios has the status in its response.
    const { message = String(cause), response, status = response?.status } = Object(cause);
    channel.failures++;
    if (passes(status)) channel.after = performance.now() + 3000 * Math.min(channel.failures, 10) * random; // Laravel is away: not all pages at once
    else channel.refused = true;
    const expired = status === 419 || (channel.wasSubscribed && (status === 401 || status === 403));
    this.tell(channel, passes(status) ? failure : refusal, expired ? `The session has expired, or a right was taken away (${status}). Reload the page.` : message, status);
  }
  /** Once, until the channel is joined; once more where a failure, which passes, has become a refusal. */
  tell(channel, told, error, status) {
    if (channel.told >= told) return;
    channel.told = told;
    console.error(`socketio: ${channel.name}: ${error}`);
    channel.emit('pusher:subscription_error', { type: 'AuthError', error, status });
  }
}
Pusher.instances = [];
Pusher.isReady = true;
Pusher.logToConsole = false; // in its place: localStorage.debug = 'socket.io-client:socket'
Pusher.ready = () => {};
Pusher.log = () => {};
Pusher.Runtime = { set createXHR(_) { sayOnce('Pusher.Runtime.createXHR is not called: an "authorizer" sends cookies to another domain'); } };

/** Tells whether it may go well later. */
function passes(status) { return status === undefined || status === 429 || status >= 500; }
function answered(endpoint, status, more = '') { return { message: `${endpoint} answered ${status}${more}`, status }; }
function signature(answer) {
  const auth = answer?.auth;
  if (typeof auth === 'string' && auth && !auth.includes(':')) return auth;
  throw { message: 'Laravel gave no signature of ours: is BROADCAST_CONNECTION (BROADCAST_DRIVER up to Laravel 10) "socketio"? php artisan config:clear', status: 400 };
}
/** How many bytes of UTF-8 the value's JSON has. */
function bytes(value) { return encodeURIComponent(JSON.stringify(value)).replace(/%../g, '.').length; }

/**
 * Has the client poll first where a WebSocket opens and passes nothing, as behind some proxies and virus scanners. Where one
 * has passed something, a later one that fails is a restart: the client does not poll then, unless that lasts.
 */
function pollWhereWebSocketsFail(socket) {
  const { opts } = socket.io;
  const { transports = [] } = opts;
  const pollFirst = () => { opts.transports = [...transports].sort(); }; // "polling" is before "websocket"
  const passed = () => Object.assign(opts, { transports, tryAllTransports: false });
  let opened = false; // and CONNECT is not answered yet
  let lost = 0; // when the connection was
  socket.io.on('open', () => { opened = true; });
  socket.on('connect', () => {
    opened = false;
    const { engine } = socket.io;
    if (engine.transport.name === 'websocket') passed();
    else engine.once('upgrade', passed);
  });
  socket.on('disconnect', () => {
    if (opened) pollFirst();
    opened = false;
    lost = performance.now();
  });
  socket.on('connect_error', ({ message }) => {
    if (message === 'timeout') pollFirst();
    if (performance.now() - lost > 20000) opts.tryAllTransports = true;
  });
}
