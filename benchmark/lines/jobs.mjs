// Jobs of a queue: what one, two and four workers on this machine do, each a process with one thread for its job.

import { mkdirSync, rmSync } from 'node:fs'
import { onPath } from '../../.ci/lib.mjs'
import { structured } from '../lib/input.mjs'
import { race } from '../lib/race.mjs'

const SIZE_MIB = 10
const WORKERS = [1, 2, 4]

function jobs(bench, name, times, ...more) {
  const raw = bench.once('small', () => {
    structured(bench.at('small.raw'), SIZE_MIB)
    return bench.at('small.raw')
  })
  const folder = bench.at('jobs')
  const before = () => {
    rmSync(folder, { recursive: true, force: true })
    mkdirSync(folder)
  }
  const side = workers => ({ argv: bench.worker('jobs', raw, folder, times, workers, ...more), read: JSON.parse })
  const named = workers => (workers === 1 ? 'one worker' : `${workers} workers`)
  const sides = Object.fromEntries(WORKERS.map(workers => [named(workers), side(workers)]))
  const rows = race(bench, { name: `${times} ${name} of ${SIZE_MIB} MiB`, before, sides })
  rmSync(folder, { recursive: true })
  return rows
}

export const line = {
  name: 'jobs',
  about: 'Jobs of a queue',
  async run(bench) {
    if (!onPath('redis-server')) {
      bench.skip('redis-server is not installed: jobs of a queue are not measured')
      return { rows: [], notes: [] }
    }
    const [plain, zlib] = bench.quick ? [6, 4] : [100, 40]
    return { rows: [...jobs(bench, 'converts', plain), ...jobs(bench, 'zlib converts', zlib, 'compress')], notes: [] }
  },
}
