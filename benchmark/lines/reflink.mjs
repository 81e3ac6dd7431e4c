// Converts on a file system that shares extents: their time must not grow with the data.

import { copyFileSync } from 'node:fs'
import { join } from 'node:path'
import { mount, unmount } from '../lib/filesystem.mjs'
import { race } from '../lib/race.mjs'
import { convertJob } from './convert.mjs'

export const line = {
  name: 'reflink',
  about: 'Converts on XFS with shared extents',
  async run(bench) {
    const xfs = mount('xfs', bench.folder, bench.quick ? 512 : 24 * 1024)
    if (xfs === undefined) return { rows: [], notes: [] }
    try {
      const disk = await bench.disk()
      const [raw, qcow2] = ['disk.raw', 'disk.qcow2'].map(name => join(xfs.place, name))
      copyFileSync(disk.path, raw)
      copyFileSync(bench.image('disk.qcow2', disk.path, '-O', 'qcow2'), qcow2)
      const folder = xfs.place
      const rows = [
        convertJob(bench, 'raw to qcow2 on XFS', { source: raw, from: 'raw', to: 'qcow2', folder }),
        convertJob(bench, 'qcow2 to raw on XFS', { source: qcow2, from: 'qcow2', to: 'raw', folder }),
      ].flatMap(job => race(bench, job))
      return { rows, notes: [`${disk.words}; XFS in a loop device.`] }
    } finally {
      unmount(xfs)
    }
  },
}
