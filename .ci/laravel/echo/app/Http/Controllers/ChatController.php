<?php

namespace App\Http\Controllers;

use App\Events\MessageSent;
use App\Models\Chat;
use Illuminate\Http\Request;

class ChatController
{
    public function show(Request $request, Chat $chat, $page = 'chat')
    {
        abort_unless($chat->users->contains($request->user()), 403);

        return view('chat', ['page' => $page, 'chat' => $chat, 'user' => $request->user()]);
    }

    public function index(Request $request, Chat $chat)
    {
        abort_unless($chat->users->contains($request->user()), 403);

        return $chat->messages()->with('user:id,email')->orderBy('id')->get();
    }

    public function store(Request $request, Chat $chat)
    {
        abort_unless($chat->users->contains($request->user()), 403);
        $message = $chat->messages()->create(['user_id' => $request->user()->id] + $request->validate(['body' => 'required|string']));
        $message->load('user:id,email');
        broadcast(new MessageSent($message))->toOthers();

        return $message;
    }
}
