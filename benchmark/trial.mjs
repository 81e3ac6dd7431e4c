// One trial: a program in a process of its own, its wall time, and its peak memory and CPU time where GNU time is there.

import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'

const GNU_TIME = existsSync('/usr/bin/time') ? '/usr/bin/time' : undefined
const MARK = 'qcow2-trial'

/** Runs `[program, ...args]` to its end. */
export function trial([program, ...args]) {
  const measured = GNU_TIME ? [GNU_TIME, '-f', `${MARK} %U %S %M`, program, ...args] : [program, ...args]
  const begin = process.hrtime.bigint()
  const { status, stdout, stderr, error } = spawnSync(measured[0], measured.slice(1), {
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
  })
  const wall = Number(process.hrtime.bigint() - begin) / 1e9
  if (error) throw error
  if (status !== 0) throw new Error(`${program} ${args.join(' ')} ended with ${status}\n${stdout}${stderr}`)
  const found = new RegExp(`^${MARK} (\\S+) (\\S+) (\\S+)$`, 'm').exec(stderr)
  return {
    wall,
    stdout,
    cpu: found ? Number(found[1]) + Number(found[2]) : undefined,
    peakMiB: found ? Number(found[3]) / 1024 : undefined,
  }
}

export function median(numbers) {
  const known = numbers.filter(number => number !== undefined).toSorted((a, b) => a - b)
  const middle = known.length / 2
  // Of an even number, what is between the two in the middle.
  const [low, high] = [known[Math.ceil(middle) - 1], known[Math.floor(middle)]]
  return low === undefined ? undefined : (low + high) / 2
}
