<?php

use App\Events\Published;
use App\Http\Controllers\ChatController;
use App\Models\User;
use App\Notifications\Paid;
use Illuminate\Support\Facades\Auth;
use Illuminate\Support\Facades\Route;

Route::get('/login/{id}', fn ($id) => Auth::loginUsingId($id)->email);      // in place of Breeze
Route::get('/publish/{title}', fn ($title) => Published::dispatch($title));   // and of an office
Route::get('/pay/{user}/{amount}', fn (User $user, $amount) => $user->notify(new Paid((int) $amount)));

Route::get('/chat/{chat}/messages', [ChatController::class, 'index']);
Route::post('/chat/{chat}/messages', [ChatController::class, 'store']);
Route::get('/chat/{chat}/{page?}', [ChatController::class, 'show']);
