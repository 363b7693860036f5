<?php

// Stands in the application: broadcasts one event as standard input says, and prints what came of it.

use Illuminate\Broadcasting\Channel;
use Illuminate\Broadcasting\InteractsWithSockets;
use Illuminate\Contracts\Broadcasting\ShouldBroadcastNow;

$app = require __DIR__.'/bootstrap/app.php';
$app->make(Illuminate\Contracts\Console\Kernel::class)->bootstrap();

class Probe implements ShouldBroadcastNow
{
    use InteractsWithSockets;

    private $case;

    public function __construct(array $case)
    {
        $this->case = $case;
    }

    public function broadcastOn()
    {
        return array_map(function ($name) {
            return new Channel($name);
        }, $this->case['channels'] ?? ['chat-session.5']);
    }

    public function broadcastAs()
    {
        return 'probe';
    }

    public function broadcastWith()
    {
        return $this->case['data'] ?? [];
    }
}

// What JSON can't bring here.
function php($name)
{
    $deep = [];
    for ($i = 0; $i < 600; $i++) {
        $deep = [$deep];
    }

    return [
        'latin1' => ['text' => "caf\xe9"],
        'nan' => ['number' => NAN],
        'deep' => $deep,
        'values' => [
            'floats' => [0.1, 1.0, 1e25, -0.0, 1 / 3], 'integer' => PHP_INT_MAX, 'text' => "é/\u{2028}\u{1f600}<&>\"\0", 'null' => null,
            'empty' => [[], new stdClass, collect()], 'objects' => [collect(['a' => 1]), Illuminate\Support\Str::of('text'), new DateTime('@0')],
        ],
        'ampersands' => ['text' => str_repeat('&amp;', 3000)],
    ][$name];
}

$case = json_decode(stream_get_contents(STDIN), true);
if (isset($case['php'])) {
    $case['data'] = php($case['php']);
}
$configured = config('broadcasting.connections.socketio.url');
config(['broadcasting.connections.socketio.url' => $case['url'], 'broadcasting.connections.socketio.secret' => $case['secret']]);
Illuminate\Support\Facades\Broadcast::purge();      // routes/channels.php has made a broadcaster already
$app['request']->headers->set('X-Socket-ID', $case['socket'] ?? null);

$start = microtime(true);
try {
    if (isset($case['http'])) {
        Illuminate\Support\Facades\Http::post($case['url'], ['event' => 'probe', 'data' => $case['data'], 'channel' => 'chat-session.5']);
    } elseif (isset($case['seen'])) {
        // POST /chat/seen, while a second tab's request inserts the row: right behind the first query that asks for it.
        $insert = "insert into visitors (session_id, last_seen) values ('{$case['seen']}', '2000-01-01 00:00:00')";
        Illuminate\Support\Facades\DB::listen(function ($query) use ($insert) {
            if (preg_match('/^select .*visitors/', $query->sql)) {
                Illuminate\Support\Facades\DB::connection()->getPdo()->exec($insert);
            }
        });
        $request = Illuminate\Http\Request::create('/chat/seen', 'POST');
        $request->setLaravelSession($app['session']->driver('array'));
        $request->session()->put('chat_session_id', $case['seen']);
        $app->instance('request', $request);
        $returned = $app['router']->getRoutes()->match($request)->run()->getStatusCode();
    } elseif (isset($case['reconnect'])) {
        $returned = Illuminate\Support\Facades\Broadcast::connection('socketio')->reconnect($case['reconnect']);
    } elseif (isset($case['rescue'])) {
        rescue(function () use ($case) {
            return broadcast(new Probe($case));
        });
    } else {
        broadcast(new Probe($case))->toOthers();
    }
    $result = ['ok' => true, 'returned' => $returned ?? null];
} catch (Throwable $e) {
    $result = ['ok' => false, 'class' => get_class($e), 'message' => $e->getMessage()];
}
echo json_encode($result + ['configured' => $configured, 'default' => config('broadcasting.default'), 'seconds' => microtime(true) - $start]);
