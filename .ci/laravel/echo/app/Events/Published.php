<?php

namespace App\Events;

use Illuminate\Broadcasting\Channel;
use Illuminate\Contracts\Broadcasting\ShouldBroadcast;
use Illuminate\Foundation\Events\Dispatchable;

class Published implements ShouldBroadcast
{
    use Dispatchable;

    public $title;

    public function __construct($title)
    {
        $this->title = $title;
    }

    public function broadcastOn()
    {
        return new Channel('news');
    }
}
