"""Drives the daemon with Debian's python3-socketio, as a script or a bot would use it: threads and asyncio, by each transport, in
open and in secured mode. Both sides have their defaults: over WebSocket this client sends the server's own URL as Origin.

    SOCKETIO=/path/to/the/binary /usr/bin/python3 interop.py

Nothing here sleeps: each step waits for an event, and fails when it has not come within the deadline.
"""

import asyncio
import hashlib
import hmac
import json
import os
import re
import traceback
import urllib.request

import socketio

BINARY = os.environ['SOCKETIO']
DEADLINE = 20  # s: the client's own delays before it reconnects grow to 5 s
SECRET = 'interop-secret-of-python-0123456789'
# Integers beyond 2^53 are exact in Python, U+2028 ends a line in JavaScript, and the emoji is five code points.
DATA = '{"id":9007199254740993,"line":"a\u2028b","emoji":"👩‍👩‍👧","list":[1.5,null,{}]}'


async def main():
    for secret in ['', SECRET]:
        daemon = Daemon(secret)
        try:
            await check(daemon)
        except Exception:
            daemon.kill()
            traceback.print_exc()
            os._exit(1)  # not sys.exit, which waits for the threads of clients that reconnect for ever


async def check(daemon):
    await daemon.start(0)
    clients = [Client(daemon, kind, transports)
               for kind in (socketio.Client, socketio.AsyncClient)
               for transports in (['websocket'], ['polling'], None)]  # None: polling, and an upgrade
    for client in clients:
        print(f"{'secured' if daemon.secret else 'open'} mode: {client.name}", flush=True)
        await client.connect()
        assert client.sio.transport() == ('polling' if client.transports == ['polling'] else 'websocket')
        await client.join()

        await client.call('upload', {'name': 'a'}, error='unknown event "upload": there are join-session')
        await client.call('join-session', {'sessionId': 'a:7'}, error='sessionId has to be a string or an integer')
        pong = await client.call('ping', {'text': 'x' * 2000})
        assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z', pong['timestamp']), pong

        assert await client.call('leave-session', {'sessionId': 5}) == {'sessionId': 5, 'roomName': 'session-5'}
        assert await daemon.broadcast('{}') == 0
        await client.join()
        assert await daemon.broadcast(DATA) == 1
        await client.hears(json.loads(DATA))
        if daemon.secret:
            await client.call('join-session', {'sessionId': 6, 'auth': client.sign('chat-session.5')}, error='auth does not sign')
            await client.call('join-admin', error='auth is missing')
        else:
            assert await client.call('join-admin') == {'room': 'admin-room'}
            assert await client.call('leave-admin') == {'room': 'admin-room'}
        await client.call('leave-session', {'sessionId': 5})

    print('a restart', flush=True)
    for client in clients:
        await client.join()
    await daemon.stop()
    for client in clients:
        await client.next('disconnect')
    await daemon.start(daemon.port)
    for client in clients:
        if client.transports == ['polling']:
            # python-engineio 4.3 takes Engine.IO's CLOSE, which Node's server sends too, for its own wish, and stays away.
            await client.connect()
        else:
            await client.next('connect')
        await client.join()
    assert await daemon.broadcast(DATA) == len(clients)
    for client in clients:
        await client.hears(json.loads(DATA))
        await client.do('disconnect')
    while (await daemon.health())['connections'] > 0:
        pass
    await daemon.stop()


class Client:
    """A python-socketio client of either kind, and what happened to it, in order."""

    def __init__(self, daemon, kind, transports):
        self.daemon, self.transports = daemon, transports
        self.name = f"{kind.__name__} by {' → '.join(transports or ['polling', 'websocket'])}"
        self.threads = kind is socketio.Client
        self.happened = asyncio.Queue()
        self.sio = kind()
        loop = asyncio.get_running_loop()
        for event in ('connect', 'disconnect', 'message.sent'):
            self.sio.on(event, lambda *args, event=event: loop.call_soon_threadsafe(self.happened.put_nowait, (event, *args)))

    async def do(self, method, *args, **options):
        method = getattr(self.sio, method)
        call = asyncio.to_thread(method, *args, **options) if self.threads else method(*args, **options)
        return await asyncio.wait_for(call, DEADLINE)

    async def connect(self):
        await self.do('connect', self.daemon.url, auth={'token': 'ünïcode', 'n': 1}, transports=self.transports)
        await self.next('connect')

    async def next(self, event):
        try:
            got, *args = await asyncio.wait_for(self.happened.get(), DEADLINE)
        except asyncio.TimeoutError:
            raise AssertionError(f'{self.name}: no {event}') from None
        assert got == event, f'{self.name}: {got}{args} instead of {event}'
        return args

    async def call(self, event, argument=None, error=None):
        answer = await self.do('call', event, argument)
        assert error is None and 'error' not in answer or error and answer['error'].startswith(error), f'{self.name}: {event}: {answer}'
        return answer

    async def join(self):
        argument = {'sessionId': 5, 'auth': self.sign('chat-session.5')} if self.daemon.secret else {'sessionId': 5}
        assert await self.call('join-session', argument) == {'sessionId': 5, 'roomName': 'session-5'}

    async def hears(self, data):
        assert await self.next('message.sent') == [data]

    def sign(self, channel):
        return hmac.new(SECRET.encode(), f'{self.sio.get_sid()}:{channel}'.encode(), hashlib.sha256).hexdigest()


class Daemon:
    """One process of the binary, started any number of times."""

    def __init__(self, secret):
        self.secret, self.process = secret, None

    async def start(self, port):
        self.process = await asyncio.create_subprocess_exec(
            BINARY, env={'SOCKET_PORT': str(port), 'SOCKETIO_SECRET': self.secret}, stderr=asyncio.subprocess.PIPE)
        lines = []
        while not (found := re.search(r'msg=listening addr=127\.0\.0\.1:(\d+)', lines[-1] if lines else '')):
            lines.append((await asyncio.wait_for(self.process.stderr.readline(), DEADLINE)).decode())
            assert lines[-1], f'the daemon did not start: {lines}'
        self.port = int(found[1])
        self.url = f'http://127.0.0.1:{self.port}'

    async def stop(self):
        self.process.terminate()
        _, log = await asyncio.wait_for(self.process.communicate(), DEADLINE)
        assert self.process.returncode == 0
        told = log.replace(b'join refused', b'')  # a client that came back while it was signed for
        assert b'refused' not in told and b'level=ERROR' not in told, log.decode()

    def kill(self):
        if self.process and self.process.returncode is None:
            self.process.kill()

    async def broadcast(self, data):
        body = f'{{"channel":"chat-session.5","event":"message.sent","data":{data}}}'
        return (await self.request('/broadcast', body.encode()))['delivered']

    async def health(self):
        return await self.request('/health')

    async def request(self, path, body=None):
        headers = {'Authorization': f'Bearer {self.secret}'} if self.secret else {}
        request = urllib.request.Request(self.url + path, body, headers)
        with await asyncio.to_thread(urllib.request.urlopen, request, timeout=DEADLINE) as response:
            return json.load(response)


asyncio.run(main())
