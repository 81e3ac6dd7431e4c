// The installation for real: a guest that installs Debian onto a disk that our NBD server serves, qcow2 and raw. The guest computes under TCG, so its
// processor takes most of the time: what a disk costs shows in it as it would for a person who waits.

import { quietDevice, unmount } from '../lib/filesystem.mjs'
import { guest, missing } from '../lib/guest.mjs'
import { race } from '../lib/race.mjs'

const DISK_MIB = 3 * 1024

export const line = {
  name: 'guest',
  about: 'A guest installs Debian through the NBD server',
  alone: true,
  async run(bench) {
    const reason = bench.quick ? 'it takes minutes' : missing()
    if (reason !== undefined) {
      bench.skip(`a guest's installation: ${reason}`)
      return { rows: [], notes: [] }
    }
    const { kernel, initramfs, source } = guest()
    const quiet = quietDevice(DISK_MIB)
    try {
      const folder = quiet?.place ?? bench.folder
      const side = format => ({
        argv: bench.worker('guest', folder, format, kernel, initramfs, source),
        read: JSON.parse,
      })
      const rows = race(bench, {
        name: `Debian's base system, ${quiet ? 'quiet device' : 'shared disk'}, cache none`,
        sides: { qcow2: side('qcow2'), raw: side('raw') },
      })
      return { rows, notes: ['From mkfs to the last sync, by the clock outside. TCG, one processor.'] }
    } finally {
      if (quiet) unmount(quiet)
    }
  },
}
