/** Programs in processes of their own: what a process does at its end cannot be seen from inside. */

import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'

export const library = fileURLToPath(new URL('../../dist/index.js', import.meta.url))

export interface Ended {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string
}

/** Runs a CommonJS program in Node; `qcow2` is the library in it. */
export function runNode(
  program: string,
  { flags = [], env = {}, args = [] }: { flags?: string[]; env?: NodeJS.ProcessEnv; args?: string[] } = {},
): Ended {
  const source = `const qcow2 = require(${JSON.stringify(library)})\n${program}`
  const { status, signal, stdout, stderr } = spawnSync(process.execPath, [...flags, '-e', source, '--', ...args], {
    encoding: 'utf8',
    env: { ...process.env, ...env },
    timeout: 60_000,
  })
  return { code: status, signal, stdout, stderr }
}
