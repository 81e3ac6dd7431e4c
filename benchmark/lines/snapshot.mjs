// Internal snapshots of an image of 1 TiB whose clusters are all mapped: made, and deleted.

import { rmSync } from 'node:fs'
import { race } from '../lib/race.mjs'
import { trial } from '../lib/trial.mjs'

export const line = {
  name: 'snapshot',
  about: 'Internal snapshots of an image of 1 TiB',
  async run(bench) {
    const image = bench.at('snapshots.qcow2')
    const make = () => {
      rmSync(image, { force: true })
      bench.mapped('snapshots.qcow2')
    }
    const withSnapshot = () => {
      make()
      trial(bench.ours('snapshot', '-c', 'one', image))
    }
    const rows = [
      ...race(bench, { name: 'snapshot -c', before: make, sides: bench.both(['snapshot', '-c', 'one', image]) }),
      ...race(bench, {
        name: 'snapshot -d',
        before: withSnapshot,
        sides: bench.both(['snapshot', '-d', 'one', image]),
      }),
    ]
    rmSync(image)
    return { rows, notes: ['All clusters mapped (preallocation=metadata), a new image for each trial.'] }
  },
}
