/** A disk goes from each format into each other one, and is the same. */

import { join } from 'node:path'
import { type ConvertOptions, compare, convert, type TargetFormat } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { TARGET_FORMATS } from '../../src/formats/table.js'
import { workspace } from '../cli/run.js'
import { writeDisk } from './both.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
/** Of LUKS a conversion takes as long as its key. */
const FORMATS = TARGET_FORMATS.filter(format => format !== 'luks')
/** The size of a VHD without `forceSize` is that of a geometry. */
const SHAPES: Partial<Record<TargetFormat, object>> = { vpc: { forceSize: true }, parallels: { clusterSize: 65536 } }

const into = (to: TargetFormat): ConvertOptions => ({ to, create: SHAPES[to], overwrite: true }) as ConvertOptions

beforeAll(() => {
  writeDisk(at('disk.raw'), 5 * 2 ** 20 + 512)
})

describe('every pair of formats', () => {
  it.each(FORMATS)('from %s', async from => {
    const source = at(`source.${from}`)
    await convert(at('disk.raw'), source, { from: 'raw', ...into(from) })
    for (const to of FORMATS) {
      const target = at(`${from}.${to}`)
      await convert(source, target, { from, ...into(to) })
      const { identical, sizesDiffer } = await compare(at('disk.raw'), target, { formatA: 'raw', formatB: to })
      expect({ to, identical, sizesDiffer }).toEqual({ to, identical: true, sizesDiffer: false })
    }
  })
})
