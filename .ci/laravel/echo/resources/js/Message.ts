export interface Message {
  id: number;
  chat_id: number;
  body: string;
  user: { id: number; email: string };
}
