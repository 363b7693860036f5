import { StrictMode } from 'react';
import { createRoot } from 'react-dom/client';
import { PlainChat } from './components/PlainChat';

const root = document.getElementById('app')!;
createRoot(root).render(
  <StrictMode>
    <PlainChat chat={root.dataset.sessionId!} />
  </StrictMode>,
);
