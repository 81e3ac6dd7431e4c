// What pack.mjs makes of the library: one file, which is found, read and compiled twice as fast as seventy, and its types.
import { readdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { build } from 'esbuild'
import { root } from './lib.mjs'

/** Files of dist/ that stay as they are: what runs, and what finds the addon, which tracers look into. */
const KEPT = ['addon.js', 'cli.js', 'command-line.js']

/** Replaces the modules of the library in `folder`, a copy of dist/, by one. Names stay, for stacks; so do lines. */
export async function bundleLibrary(folder) {
  for (const name of readdirSync(folder, { recursive: true, encoding: 'utf8' })) {
    if (name.endsWith('.js') && !KEPT.includes(name)) rmSync(join(folder, name))
  }
  await build({
    absWorkingDir: root,
    entryPoints: ['src/index.ts'],
    outfile: join(folder, 'index.js'),
    bundle: true,
    platform: 'node',
    format: 'cjs',
    target: 'node20',
    external: ['./addon.js'],
    logLevel: 'warning',
  })
}
