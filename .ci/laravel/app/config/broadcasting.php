<?php

return [    // as Laravel 8 to 10 ship it
    'default' => env('BROADCAST_DRIVER', 'null'),

    // README
        'log' => ['driver' => 'log'],

        'null' => ['driver' => 'null'],
    ],
];
