// Chat.vue on a page.
import { createApp } from 'vue';
import Chat from './components/Chat.vue';

createApp(Chat, { sessionId: document.getElementById('app').dataset.sessionId }).mount('#app');
