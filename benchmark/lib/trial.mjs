// One trial: a program in a process of its own, its wall time, and its peak memory and CPU time where GNU time is there.

import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'

const GNU_TIME = existsSync('/usr/bin/time') ? '/usr/bin/time' : undefined
const MARK = 'qcow2-trial'

/** Runs `[program, ...args]` to its end; times in seconds, the peak of resident memory in MiB. */
export function trial([program, ...args], { env, input } = {}) {
  // What a process was before it became another program counts as its memory: so the small program starts it, not Node.
  const measured = GNU_TIME ? [GNU_TIME, '-f', `${MARK} %U %S %M`, program, ...args] : [program, ...args]
  const begin = process.hrtime.bigint()
  const { status, stdout, stderr, error } = spawnSync(measured[0], measured.slice(1).map(String), {
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
    input,
    env: env ? { ...process.env, ...env } : process.env,
  })
  const wall = Number(process.hrtime.bigint() - begin) / 1e9
  if (error) throw error
  if (status !== 0) throw new Error(`${program} ${args.join(' ')} ended with ${status}\n${stdout}${stderr}`)
  const found = new RegExp(`^${MARK} (\\S+) (\\S+) (\\S+)$`, 'm').exec(stderr)
  return {
    wall,
    stdout,
    cpu: found ? Number(found[1]) + Number(found[2]) : undefined,
    peak: found ? Number(found[3]) / 1024 : undefined,
  }
}
