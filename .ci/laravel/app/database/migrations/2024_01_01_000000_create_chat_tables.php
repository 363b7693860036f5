<?php

use Illuminate\Database\Migrations\Migration;
use Illuminate\Database\Schema\Blueprint;
use Illuminate\Support\Facades\DB;
use Illuminate\Support\Facades\Hash;
use Illuminate\Support\Facades\Schema;

return new class extends Migration
{
    public function up()
    {
        Schema::create('users', function (Blueprint $table) {
            $table->id();
            $table->string('email')->unique();
            $table->string('password');
            $table->boolean('is_admin');
            $table->timestamps();
        });
        DB::table('users')->insert(['email' => 'admin@example.com', 'password' => Hash::make('admin'), 'is_admin' => true]);

        Schema::create('messages', function (Blueprint $table) {
            $table->id();
            $table->string('session_id')->index();
            $table->string('sender');
            $table->text('body');
            $table->timestamps();
        });
    }
};
