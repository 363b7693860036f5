import { configureEcho } from '@laravel/echo-react';
import { StrictMode } from 'react';
import { createRoot } from 'react-dom/client';
import { Hooks } from './components/Hooks';

configureEcho({ broadcaster: 'reverb' });

const root = document.getElementById('app')!;
createRoot(root).render(
  <StrictMode>
    <Hooks chat={root.dataset.sessionId!} user={root.dataset.user!} />
  </StrictMode>,
);
