<?php

use Illuminate\Database\Migrations\Migration;
use Illuminate\Database\Schema\Blueprint;
use Illuminate\Support\Facades\DB;
use Illuminate\Support\Facades\Schema;

return new class extends Migration
{
    public function up()
    {
        Schema::create('messages', function (Blueprint $table) {
            $table->id();
            $table->string('session_id')->index();
            $table->string('sender');       // guest or admin
            $table->text('body');
            $table->timestamps();
        });

        Schema::create('visitors', function (Blueprint $table) {    // for the recipe "has the visitor left"
            $table->string('session_id')->primary();
            $table->timestamp('last_seen');
        });

        Schema::table('users', function (Blueprint $table) {
            $table->boolean('is_admin')->default(false);
        });
    }

    public function down()
    {
        // Not dropColumn(), which up to Laravel 10 wants doctrine/dbal for SQLite.
        DB::statement('alter table '.DB::getTablePrefix().'users drop column is_admin');

        Schema::dropIfExists('visitors');
        Schema::dropIfExists('messages');
    }
};
