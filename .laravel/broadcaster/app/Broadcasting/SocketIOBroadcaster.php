<?php

namespace App\Broadcasting;

use GuzzleHttp\Exception\GuzzleException;
use Illuminate\Broadcasting\Broadcasters\Broadcaster;
use Illuminate\Broadcasting\Broadcasters\UsePusherChannelConventions;
use Illuminate\Broadcasting\BroadcastException;
use Illuminate\Http\Client\ConnectionException;
use Illuminate\Support\Arr;
use Illuminate\Support\Facades\Http;
use Illuminate\Support\Str;
use JsonException;
use stdClass;
use Symfony\Component\HttpKernel\Exception\AccessDeniedHttpException;
use Throwable;

class SocketIOBroadcaster extends Broadcaster
{
    use UsePusherChannelConventions;

    private $url;

    private $secret;

    public function __construct($url, $secret)
    {
        $this->url = rtrim($url, '/').'/broadcast';
        $this->secret = (string) $secret;
    }

    // Answers POST /broadcasting/auth: 403, or the signature that lets this one connection join the channel. With
    // channel_names in place of channel_name: a signature or null for each, so that a page asks once for all its channels.
    public function auth($request)
    {
        // It is signed as "socket_id:channel": neither may hold a colon.
        $socketId = $request->input('socket_id');
        if (! is_string($socketId) || ! preg_match('/^[A-Za-z0-9_-]{1,64}$/D', $socketId)) {
            throw new AccessDeniedHttpException;
        }

        if (! $request->has('channel_names')) {
            return $this->authChannel($request, $request->input('channel_name'));
        }

        $names = $request->input('channel_names');
        $isList = is_array($names) && $names === array_values(array_filter($names, 'is_string'));
        abort_unless($isList && count($names) >= 1 && count($names) <= 100, 422, 'channel_names has to be a list of 1 to 100 names.');

        $answers = [];
        foreach ($names as $name) {
            $request->merge(['channel_name' => $name]);     // validAuthenticationResponse() reads it there; so may callbacks
            try {
                $answers[$name] = $this->authChannel($request, $name)['auth'];
            } catch (Throwable $e) {
                report($e);         // of a mere "no" (403) Laravel reports nothing
                $answers[$name] = null;
            }
        }

        // An object, also for the names "0" and "1".
        return response()->json(['auth' => (object) $answers], 200, [], JSON_INVALID_UTF8_SUBSTITUTE);
    }

    private function authChannel($request, $channel)
    {
        if (! is_string($channel) || ! preg_match('/^[A-Za-z0-9_=@,.;-]{1,164}$/D', $channel)) {
            throw new AccessDeniedHttpException;
        }

        $name = $this->normalizeChannelName($channel);      // without prefix, as routes/channels.php has it
        if ($this->isOfTheChat($name)) {
            // Guests reach the callback too, with $user = null. A session id may not hold a dot, where {sessionId} in
            // routes/channels.php ends: Laravel 8 would ask about "5" and sign "5.6".
            if (! preg_match('/^(chat-session\.[A-Za-z0-9_=@,;-]{1,128}|admin-chat)$/D', $name)) {
                throw new AccessDeniedHttpException;
            }
        } elseif (Str::startsWith($channel, ['presence-', 'private-encrypted-'])) {
            throw new AccessDeniedHttpException;            // the daemon tells nobody who is present, and encrypts nothing
        } elseif ($channel === $name && ! $this->hasCallback($name)) {
            return $this->validAuthenticationResponse($request, true);      // a public channel: for anybody
        } elseif (! $this->retrieveUser($request, $name)) {
            throw new AccessDeniedHttpException;            // as with Pusher: callbacks may rely on a user
        }

        return $this->verifyUserCanAccessChannel($request, $name);
    }

    public function validAuthenticationResponse($request, $result)
    {
        $signed = $request->input('socket_id').':'.$this->nameForTheDaemon($request->input('channel_name'));

        return ['auth' => hash_hmac('sha256', $signed, $this->secret)];
    }

    // Returns to how many connections of the daemon that was asked the event is on its way.
    public function broadcast(array $channels, $event, array $payload = [])
    {
        $socket = Arr::pull($payload, 'socket');    // toOthers(): the connection that shall not get it
        $names = $this->namesForTheDaemon($channels);
        $present = array_filter($names, function ($name) {
            return Str::startsWith($name, 'presence-');
        });
        if ($present) {
            report(new BroadcastException("The event {$event} reaches nobody in ".implode(', ', $present)
                .': there are no presence channels. Use a PrivateChannel, and Echo.private in place of Echo.join.'));
        }

        $delivered = 0;
        foreach (array_chunk($names, 100) as $some) {       // the daemon takes 100 at a time
            $delivered += $this->post([
                'event' => $event,
                'data' => $payload ?: new stdClass,         // {} and not []
                // Several channels go in one request, so that a client in two of them gets one copy. One goes as the Node server knows it.
            ] + (count($some) === 1 ? ['channel' => $some[0]] : ['channels' => $some]) + ($socket === null ? [] : ['socket' => $socket]));
        }

        return $delivered;
    }

    // Ends the connections of all who are in these channels. Their pages come back by themselves and ask anew for a signature
    // of each channel: who has lost the right stays outside. Broadcast::connection('socketio')->reconnect(['admin-chat']);
    public function reconnect(array $channels)
    {
        $ended = 0;
        foreach (array_chunk($this->namesForTheDaemon($channels), 100) as $some) {
            $ended += $this->post(['channels' => $some, 'reconnect' => true]);
        }

        return $ended;
    }

    private function post(array $body)
    {
        try {
            $json = json_encode($body, JSON_THROW_ON_ERROR);
        } catch (JsonException $e) {
            throw new BroadcastException("The data of the event {$body['event']} is not JSON: {$e->getMessage()}", 0, $e);
        }

        $response = $this->send($json);
        // The daemon restarts: nothing was sent. A queue worker has the time to ask again. A page's request has not: it would keep
        // its PHP-FPM worker from others for up to 7 s, and all who would have heard it reconnect, and fetch it.
        if ($response->status() === 503 && app()->runningInConsole()) {
            sleep(1);
            $response = $this->send($json);
        }

        if ($response->successful() && $response->json('success') === true) {
            return (int) $response->json('delivered');
        }

        $error = $response->successful() ? null : $response->json('error');
        $reason = is_string($error) ? $error : 'what answers there is not the daemon. Is SOCKETIO_SERVER_URL right?';
        $failure = new BroadcastException("{$this->url} answered {$response->status()}: {$reason}");
        if ($response->status() !== 504 || ! is_string($error)) {
            throw $failure;
        }

        // 504: it was sent, and nobody knows whether it came. Thrown, this would make a queue worker send it once more.
        report($failure);

        return 0;
    }

    private function send($json)
    {
        try {
            return Http::withToken($this->secret)
                // No proxy: one in the environment (HTTP_PROXY, ALL_PROXY) would read the secret and the message.
                ->withOptions(['connect_timeout' => 1, 'timeout' => 3, 'allow_redirects' => false, 'proxy' => ''])
                ->contentType('application/json')
                ->send('POST', $this->url, ['body' => $json]);      // not withBody(): Laravel 8 parses that as a query, and fails at 1,000 of "&"
        } catch (ConnectionException|GuzzleException $e) {      // up to 11, Laravel lets some of Guzzle's through
            throw new BroadcastException("{$this->url} did not answer: {$e->getMessage()}", 0, $e);
        }
    }

    // These two go to the daemon without prefix, as the Node server knows them. Every other channel keeps its prefix.
    private function isOfTheChat($name)
    {
        return $name === 'admin-chat' || Str::startsWith($name, 'chat-session.');
    }

    private function nameForTheDaemon($channel)
    {
        $name = $this->normalizeChannelName($channel);

        return $this->isOfTheChat($name) ? $name : $channel;
    }

    private function namesForTheDaemon(array $channels)
    {
        return array_map([$this, 'nameForTheDaemon'], $this->formatChannels($channels));
    }

    // Such a name is not public, even without prefix: an older copy of this file, which a queue worker may still have in
    // memory, posts what is for private-x to x.
    private function hasCallback($name)
    {
        return collect($this->channels)->keys()->contains(function ($pattern) use ($name) {
            return $this->channelNameMatchesPattern($name, $pattern);
        });
    }
}
