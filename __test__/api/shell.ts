/** Commands whose bytes matter: Node can start a program only with arguments that are UTF-8, a shell with any. */

import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const CLI = fileURLToPath(new URL('../../dist/cli.js', import.meta.url))
/** The built library, for scripts that load it. */
export const LIBRARY = fileURLToPath(new URL('../../dist/index.js', import.meta.url))

export interface Printed {
  readonly code: number | null
  readonly stdout: Buffer
  readonly stderr: Buffer
}

/** Runs a script in a folder. Its characters are its bytes (Latin-1); `qcow2` in it is this command line. */
export function shell(folder: string | Buffer, script: string, env: NodeJS.ProcessEnv = {}): Printed {
  const home = mkdtempSync(join(tmpdir(), 'qcow2-shell-'))
  try {
    const file = join(home, 'script')
    const lines = ['qcow2() { "$QCOW2_NODE" "$QCOW2_CLI" "$@"; }', 'cd "$1" || exit 99', script, '']
    const quoted = Buffer.from(`set -- '${Buffer.from(folder).toString('latin1')}'\n`, 'latin1')
    writeFileSync(file, Buffer.concat([quoted, Buffer.from(lines.join('\n'), 'latin1')]))
    const { status, stdout, stderr } = spawnSync('sh', [file], {
      env: { ...process.env, LC_ALL: 'C', QCOW2_CLI: CLI, QCOW2_NODE: process.execPath, ...env },
    })
    return { code: status, stdout, stderr }
  } finally {
    rmSync(home, { recursive: true, force: true })
  }
}
