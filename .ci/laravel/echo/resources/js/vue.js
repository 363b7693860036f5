import { configureEcho } from '@laravel/echo-vue';
import { createApp } from 'vue';
import Chat from './components/Chat.vue';

configureEcho({ broadcaster: 'reverb' });

createApp(Chat, { chat: document.getElementById('app').dataset.sessionId }).mount('#app');
