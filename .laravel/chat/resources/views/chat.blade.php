<!doctype html>
<meta charset="utf-8">
<title>Chat</title>
<ol id="messages"></ol>
<form id="form"><input name="body" autocomplete="off" maxlength="2000" required> <button>Send</button></form>
<p id="told" role="status"></p>
<script type="module">
    import { io } from '/js/socket.io.esm.min.js';

    const sessionId = @json($sessionId);
    const messagesUrl = `/chat/${sessionId}/messages`;
    const socket = io(@json(config('broadcasting.connections.socketio.public_url')) ?? location.origin, { transports: ['websocket', 'polling'], tryAllTransports: true });

    // A WebSocket may open and pass nothing, as behind some proxies and virus scanners: then poll first. Where one has passed
    // something, a later one that fails is a restart: then do not poll, unless that lasts.
    const { opts } = socket.io;
    const pollFirst = () => { opts.transports = ['polling', 'websocket']; };
    const passed = () => Object.assign(opts, { transports: ['websocket', 'polling'], tryAllTransports: false });
    let opened = false, lost = 0;
    socket.io.on('open', () => { opened = true; });
    socket.on('connect', () => {
        opened = false;
        if (socket.io.engine.transport.name === 'websocket') passed(); else socket.io.engine.once('upgrade', passed);
    });
    socket.on('disconnect', () => {
        if (opened) pollFirst();
        opened = false;
        lost = Date.now();
    });
    socket.on('connect_error', ({ message }) => {
        if (message === 'timeout') pollFirst();
        if (Date.now() - lost > 20_000) opts.tryAllTransports = true;
    });
    addEventListener('pageshow', ({ persisted }) => {       // from the back/forward cache, where the connection has died unnoticed
        if (persisted && socket.active) socket.disconnect().connect();
    });

    const laravel = async (path, body) => {
        const response = await fetch(path, body && { method: 'POST', body: JSON.stringify(body), headers: {
            Accept: 'application/json', 'Content-Type': 'application/json', 'X-CSRF-TOKEN': @json(csrf_token()), 'X-Socket-ID': socket.id ?? '' } });
        if (response.ok) return response.json();
        const { status } = response;
        throw Object.assign(new Error(`${path} answered ${status}` + ([401, 403, 419].includes(status) ? ': reload the page' : '')), { status });
    };
    const show = ({ id, body }) => document.getElementById(id) ?? messages.append(Object.assign(document.createElement('li'), { id, textContent: body }));
    const tell = (text) => { told.textContent = text; if (text) console.error(text); };

    const join = async () => {
        const { id } = socket;
        try {
            const { auth } = await laravel('/broadcasting/auth', { socket_id: id, channel_name: `chat-session.${sessionId}` });
            if (socket.id === id) socket.emit('join-session', { sessionId, auth });
        } catch (error) {
            tell(error.message);
            const refused = error.status < 500 && error.status !== 429;
            if (!refused) setTimeout(() => socket.id === id && join(), 3000 + 3000 * Math.random());    // Laravel is away: not all at once
        }
    };
    socket.on('connect', join);     // at each connect: the id is a new one, and so must be the signature
    socket.on('joined-session', async () => {
        tell('');
        await laravel(messagesUrl).then((list) => list.forEach(show)).catch((error) => tell(error.message));     // what came meanwhile
    });
    socket.on('message.sent', show);        // MessageSent::broadcastAs()
    socket.on('error', ({ message }) => tell(message));
    socket.on('connect_error', (error) => tell(`No connection: ${error.message}`));
    form.onsubmit = async (event) => {
        event.preventDefault();
        const body = form.body.value;
        try {
            show(await laravel(messagesUrl, { body }));
            if (form.body.value === body) form.reset();     // only now: what was not stored stays in the form
            tell('');
        } catch (error) {
            tell(`Not sent: ${error.message}`);
        }
    };
</script>
