// For a page with <script>, and for webpack's require in another file of the same kind.
import Pusher from './pusher-socketio';

window.Pusher = Pusher;
