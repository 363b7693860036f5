<?php

// Run in the application's folder: broadcasts one event as standard input says, and prints what came of it.

use Illuminate\Broadcasting\Channel;
use Illuminate\Broadcasting\InteractsWithSockets;
use Illuminate\Contracts\Broadcasting\ShouldBroadcastNow;

$app = require getcwd().'/bootstrap/app.php';
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
        return isset($this->case['latin1']) ? ['text' => "\xe9"] : ($this->case['data'] ?? []);
    }
}

$case = json_decode(stream_get_contents(STDIN), true);
config(['broadcasting.connections.socketio.url' => $case['url'], 'broadcasting.connections.socketio.secret' => $case['secret']]);
Illuminate\Support\Facades\Broadcast::purge();      // routes/channels.php has made a broadcaster already
$app['request']->headers->set('X-Socket-ID', $case['socket'] ?? null);

$start = microtime(true);
try {
    if (isset($case['rescue'])) {
        rescue(function () use ($case) {
            return broadcast(new Probe($case));
        });
    } else {
        broadcast(new Probe($case))->toOthers();
    }
    $result = ['ok' => true];
} catch (Throwable $e) {
    $result = ['ok' => false, 'class' => get_class($e), 'message' => $e->getMessage()];
}
echo json_encode($result + ['default' => config('broadcasting.default'), 'seconds' => microtime(true) - $start]);
