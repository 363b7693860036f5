<?php

namespace App\Models;

class User extends \Illuminate\Foundation\Auth\User
{
    protected $casts = ['is_admin' => 'boolean'];
}
