import axios from 'axios';
import type Echo from 'laravel-echo';

declare global {
  interface Window {
    axios: typeof axios;
    Echo: Echo<'pusher'>;
  }
}

window.axios = axios;
window.axios.defaults.headers.common['X-Requested-With'] = 'XMLHttpRequest';

import './echo';
