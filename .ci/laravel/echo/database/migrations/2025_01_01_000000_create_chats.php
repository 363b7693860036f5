<?php

use Illuminate\Database\Migrations\Migration;
use Illuminate\Database\Schema\Blueprint;
use Illuminate\Support\Facades\DB;
use Illuminate\Support\Facades\Schema;

return new class extends Migration
{
    public function up()
    {
        Schema::create('chats', function (Blueprint $table) {
            $table->id();
            $table->timestamps();
        });
        Schema::create('chat_user', function (Blueprint $table) {
            $table->foreignId('chat_id');
            $table->foreignId('user_id');
        });
        Schema::create('messages', function (Blueprint $table) {
            $table->id();
            $table->foreignId('chat_id');
            $table->foreignId('user_id');
            $table->text('body');
            $table->timestamps();
        });
        DB::table('chats')->insert([['id' => 1], ['id' => 2]]);
        foreach ([[1, 1], [1, 2], [2, 1]] as [$chat, $user]) {
            DB::table('chat_user')->insert(['chat_id' => $chat, 'user_id' => $user]);
        }
    }
};
