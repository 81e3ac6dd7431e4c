/**
 * Walks at random over whole images, by both tools: see `walk.ts`. `QCOW2_WALK_SEEDS` walks more and longer ones, from
 * `QCOW2_TEST_SEED` on; an error has the seed and the steps that led to it, and `QCOW2_WALK_TRACE=1` shows them as they are made.
 */

import { mkdtempSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { it } from 'vitest'
import { describeWithQemu, temporaryFolder } from '../interop/qemu.js'
import { walk } from './walk.js'

const many = Number(process.env['QCOW2_WALK_SEEDS'] ?? 0)
const first = Number(process.env['QCOW2_TEST_SEED'] ?? 1)
const [count, steps] = many > 0 ? [many, 25] : [6, 10]

describeWithQemu('images stay sound and keep their contents', () => {
  const parent = temporaryFolder()

  it.each(Array.from({ length: count }, (_, n) => String(first + n)))('seed %s', { timeout: 600_000 }, async seed => {
    const folder = mkdtempSync(join(parent, 'walk-'))
    await walk(seed, folder, steps)
    rmSync(folder, { recursive: true })
  })
})
