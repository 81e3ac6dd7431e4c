// One job done by several sides in turn, each trial in a fresh process.

import { spawnSync } from 'node:child_process'
import { existsSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { collect, toRows } from './samples.mjs'
import { trial } from './trial.mjs'

/**
 * Runs `job` for as many rounds as the run counts, and one before them that is not counted: it finds memory that the machine may
 * have to ask its host for.
 *
 * A job: `name`; `sides`, by name, ours first: `argv`, `env`, `target` (a file that it makes: its size is told and it is removed),
 * `check` (what says that the target is right, asked once), `read` (its output to more metrics); `before`, run before each
 * trial; `data`, the bytes that it moves; `keepOrder`, where the sides themselves alternate.
 */
export function race(bench, job) {
  bench.say(job.name)
  const found = {}
  const names = Object.keys(job.sides).filter(name => job.sides[name] !== undefined)
  for (let round = bench.quick ? 1 : 0; round <= bench.rounds; round++) {
    // Each is first in turn: the memory that one frees is at hand for the next.
    const turn = round % 2 === 0 || job.keepOrder ? names : names.toReversed()
    for (const name of turn) {
      const measured = once(bench, job, job.sides[name], round <= 1)
      if (round > 0) collect(found, name, measured)
    }
  }
  // In the order of the job, whoever was first.
  return toRows(job.name, Object.fromEntries(names.map(name => [name, found[name] ?? {}])))
}

function once(bench, job, side, verify) {
  job.before?.()
  settle(bench)
  const { wall, cpu, peak, stdout } = trial(side.argv, { env: side.env })
  // A side that says what it measured is a worker: its start is no part of that.
  const measured = side.read ? { ...side.read(stdout), peak } : { wall, cpu, peak }
  if (job.data !== undefined) measured.throughput = job.data / 1e6 / wall
  if (side.target === undefined || !existsSync(side.target)) return measured
  if (side.check && verify && (!bench.quick || side === job.sides.qcow2)) trial(side.check)
  const size = (statSync(side.target).blocks * 512) / 2 ** 20
  rmSync(side.target)
  return { ...measured, size }
}

/** What the trial before left to write back would run into this one; with `--cold`, nothing is in the page cache either. */
function settle(bench) {
  if (bench.quick) return
  spawnSync('sync')
  if (bench.cold) writeFileSync('/proc/sys/vm/drop_caches', '3')
}
