import { fileURLToPath } from 'node:url';
import { defineConfig } from 'vite';

const installed = (name) => fileURLToPath(new URL(`node_modules/${name}`, import.meta.url));
const react = process.env.REACT; // 18 or 19

export default defineConfig({
  mode: 'development', // where StrictMode mounts everything twice
  resolve: { alias: react === '18' ? { 'react-dom': installed('react-dom-18'), react: installed('react-18') } : {} },
  esbuild: { jsx: 'automatic', jsxDev: false },
  publicDir: false,
  build: {
    outDir: 'public/build',
    emptyOutDir: false, // the two builds are side by side
    modulePreload: false,
    rollupOptions: {
      input: 'resources/js/main.tsx',
      output: { entryFileNames: `react${react}.js`, assetFileNames: 'app[extname]' },
    },
  },
});
