// What pack.mjs makes of the library: one file, which is found, read and compiled twice as fast as its modules; one for each further entry of the
// package, which takes what it shares with the library from there; and the types.
import { readdirSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join, relative, resolve } from 'node:path'
import { build } from 'esbuild'
import { manifest, root } from './lib.mjs'

/** Files of dist/ that stay as they are: what runs, and what finds the addon, which tracers look into. */
const KEPT = ['addon.js', 'cli.js', 'command-line.js']

/** Names stay, for stacks; so do lines. */
const HOW = {
  absWorkingDir: root,
  bundle: true,
  platform: 'node',
  format: 'cjs',
  target: 'node20',
  logLevel: 'warning',
}
const external = ['./addon.js', '*/library.js', ...Object.keys(manifest.peerDependencies ?? {})]

/** The entries, by the files that `require` loads: the library itself, then the others. */
const [library, ...others] = Object.values(manifest.exports).flatMap(entry => entry.require?.default ?? [])
const sourceOf = entry => entry.replace('./dist/', './src/').replace(/\.js$/, '.ts')
const slashes = path => path.replaceAll('\\', '/')

/** Replaces the modules of the library in `folder`, a copy of dist/. */
export async function bundleLibrary(folder) {
  for (const name of readdirSync(folder, { recursive: true, encoding: 'utf8' })) {
    if (name.endsWith('.js') && !KEPT.includes(name)) rmSync(join(folder, name))
  }
  const shared = new Set()
  for (const entry of others) await bundleEntry(entry, folder, shared)
  const modules = [...shared]
  const contents = [
    `export * from '${sourceOf(library)}'`,
    ...modules.map((name, n) => `import * as shared${n} from ${JSON.stringify(name)}`),
    `export const sharedModules = { ${modules.map((name, n) => `${JSON.stringify(name)}: shared${n}`).join(', ')} }`,
  ]
  const stdin = { contents: contents.join('\n'), resolveDir: root, loader: 'js' }
  await build({ ...HOW, stdin, outfile: join(folder, 'library.js'), external })
  // Node tells those who import it what there is by looking at the text: hence the names.
  const names = Object.keys(createRequire(import.meta.url)(join(root, library))).filter(name => name !== '__esModule')
  const text = [
    `'use strict'`,
    `const { ${names.join(', ')} } = require('./library.js')`,
    `module.exports = { ${names.join(', ')} }`,
    `Object.defineProperty(module.exports, '__esModule', { value: true })`,
  ]
  writeFileSync(join(folder, relative('dist', library)), `${text.join('\n')}\n`)
}

/** A further entry: what lies in its own folder is its own, everything else the library's, so that a class is one class. */
async function bundleEntry(entry, folder, shared) {
  const outfile = join(folder, relative('dist', entry))
  const own = join(root, dirname(sourceOf(entry)))
  const back = slashes(relative(dirname(outfile), join(folder, 'library.js')))
  const takeShared = {
    name: 'what the library has',
    setup({ onResolve, onLoad }) {
      onResolve({ filter: /^\.\.?\// }, ({ path, importer, resolveDir }) => {
        if (importer === '' || path.endsWith('library.js')) return undefined
        const file = resolve(resolveDir, path.replace(/\.js$/, '.ts'))
        return file.startsWith(own) ? undefined : { path: `./${slashes(relative(root, file))}`, namespace: 'shared' }
      })
      onLoad({ filter: /.*/, namespace: 'shared' }, ({ path }) => {
        shared.add(path)
        return {
          contents: `module.exports = require('${back}').sharedModules[${JSON.stringify(path)}]`,
          resolveDir: dirname(outfile),
        }
      })
    },
  }
  await build({ ...HOW, entryPoints: [sourceOf(entry)], outfile, external, plugins: [takeShared] })
}
