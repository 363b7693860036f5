<?php

use Illuminate\Http\Request;
use Illuminate\Support\Facades\Broadcast;
use Illuminate\Support\Facades\Cache;
use Illuminate\Support\Facades\DB;
use Illuminate\Support\Facades\Route;

// Is an administrator there? An event that no page listens to reaches so many connections. /health would tell it only to
// a Laravel on the daemon's own machine, and not from a container.
Route::get('/chat/online', function () {
    $admins = Cache::remember('chat.admins', 5, function () {
        return rescue(function () {
            return Broadcast::connection('socketio')->broadcast(['admin-chat'], 'who.is.there');
        }, 0);
    });

    return ['online' => $admins > 0];
});

// A visitor's page posts here when it opens, and every 30 seconds.
Route::post('/chat/seen', function (Request $request) {
    abort_unless($request->session()->has('chat_session_id'), 403);
    // Not updateOrInsert(): two tabs at once would both insert.
    DB::table('visitors')->upsert([
        ['session_id' => $request->session()->get('chat_session_id'), 'last_seen' => now()],
    ], ['session_id'], ['last_seen']);

    return response()->noContent();
});

// Whose page has gone. Two minutes: browsers let the timer of a tab in the background run once a minute.
Route::get('/admin/left', function (Request $request) {
    abort_unless(optional($request->user())->is_admin, 403);

    return DB::table('visitors')->where('last_seen', '<', now()->subMinutes(2))->pluck('session_id');
});
