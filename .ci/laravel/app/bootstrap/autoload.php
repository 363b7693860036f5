<?php

// What vendor/autoload.php is elsewhere: Debian's packages bring loaders of their own, on PHP's include path.
error_reporting(E_ALL & ~E_DEPRECATED);     // Laravel 8 is older than PHP 8.2

require 'GuzzleHttp/autoload.php';          // not found by Laravel's own loader, which looks for another case
require 'Illuminate/autoload.php';

spl_autoload_register(function ($class) {
    if (strncmp($class, 'App\\', 4) === 0 && is_file($file = __DIR__.'/../app/'.strtr(substr($class, 4), '\\', '/').'.php')) {
        require $file;
    }
});
