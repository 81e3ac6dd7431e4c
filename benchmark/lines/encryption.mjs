// What LUKS costs: requests from JavaScript on an image with LUKS against the same on a plain one, and the recorded installation on
// LUKS images against a raw disk in a LUKS file.

import { ENCRYPT, SECRET } from '../lib/bench.mjs'
import { structured } from '../lib/input.mjs'
import { race } from '../lib/race.mjs'
import { MODES, replaySide } from './installation.mjs'

const BLOCK = 4096

function requests(bench) {
  const sizeMiB = bench.quick ? 8 : 256
  const raw = bench.at('luks-requests.raw')
  structured(raw, sizeMiB)
  const plain = bench.image('luks-plain.qcow2', raw, '-O', 'qcow2', '-S', 0)
  const luks = bench.image('luks-requests.qcow2', raw, '-O', 'qcow2', '-S', 0, ...SECRET, '-o', ENCRYPT)
  const range = [
    '--size',
    sizeMiB * 2 ** 20,
    '--step',
    4097 * BLOCK,
    '--count',
    1e9,
    '--seconds',
    bench.quick ? 0.05 : 0.5,
  ]
  const side = (kind, depth, image, ...more) => ({
    argv: bench.worker(
      'requests',
      '--by',
      'image',
      '--image',
      image,
      '--format',
      'qcow2',
      '--kind',
      kind,
      '--cache',
      'writeback',
      '--depth',
      depth,
      ...range,
      ...more,
    ),
    read: stdout => JSON.parse(stdout),
  })
  const depths = bench.quick ? [32] : [1, 32]
  return ['read', 'write'].flatMap(kind =>
    depths.flatMap(depth =>
      race(bench, {
        name: `${kind}, depth ${depth}, JavaScript`,
        sides: { LUKS: side(kind, depth, luks, '--luks'), plain: side(kind, depth, plain) },
      }),
    ),
  )
}

function installation(bench) {
  const modes = bench.quick ? ['writeback'] : MODES
  return modes.flatMap(mode =>
    race(bench, {
      name: `installation, ${mode}`,
      sides: Object.fromEntries(
        ['qcow2', 'raw'].map(format => [
          `${format} with LUKS`,
          replaySide(bench, { by: 'ours', format, mode, dir: bench.folder, more: ['--luks'] }),
        ]),
      ),
    }),
  )
}

export const line = {
  name: 'encryption',
  about: 'What LUKS costs',
  async run(bench) {
    return {
      rows: [...requests(bench), ...installation(bench)],
      notes: ['Allocated images, page cache; the installation on the folder’s own disk.'],
    }
  },
}
