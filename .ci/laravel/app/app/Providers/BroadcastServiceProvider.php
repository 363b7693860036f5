<?php

namespace App\Providers;

use Illuminate\Support\Facades\Broadcast;
use Illuminate\Support\ServiceProvider;

class BroadcastServiceProvider extends ServiceProvider      // as Laravel 8 to 10 ship it
{
    public function boot()
    {
        Broadcast::routes();

        require base_path('routes/channels.php');
    }
}
