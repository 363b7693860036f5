<?php

namespace App\Providers;

use App\Broadcasting\SocketIOBroadcaster;
use Illuminate\Broadcasting\BroadcastManager;
use Illuminate\Support\ServiceProvider;

class SocketIOServiceProvider extends ServiceProvider
{
    public function register(): void
    {
        // callAfterResolving: Broadcast::extend() in boot() would come too late where BroadcastServiceProvider is listed first.
        $this->callAfterResolving(BroadcastManager::class, function ($manager) {
            $manager->extend('socketio', function ($app, array $config) {
                return new SocketIOBroadcaster($config['url'], $config['secret']);
            });
        });
    }
}
