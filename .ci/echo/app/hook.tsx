// The hook in a page that shows what it says.
import { createRoot } from 'react-dom/client';
import { useSocket } from './hooks/useSocket';

const root = document.getElementById('app')!;

function Page() {
  const { joined, error, socketId } = useSocket({ sessionId: root.dataset.sessionId, onMessage: () => {} });
  return <p data-joined={joined} data-socket={socketId}>{error}</p>;
}

createRoot(root).render(<Page />);
