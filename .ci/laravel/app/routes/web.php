<?php

use Illuminate\Http\Request;
use Illuminate\Support\Facades\Auth;
use Illuminate\Support\Facades\Route;

Route::get('/{page?}', function ($page = 'widget') {
    return view('app', ['page' => $page, 'sessionId' => session('chat_session_id')]);
})->where('page', 'widget|vue');

Route::post('/login', function (Request $request) {
    abort_unless(Auth::attempt($request->only('email', 'password')), 422);
    $request->session()->regenerate();

    return response()->noContent();
});

Route::get('/admin/{page?}', function (Request $request, $page = 'admin') {
    abort_unless(optional($request->user())->is_admin, 403);

    return view('app', ['page' => $page, 'sessionId' => 'demo']);
})->where('page', 'admin|several');

// What the README says to add stands below.
