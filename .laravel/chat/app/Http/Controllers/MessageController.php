<?php

namespace App\Http\Controllers;

use App\Events\MessageSent;
use App\Models\Message;
use Illuminate\Http\Request;
use Throwable;

class MessageController
{
    public function index(Request $request, $sessionId)
    {
        $this->abortUnlessTheirs($request, $sessionId);

        return Message::where('session_id', $sessionId)->orderBy('id')->get();
    }

    public function all(Request $request)       // the newest 1,000 of all sessions, for administrators
    {
        abort_unless(optional($request->user())->is_admin, 403);

        return Message::latest('id')->limit(1000)->get();
    }

    public function store(Request $request, $sessionId)
    {
        $this->abortUnlessTheirs($request, $sessionId);
        $input = $request->validate(['body' => 'required|string|max:2000']);

        $message = Message::create([
            'session_id' => $sessionId,
            'sender' => optional($request->user())->is_admin ? 'admin' : 'guest',
            'body' => $input['body'],
        ]);

        // The message is stored, so what fails now is no error to the sender. Do not broadcast inside a transaction.
        // rescue(fn () => broadcast(…)) would not catch: the event is sent when broadcast()'s result is destroyed.
        try {
            broadcast(new MessageSent($message))->toOthers();
        } catch (Throwable $e) {
            report($e);
        }

        return response()->json($message, 201);
    }

    private function abortUnlessTheirs(Request $request, $sessionId)     // the same question as in routes/channels.php
    {
        abort_unless(optional($request->user())->is_admin
            || (string) $request->session()->get('chat_session_id') === $sessionId, 403);
    }
}
