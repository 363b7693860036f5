<?php

namespace App\Broadcasting;

use GuzzleHttp\Exception\GuzzleException;
use Illuminate\Broadcasting\BroadcastException;
use Illuminate\Broadcasting\Broadcasters\Broadcaster;
use Illuminate\Broadcasting\Broadcasters\UsePusherChannelConventions;
use Illuminate\Http\Client\ConnectionException;
use Illuminate\Support\Arr;
use Illuminate\Support\Facades\Http;
use Illuminate\Support\Str;
use JsonException;
use stdClass;
use Symfony\Component\HttpKernel\Exception\AccessDeniedHttpException;

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

    // Answers POST /broadcasting/auth: 403, or the signature that lets this one connection join the channel.
    public function auth($request)
    {
        $socketId = $request->input('socket_id');
        $channel = $request->input('channel_name');

        // The two are signed as "socket_id:channel": neither may hold a colon.
        if (! is_string($socketId) || ! preg_match('/^[A-Za-z0-9_-]{1,64}$/D', $socketId)
            || ! is_string($channel) || ! preg_match('/^[A-Za-z0-9_=@,.;-]{1,164}$/D', $channel)) {
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

    public function broadcast(array $channels, $event, array $payload = [])
    {
        $socket = Arr::pull($payload, 'socket');    // toOthers(): the connection that shall not get it
        $names = array_map([$this, 'nameForTheDaemon'], $this->formatChannels($channels));

        foreach (array_chunk($names, 100) as $some) {       // the daemon takes 100 at a time
            $this->post([
                'event' => $event,
                'data' => $payload ?: new stdClass,         // {} and not []
                // Several channels go in one request, so that a client in two of them gets one copy. One goes as the Node server knows it.
            ] + (count($some) === 1 ? ['channel' => $some[0]] : ['channels' => $some]) + ($socket === null ? [] : ['socket' => $socket]));
        }
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

        if (! $response->successful() || $response->json('success') !== true) {
            $error = $response->successful() ? null : $response->json('error');
            $reason = is_string($error) ? $error : 'what answers there is not the daemon. Is SOCKETIO_SERVER_URL right?';
            throw new BroadcastException("{$this->url} answered {$response->status()}: {$reason}");
        }
    }

    private function send($json)
    {
        try {
            return Http::withToken($this->secret)
                // No proxy: one in the environment (HTTP_PROXY, ALL_PROXY) would read the secret and the message.
                ->withOptions(['connect_timeout' => 1, 'timeout' => 3, 'allow_redirects' => false, 'proxy' => ''])
                ->contentType('application/json')
                ->send('POST', $this->url, ['body' => $json]);      // not withBody(): Laravel 8 parses that as a query, and fails at 1,000 of "&"
        } catch (ConnectionException | GuzzleException $e) {    // up to 11, Laravel lets some of Guzzle's through
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

    // Such a name is not public, even without prefix: an older copy of this file, which a queue worker may still have in
    // memory, posts what is for private-x to x.
    private function hasCallback($name)
    {
        return collect($this->channels)->keys()->contains(function ($pattern) use ($name) {
            return $this->channelNameMatchesPattern($name, $pattern);
        });
    }
}
