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
            $table->string('api_token')->nullable();    // of the guard that stands in for Sanctum's
            $table->timestamps();
        });
        foreach (['admin', 'user'] as $name) {
            DB::table('users')->insert(['email' => "$name@example.com", 'password' => Hash::make($name), 'api_token' => "token-of-$name"]);
        }
    }
};
