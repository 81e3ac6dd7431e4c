// Jobs on backing chains: an overlay whose data is a quarter of the disk is committed, and gets another backing file.

import { randomFillSync } from 'node:crypto'
import { copyFileSync } from 'node:fs'
import { join } from 'node:path'
import { create } from '../dist/index.js'

const MIB = 2 ** 20

/** The jobs in `place`, on a disk of `sizeMiB`. Both sides change copies that are made before each trial. */
export async function chainJobs(place, sizeMiB, ours, theirs) {
  const at = name => join(place, name)
  const chunk = randomFillSync(Buffer.alloc(MIB))
  /** One MiB of data every `step` MiB. */
  const fill = async (name, step, options) => {
    const image = await create(at(name), { size: sizeMiB * MIB, ...options })
    for (let position = MIB; position < sizeMiB * MIB; position += step * MIB) await image.write(chunk, { position })
    await image.close()
  }
  await fill('base.qcow2', 3, {})
  await fill('other.qcow2', 2, {})
  copyFileSync(at('base.qcow2'), at('committed.qcow2'))
  await fill('overlay.qcow2', 4, { backingFile: at('committed.qcow2'), backingFormat: 'qcow2' })
  const before = () => {
    copyFileSync(at('base.qcow2'), at('committed.qcow2'))
    copyFileSync(at('overlay.qcow2'), at('trial.qcow2'))
  }
  const job = (name, ...args) => ({
    name,
    before,
    ours: ours(...args, at('trial.qcow2')),
    theirs: theirs(...args, at('trial.qcow2')),
  })
  return [
    job('commit', 'commit', '-q'),
    job('rebase', 'rebase', '-q', '-F', 'qcow2', '-b', at('other.qcow2')),
    job('rebase onto nothing', 'rebase', '-q', '-b', ''),
  ]
}
