// Laravel Mix: bootstrap.js, as it came with Laravel 5.4 to 9.
window.Pusher = require('./pusher-socketio').default;
