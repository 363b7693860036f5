import { fileURLToPath } from 'node:url';
import vue from '@vitejs/plugin-vue';
import { defineConfig } from 'vite';

const installed = (name) => fileURLToPath(new URL(`node_modules/${name}`, import.meta.url));
const { REACT: react, VUE, ENTRY } = process.env; // 18 or 19, or Vue; or entries of one's own

export default defineConfig({
  mode: 'development', // where StrictMode mounts everything twice
  resolve: { alias: react === '18' ? { 'react-dom': installed('react-dom-18'), react: installed('react-18') } : {} },
  plugins: VUE ? [vue()] : [],
  esbuild: { jsx: 'automatic', jsxDev: false },
  publicDir: false,
  build: {
    outDir: 'public/build',
    emptyOutDir: false, // the three builds are side by side
    modulePreload: false,
    rollupOptions: {
      input: ENTRY ? ENTRY.split(' ') : VUE ? 'resources/js/vue.js' : 'resources/js/main.tsx',
      output: { entryFileNames: ENTRY ? '[name].js' : VUE ? 'vue.js' : `react${react}.js`, assetFileNames: 'app[extname]' },
    },
  },
});
