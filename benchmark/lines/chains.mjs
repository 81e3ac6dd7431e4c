// Jobs on backing chains: an overlay whose data is a quarter of the disk is committed, and gets another backing file.

import { randomFillSync } from 'node:crypto'
import { copyFileSync } from 'node:fs'
import { create } from '../../dist/index.js'
import { race } from '../lib/race.mjs'

const MIB = 2 ** 20

/** A base, another one, and an overlay of the first; what is changed is copied before each trial. */
async function makeChain(bench) {
  const size = (bench.quick ? 16 : 2048) * MIB
  const chunk = randomFillSync(Buffer.alloc(MIB))
  /** One MiB of data every `step` MiB. */
  const fill = async (name, step, options) => {
    const image = await create(bench.at(name), { size, ...options })
    for (let position = MIB; position < size; position += step * MIB) await image.write(chunk, { position })
    await image.close()
  }
  await fill('base.qcow2', 3, {})
  await fill('other.qcow2', 2, {})
  copyFileSync(bench.at('base.qcow2'), bench.at('committed.qcow2'))
  await fill('overlay.qcow2', 4, { backingFile: bench.at('committed.qcow2'), backingFormat: 'qcow2' })
}

async function run(bench, names) {
  await bench.once('chain', () => makeChain(bench))
  const before = () => {
    copyFileSync(bench.at('base.qcow2'), bench.at('committed.qcow2'))
    copyFileSync(bench.at('overlay.qcow2'), bench.at('trial.qcow2'))
  }
  const trial = bench.at('trial.qcow2')
  const jobs = {
    commit: ['commit', '-q', trial],
    rebase: ['rebase', '-q', '-F', 'qcow2', '-b', bench.at('other.qcow2'), trial],
    'rebase onto nothing': ['rebase', '-q', '-b', '', trial],
  }
  const rows = names.flatMap(name => race(bench, { name, before, sides: bench.both(jobs[name]) }))
  return { rows, notes: ['Disks of 2 GiB; the overlay has 512 MiB of data, its base 680 MiB, the other base 1 GiB.'] }
}

export const commit = { name: 'commit', about: '`commit` of an overlay', run: bench => run(bench, ['commit']) }

export const rebase = {
  name: 'rebase',
  about: '`rebase` of an overlay',
  run: bench => run(bench, ['rebase', 'rebase onto nothing']),
}
