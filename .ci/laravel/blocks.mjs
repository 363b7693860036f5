// Takes blocks out of the README by the paths in argv[4…] and writes them into the application in argv[3]: what changes
// in files that every application has.
// A block under a path that exists already is a part of that file: it goes in place of the line "// README", or, as a diff,
// of the lines that the diff takes away.
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

const [readme, app, ...only] = process.argv.slice(2);
const blocks = [...readFileSync(readme, 'utf8').matchAll(/^\*\*`([^`]+)`\*\*\n+```(\w+)\n([\s\S]*?)^```$/gm)];
if (blocks.length === 0) throw new Error(`${readme} has no code block under a line **\`path\`**`);
const strays = only.filter((path) => !blocks.some((block) => block[1] === path));
if (strays.length) throw new Error(`${readme} has no block ${strays}`);
for (const [, path, language, code] of blocks) {
  if (!only.includes(path)) continue;
  const file = join(app, path);
  let text = code;
  const without = (sign, diff) => diff.split('\n').filter((line) => !line.startsWith(sign)).map((line) => line.slice(1));
  const old = existsSync(file) ? readFileSync(file, 'utf8') : '';
  const place = /^ *\/\/ README\n/m;
  if (place.test(old)) {
    const lines = language === 'diff' ? without('-', code) : code.split('\n');
    const imports = lines.filter((line) => line.startsWith('import '));
    const body = lines.filter((line) => line.trim() && !line.startsWith('import '));
    text = imports.map((line) => line + '\n').join('') + old.replace(place, () => body.join('\n') + '\n');
  } else if (language === 'diff') {
    text = code.split(/^ \n/m).reduce((text, hunk) => {
      const taken = without('+', hunk).join('\n');
      if (!text.includes(taken)) throw new Error(`${path} has neither a line // README nor what the diff takes away:\n${taken}`);
      return text.replace(taken, () => without('-', hunk).join('\n'));
    }, old);
  } else if (old) {
    throw new Error(`${path} is in the README and in the application, or twice in the README`);
  }
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, text);
  console.log(`${path} (${code.trimEnd().split('\n').length} lines)`);
}
