// Takes the code blocks out of the README by their paths and writes them into the application in argv[3].
// A block under a path that exists already is the part that a component changes, written as a diff: it goes
// in place of the line "// README", or else of the lines that the diff takes away. Paths after argv[3] are all that is written.
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';

const [readme, app, ...only] = process.argv.slice(2);
const blocks = [...readFileSync(readme, 'utf8').matchAll(/^\*\*`([^`]+)`\*\*\n+```(\w+)\n([\s\S]*?)^```$/gm)];
if (blocks.length === 0) throw new Error(`${readme} has no code block under a line **\`path\`**`);
const strays = only.filter((path) => !blocks.some((block) => block[1] === path));
if (strays.length) throw new Error(`${readme} has no block ${strays}`);
for (const [, path, language, code] of blocks) {
  if (only.length && !only.includes(path)) continue;
  const file = join(app, path);
  let text = code;
  if (language === 'diff') {
    const without = (sign, diff) => diff.split('\n').filter((line) => !line.startsWith(sign)).map((line) => line.slice(1));
    const after = without('-', code);
    const imports = after.filter((line) => line.startsWith('import '));
    const body = after.filter((line) => line.trim() && !line.startsWith('import '));
    const component = readFileSync(file, 'utf8');
    const place = /^ *\/\/ README\n/m;
    if (place.test(component)) text = imports.map((line) => line + '\n').join('') + component.replace(place, () => body.join('\n') + '\n');
    else text = code.split(/^ \n/m).reduce((text, hunk) => {
      const old = without('+', hunk).join('\n');
      if (!text.includes(old)) throw new Error(`${path} has neither a line // README nor what the diff takes away:\n${old}`);
      return text.replace(old, () => without('-', hunk).join('\n'));
    }, component);
  } else if (existsSync(file)) {
    throw new Error(`${path} is in the README and in the application, or twice in the README`);
  }
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, text);
  console.log(`${path} (${code.trimEnd().split('\n').length} lines)`);
}
