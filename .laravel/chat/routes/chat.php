<?php

use App\Http\Controllers\MessageController;
use Illuminate\Http\Request;
use Illuminate\Support\Facades\Route;
use Illuminate\Support\Str;

Route::get('/chat', function (Request $request) {
    if (! $request->session()->has('chat_session_id')) {    // a new visitor: a chat of his own, whose id nobody can guess
        $request->session()->put('chat_session_id', (string) Str::uuid());
    }

    return view('chat', ['sessionId' => $request->session()->get('chat_session_id')]);
});

Route::get('/chat/{sessionId}/messages', [MessageController::class, 'index']);
Route::post('/chat/{sessionId}/messages', [MessageController::class, 'store'])
    ->middleware('throttle:60,1,chat');     // a minute, for each user, and for all guests of one address
Route::get('/admin/messages', [MessageController::class, 'all']);
