/** The forged images of the Rust test kit, written to a folder once per test file. */

import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = fileURLToPath(new URL('../..', import.meta.url))

/** A broken image, where a reader must notice, and with which code. */
export interface Forged {
  readonly name: string
  readonly path: string
  readonly stage: 'open' | 'read' | 'snapshot' | 'bitmaps'
  readonly code: string
  /** For `read`: the guest offset of the broken cluster. */
  readonly position: number | null
  /** For `snapshot`: its name. */
  readonly snapshot: string | null
}

/** A folder that vanishes with the test process. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'qcow2-forged-'))
  process.on('exit', () => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** Builds the images with the forge of `crates/testkit`. */
export function forge(): { folder: string; images: readonly Forged[] } {
  const folder = temporaryFolder()
  const args = ['run', '--quiet', '--package', 'qcow2-testkit', '--example', 'forge', '--', folder]
  execFileSync('cargo', args, { cwd: root, stdio: ['ignore', 'ignore', 'inherit'] })
  const manifest = JSON.parse(readFileSync(join(folder, 'manifest.json'), 'utf8')) as (Forged & { file: string })[]
  return { folder, images: manifest.map(({ file, ...image }) => ({ ...image, path: join(folder, file) })) }
}
