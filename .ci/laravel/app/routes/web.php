<?php

use App\Http\Controllers\MessageController;
use App\Models\Message;
use Illuminate\Http\Request;
use Illuminate\Support\Facades\Auth;
use Illuminate\Support\Facades\Route;
use Illuminate\Support\Str;

Route::get('/', function (Request $request) {
    if (! $request->session()->has('chat_session_id')) {
        $request->session()->put('chat_session_id', (string) Str::uuid());
    }

    return view('chat', ['page' => 'widget', 'sessionId' => $request->session()->get('chat_session_id')]);
});

Route::get('/chat/{sessionId}/messages', [MessageController::class, 'index']);
Route::post('/chat/{sessionId}/messages', [MessageController::class, 'store']);

Route::post('/login', function (Request $request) {
    abort_unless(Auth::attempt($request->only('email', 'password')), 422);
    $request->session()->regenerate();

    return response()->noContent();
});

Route::get('/admin/{page?}', function (Request $request, $page = 'admin') {
    abort_unless(optional($request->user())->is_admin, 403);
    if ($page === 'messages') {
        return Message::orderBy('id')->get();
    }

    return view('chat', ['page' => $page, 'sessionId' => 'demo']);
})->where('page', 'admin|several|messages');
