import { StrictMode, useEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { ChatManagement } from './components/ChatManagement';
import { LiveChatWidget } from './components/LiveChatWidget';
import { pageSocket } from './hooks/useSocket';
import './app.css';

const root = document.getElementById('app')!;
const { page, sessionId = '' } = root.dataset;

// The page "several" mounts two widgets of one session and the administrators' view, and takes them away one by one:
// what the test counts is connections and rooms.
function Several() {
  const [shown, setShown] = useState({ first: true, second: true, management: true });
  const toggle = (name: keyof typeof shown) => () => setShown((all) => ({ ...all, [name]: !all[name] }));
  return (
    <>
      <button id="first" onClick={toggle('first')}>First widget</button>
      <button id="second" onClick={toggle('second')}>Second widget</button>
      <button id="management" onClick={toggle('management')}>Management</button>
      <button id="logout" onClick={() => pageSocket().disconnect()}>Log out</button>
      {shown.first && <LiveChatWidget sessionId={sessionId} />}
      {shown.second && <LiveChatWidget sessionId={sessionId} />}
      {shown.management && <ChatManagement />}
    </>
  );
}

function App() {
  useEffect(() => {
    root.dataset.mounts = String(Number(root.dataset.mounts ?? 0) + 1); // 2: StrictMode is at work
  }, []);
  if (page === 'several') return <Several />;
  return page === 'admin' ? <ChatManagement /> : <LiveChatWidget sessionId={sessionId} />;
}

createRoot(root).render(
  <StrictMode>
    <App />
  </StrictMode>,
);
