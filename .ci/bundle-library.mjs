// What pack.mjs makes of the library: one file, which is found, read and compiled twice as fast as its modules, a file for each entry of the package, and the types.
import { readdirSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join, relative } from 'node:path'
import { build } from 'esbuild'
import { manifest, root } from './lib.mjs'

/** Files of dist/ that stay as they are: what runs, and what finds the addon, which tracers look into. */
const KEPT = ['addon.js', 'cli.js', 'command-line.js']

/** The entries, by the files that `require` loads. */
const entries = Object.values(manifest.exports).flatMap(entry => entry.require?.default ?? [])
const sourceOf = entry => entry.replace('./dist/', './src/').replace(/\.js$/, '.ts')

/** Replaces the modules of the library in `folder`, a copy of dist/, by one. Names stay, for stacks; so do lines. */
export async function bundleLibrary(folder) {
  const require = createRequire(import.meta.url)
  const names = entries.map(entry => Object.keys(require(join(root, entry))).filter(name => name !== '__esModule'))
  for (const name of readdirSync(folder, { recursive: true, encoding: 'utf8' })) {
    if (name.endsWith('.js') && !KEPT.includes(name)) rmSync(join(folder, name))
  }
  // An entry that nobody asks for is not run.
  const all = entries.map((entry, n) => `exports.entry${n} = () => require('${sourceOf(entry)}')`)
  await build({
    absWorkingDir: root,
    stdin: { contents: all.join('\n'), resolveDir: root, loader: 'js' },
    outfile: join(folder, 'library.js'),
    bundle: true,
    platform: 'node',
    format: 'cjs',
    target: 'node20',
    external: ['./addon.js', ...Object.keys(manifest.peerDependencies ?? {})],
    logLevel: 'warning',
  })
  for (const [n, entry] of entries.entries()) {
    const file = join(folder, relative('dist', entry))
    const library = `./${relative(dirname(file), join(folder, 'library.js')).replaceAll('\\', '/')}`
    // Node tells those who import it what there is by looking at the text: hence the names.
    const text = [
      `'use strict'`,
      `const library = require('${library}')`,
      `module.exports = library.entry${n}()`,
      `0 && (module.exports = { ${names[n].join(', ')} })`,
    ]
    writeFileSync(file, `${text.join('\n')}\n`)
  }
}
