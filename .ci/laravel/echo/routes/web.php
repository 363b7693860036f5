<?php

use App\Http\Controllers\ChatController;
use Illuminate\Support\Facades\Auth;
use Illuminate\Support\Facades\Route;

Route::get('/login/{id}', fn ($id) => Auth::loginUsingId($id)->email);      // in place of Breeze

Route::get('/chat/{chat}', [ChatController::class, 'show']);
Route::get('/chat/{chat}/messages', [ChatController::class, 'index']);
Route::post('/chat/{chat}/messages', [ChatController::class, 'store']);
