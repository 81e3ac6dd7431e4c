// Builds the four programs of the app into out/. The library stays a package in node_modules: its addon does not fit into a script.
import { cpSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { build } from 'esbuild'

const at = name => fileURLToPath(new URL(name, import.meta.url))
export const node = { bundle: true, platform: 'node', format: 'cjs', target: 'node20', external: ['electron', 'qcow2'] }
export const web = { bundle: true, platform: 'browser', format: 'iife', target: 'chrome120' }

export async function buildApp(out = at('out')) {
  const node20 = ['main', 'preload', 'jobs-process'].map(name => at(`src/${name}.ts`))
  await build({ ...node, entryPoints: node20, outdir: out })
  await build({ ...web, entryPoints: [at('src/renderer/app.ts')], outdir: out })
  for (const name of ['index.html', 'style.css']) cpSync(at(`src/renderer/${name}`), `${out}/${name}`)
}

if (process.argv[1] === fileURLToPath(import.meta.url)) await buildApp()
