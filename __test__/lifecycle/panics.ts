/**
 * The addon with panics on demand: the same sources, built with the feature `panics` of the binding's crate, in the profile of
 * the Rust tests, so that the engine they built is used again.
 */

import { spawnSync } from 'node:child_process'
import { copyFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('../..', import.meta.url))

/** Whether it can be built here: images for tests alone have no compiler. */
export const possible = !spawnSync('cargo', ['--version'], { stdio: 'ignore' }).error

/** Builds it, and copies it to `path`. */
export function buildPanicking(path: string): void {
  const wanted = ['build', '--package=qcow2-node', '--features=panics', '--message-format=json']
  const { status, stdout, stderr } = spawnSync('cargo', wanted, {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 2 ** 26,
    // The runner's own colours are not for a report that is parsed.
    env: { ...process.env, CARGO_TERM_COLOR: 'never' },
  })
  if (status !== 0) throw new Error(`cargo ${wanted.join(' ')}: ${stderr}`)
  const artifacts = stdout
    .split('\n')
    .filter(line => line.includes('"compiler-artifact"') && line.includes('qcow2_node'))
    .flatMap(line => (JSON.parse(line) as { filenames: string[] }).filenames)
  const built = artifacts.find(name => /\.(so|dylib|dll)$/.test(name))
  if (built === undefined) throw new Error(`cargo built no addon: ${artifacts.join(', ')}`)
  copyFileSync(built, path)
}
