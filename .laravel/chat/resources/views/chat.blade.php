<!doctype html>
<meta charset="utf-8">
<ol id="messages"></ol>
<form id="form"><input name="body" autocomplete="off" required> <button>Send</button></form>
<script type="module">
    import { io } from '/js/socket.io.esm.min.js';

    const socket = io('http://localhost:3001', { transports: ['websocket', 'polling'], tryAllTransports: true });   // your daemon
    const laravel = async (path, body) => (await fetch(path, body && { method: 'POST', body: JSON.stringify(body), headers: {
        Accept: 'application/json', 'Content-Type': 'application/json', 'X-CSRF-TOKEN': '{{ csrf_token() }}', 'X-Socket-ID': socket.id ?? '' } })).json();
    const show = ({ id, body }) => document.getElementById(id) ?? messages.append(Object.assign(document.createElement('li'), { id, textContent: body }));

    socket.on('connect', async () => {      // at each connect: the id is a new one, and so must be the signature
        const { auth } = await laravel('/broadcasting/auth', { socket_id: socket.id, channel_name: 'chat-session.{{ $sessionId }}' });
        socket.emit('join-session', { sessionId: '{{ $sessionId }}', auth });
    });
    socket.on('joined-session', async () => (await laravel('/chat/{{ $sessionId }}/messages')).forEach(show));  // what came meanwhile
    socket.on('message.sent', show);        // MessageSent::broadcastAs()
    socket.on('error', ({ message }) => console.error(message));
    form.onsubmit = (event) => {
        event.preventDefault();
        laravel('/chat/{{ $sessionId }}/messages', { body: form.body.value }).then(show);
        form.reset();
    };
</script>
