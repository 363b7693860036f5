import './bootstrap';
import { StrictMode, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { LiveChatWidget } from './components/LiveChatWidget';

const root = document.getElementById('app')!;

function Page() {
  const [shown, setShown] = useState(true);
  return (
    <>
      {shown && <LiveChatWidget sessionId={root.dataset.sessionId!} />}
      <button id="leave" onClick={() => setShown(false)}>Leave</button>
    </>
  );
}

createRoot(root).render(
  <StrictMode>
    <Page />
  </StrictMode>,
);
