// .laravel/echo goes unchanged into every build that an application has: types, bundlers, and React Native's compiler.
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';

const require = createRequire(import.meta.url);
const here = import.meta.dirname;
const app = mkdtempSync(join(tmpdir(), 'echo-'));
const folder = join(app, 'resources/js');
const { FOLDER = join(here, '../../.laravel/echo/resources/js') } = process.env; // of the file
cpSync(FOLDER, folder, { recursive: true });
cpSync(join(here, 'app'), folder, { recursive: true });
symlinkSync(join(here, 'node_modules'), join(app, 'node_modules'));
writeFileSync(join(app, 'package.json'), '{}'); // as Mix has it: no "type"
after(() => rmSync(app, { recursive: true }));

describe('TypeScript', () => {
  const ts = require('typescript');
  const common = { target: 'ESNext', module: 'ESNext', moduleResolution: 'bundler', noEmit: true, isolatedModules: true, esModuleInterop: true, skipLibCheck: true };
  const react = { ...common, jsx: 'react-jsx', types: ['vite/client'] };
  const vue = { ...common, jsx: 'preserve', lib: ['ESNext', 'DOM', 'DOM.Iterable'], types: ['vite/client'], resolveJsonModule: true };
  const own = { noUnusedLocals: true, noUnusedParameters: true, noUncheckedIndexedAccess: true, verbatimModuleSyntax: true };
  const files = (...names) => names.map((name) => join(folder, name));
  const errors = (options, names) => {
    const { options: parsed, errors: wrong } = ts.convertCompilerOptionsFromJson({ ...options, baseUrl: app }, app);
    assert.deepEqual(wrong, []);
    const program = ts.createProgram(files(...names), { ...parsed, configFilePath: join(app, 'tsconfig.json') });
    return ts.getPreEmitDiagnostics(program).map(({ file, start, code, messageText }) =>
      `${file ? `${file.fileName.replace(`${folder}/`, '')}:${file.getLineAndCharacterOfPosition(start).line + 1}` : ''} TS${code} ${ts.flattenDiagnosticMessageText(messageText, ' ')}`);
  };
  const kits = { "the React starter kit's tsconfig": [react, ['react.tsx', 'echo.ts', 'plain.ts']], "the Vue starter kit's tsconfig": [vue, ['vue.ts', 'echo.ts', 'plain.ts']] };
  for (const [kit, [options, names]] of Object.entries(kits)) {
    for (const [how, more] of Object.entries({
      strict: { strict: true, allowJs: true },
      'not strict': { strict: false, allowJs: true },
      'strict, without allowJs': { strict: true },
      'strict, exactOptionalPropertyTypes and more': { strict: true, exactOptionalPropertyTypes: true, ...own },
      'strict, checkJs': { strict: true, allowJs: true, checkJs: true },
    })) {
      test(`${kit}, ${how}`, () => {
        assert.deepEqual(errors({ ...options, ...more }, [...names, ...(more.checkJs ? ['plain.js'] : [])]), []);
      });
    }
  }
  test('checkJs over every .js, as a tsconfig without "include" has it: the file itself is looked at, too', () => {
    writeFileSync(join(app, 'tsconfig.json'), JSON.stringify({ compilerOptions: { ...common, strict: true, allowJs: true, checkJs: true, types: ['vite/client'] }, include: ['resources/js/p*.js'], exclude: ['resources/js/page.js'] }));
    const { fileNames } = ts.parseJsonConfigFileContent(ts.readConfigFile(join(app, 'tsconfig.json'), ts.sys.readFile).config, ts.sys, app);
    assert.ok(fileNames.some((name) => name.endsWith('pusher-socketio.js')));
    assert.deepEqual(errors({ ...common, strict: true, allowJs: true, checkJs: true, types: ['vite/client'] }, fileNames.map((name) => name.replace(`${folder}/`, ''))), []);
  });
  test('skipLibCheck is off: the .d.ts itself is looked at', () => {
    const found = errors({ ...react, strict: true, skipLibCheck: false }, ['echo.ts', 'plain.ts']);
    assert.deepEqual(found.filter((error) => !error.includes('/node_modules/')), []); // other people's libraries have their own
  });
  for (const version of ['pusher-js-5', 'pusher-js-6', 'pusher-js-7.0', 'pusher-js-7.6', 'pusher-js-8.4', 'pusher-js']) {
    for (const strict of [true, false]) {
      test(`${version}, without Echo and Vite, ${strict ? 'strict' : 'not strict'}`, () => {
        assert.deepEqual(errors({ ...common, strict, types: [], paths: { 'pusher-js': [`./node_modules/${version}/index.d.ts`] } }, ['plain.ts']), []);
      });
    }
  }
  test('laravel-echo 1.19', () => {
    assert.deepEqual(errors({ ...react, strict: true, paths: { 'laravel-echo': ["./node_modules/laravel-echo-1"] } }, ['echo1.ts', 'plain.ts']), []);
  });
  test('a wrong host is told: the types are looked at', () => {
    writeFileSync(join(folder, 'wrong.ts'), "import Pusher from './pusher-socketio';\nexport const pusher = new Pusher('key', { host: 5 });\npusher.nothing();\n");
    const found = errors({ ...common, strict: true, types: [] }, ['wrong.ts']);
    assert.equal(found.length, 2, String(found));
    assert.match(found[0], /^wrong.ts:2 TS2322 /);
    assert.match(found[1], /^wrong.ts:3 TS2339 .*'nothing'/);
  });
});

describe('bundlers', () => {
  test('Vite', async () => {
    const { build } = await import('vite');
    for (const [entry, plugins] of [['page.js', []], ['react.tsx', []], ['vue.ts', [(await import('@vitejs/plugin-vue')).default()]]]) {
      await build({ root: app, logLevel: 'error', plugins, build: { outDir: `vite-${entry}`, rollupOptions: { input: join(folder, entry), onwarn(warning) { throw new Error(warning.message); } } } });
    }
  });
  test("esbuild, to a script that sets window.Pusher", () => {
    esbuild('script.js', 'script.bundle.js');
    assert.equal(typeof loaded('script.bundle.js').Pusher.instances.length, 'number');
  });
  test("webpack 5 with require", async () => {
    const webpack = require('webpack');
    const stats = await new Promise((resolve, reject) =>
      webpack({ mode: 'production', context: app, entry: './resources/js/mix.js', output: { path: app, filename: 'mix.bundle.js' } }, (error, stats) => (error ? reject(error) : resolve(stats))));
    const { errors, warnings } = stats.toJson({ all: false, errors: true, warnings: true });
    assert.deepEqual([errors, warnings], [[], []]);
    assert.equal(typeof loaded('mix.bundle.js').Pusher.instances.length, 'number');
  });
  test("React Native: hermesc compiles what esbuild has bundled", () => {
    esbuild('script.js', 'native.js');
    const hermesc = join(here, 'node_modules/hermes-compiler/hermesc/linux64-bin/hermesc');
    execFileSync(hermesc, ['-emit-binary', '-Wno-undefined-variable', '-out', join(app, 'native.hbc'), join(app, 'native.js')], { stdio: ['ignore', 'ignore', 'inherit'] });
    assert.ok(readFileSync(join(app, 'native.hbc')).length > 10_000);
  });
  const esbuild = (entry, out) => require('esbuild').buildSync({ absWorkingDir: app, entryPoints: [join(folder, entry)], bundle: true, outfile: out, logLevel: 'error' });
  /** What a page's window has after the script. */
  const loaded = (file) => {
    const window = {};
    new Function('window', readFileSync(join(app, file), 'utf8'))(window);
    return window;
  };
});
