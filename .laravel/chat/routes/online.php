<?php

use Illuminate\Http\Request;
use Illuminate\Support\Facades\Cache;
use Illuminate\Support\Facades\DB;
use Illuminate\Support\Facades\Http;
use Illuminate\Support\Facades\Route;

Route::get('/chat/online', function () {
    $admins = Cache::remember('admins', 5, function () {
        return rescue(function () {
            return Http::timeout(1)->get(config('broadcasting.connections.socketio.url').'/health')->json('admins');
        }, 0, false);
    });

    return ['online' => $admins > 0];
});

Route::post('/chat/seen', function (Request $request) {
    abort_unless($request->session()->has('chat_session_id'), 403);
    DB::table('visitors')->updateOrInsert(['session_id' => $request->session()->get('chat_session_id')], ['last_seen' => now()]);

    return response()->noContent();
});

Route::get('/admin/left', function (Request $request) {
    abort_unless(optional($request->user())->is_admin, 403);

    return DB::table('visitors')->where('last_seen', '<', now()->subMinute())->pluck('session_id');
});
