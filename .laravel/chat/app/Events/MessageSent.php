<?php

namespace App\Events;

use App\Models\Message;
use Illuminate\Broadcasting\InteractsWithSockets;
use Illuminate\Broadcasting\PrivateChannel;
use Illuminate\Contracts\Broadcasting\ShouldBroadcastNow;

class MessageSent implements ShouldBroadcastNow
{
    use InteractsWithSockets;

    public $message;

    public function __construct(Message $message)
    {
        $this->message = $message;
    }

    public function broadcastOn()
    {
        return new PrivateChannel('chat-session.'.$this->message->session_id);     // administrators get it too
    }

    public function broadcastAs()
    {
        return 'message.sent';
    }

    public function broadcastWith()     // the front end needs id and session_id; the rest is yours
    {
        return $this->message->only(['id', 'session_id', 'sender', 'body', 'created_at']);
    }
}
