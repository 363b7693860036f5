import { createApp } from 'vue';
import Chat from './components/Chat.vue';

const root = document.getElementById('app');
createApp(Chat, { sessionId: root.dataset.sessionId }).mount(root);
