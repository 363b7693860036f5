<?php

namespace App\Notifications;

use Illuminate\Notifications\Notification;

class Paid extends Notification
{
    public $amount;

    public function __construct($amount)
    {
        $this->amount = $amount;
    }

    public function via($notifiable)
    {
        return ['broadcast'];
    }

    public function toArray($notifiable)
    {
        return ['amount' => $this->amount];
    }
}
