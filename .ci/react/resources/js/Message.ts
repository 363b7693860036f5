import type { ChatMessage } from './hooks/useSocket';

export interface Message extends ChatMessage {
  sender: 'guest' | 'admin';
  body: string;
}
