/** What messages say: the file, the value, what is possible, and the way out that the call itself has. */

import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  amend,
  check,
  commit,
  compact,
  compare,
  convert,
  create,
  inspect,
  measure,
  open,
  type Qcow2Error,
  rebase,
} from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { takenBy } from '../../src/support/option-hints.js'
import { failure, temporaryFolder, writeRaw } from './fixtures.js'

const folder = temporaryFolder()
const [raw, image, v2, qed, target] = ['disk.raw', 'disk.qcow2', 'v2.qcow2', 'disk.qed', 'target'].map(name =>
  join(folder, name),
) as [string, string, string, string, string]

beforeAll(async () => {
  writeRaw(raw, 1 << 20, [[0, 4096]])
  writeFileSync(qed, Buffer.concat([Buffer.from('QED\0'), Buffer.alloc(1020)]))
  await (await create(image, { size: 1 << 20 })).close()
  await (await create(v2, { size: 1 << 20, version: 2 })).close()
})

type Loose = (...values: unknown[]) => Promise<unknown>
const functions = { amend, check, commit, compact, compare, convert, create, inspect, measure, open, rebase }
const call = (name: keyof typeof functions, ...values: unknown[]) => (functions[name] as Loose)(...values)
const truncate = async (options?: object): Promise<unknown> => {
  await using disk = await open(image, { flags: 'r+' })
  // Awaited here: closing comes first otherwise, and nobody handles the rejection meanwhile.
  return await (disk.truncate as Loose).call(disk, 512, options)
}

const CASES: readonly [name: string, run: () => Promise<unknown>, said: string][] = [
  // A raw disk: each call names its own option.
  [
    'open raw',
    () => call('open', raw),
    "disk.raw: not a qcow2 image (no magic number in its first bytes); for a raw disk say so: format: 'raw'",
  ],
  ['convert raw', () => call('convert', raw, target, { to: 'raw' }), "say so: from: 'raw'"],
  ['convert several', () => call('convert', [image, raw], target, { to: 'raw' }), "say so: from: ['qcow2', 'raw']"],
  ['measure raw', () => call('measure', raw, { to: 'raw' }), "say so: from: 'raw'"],
  ['compare raw', () => call('compare', raw, image), "say so: formatA: 'raw'"],
  ['compare with raw', () => call('compare', image, raw), "say so: formatB: 'raw'"],
  ['open qed', () => call('open', qed), "of a qed image, which is not supported (format: 'raw' takes it"],
  ['convert qed', () => call('convert', qed, target, { to: 'raw' }), "(from: 'raw' takes it"],
  // Options that are known elsewhere, by another name, or misspelt.
  [
    'convert: format',
    () => call('convert', image, target, { format: 'raw' }),
    "convert takes 'to' for the target's format and 'from' for the source's",
  ],
  ['measure: format', () => call('measure', image, { format: 'raw' }), "measure takes 'to' for the target's format"],
  ['compare: format', () => call('compare', image, raw, { format: 'raw' }), "compare takes 'formatA' and 'formatB'"],
  [
    'convert: clusterSize',
    () => call('convert', image, target, { to: 'qcow2', clusterSize: 512 }),
    "it belongs into 'create': { clusterSize",
  ],
  [
    'convert: level',
    () => call('convert', image, target, { to: 'qcow2', level: 9 }),
    "it belongs into 'compress': { level",
  ],
  ['open: maxSnapshots', () => call('open', image, { maxSnapshots: 1 }), "it belongs into 'limits': { maxSnapshots"],
  ['open: readOnly', () => call('open', image, { readOnly: true }), "'r' is for reading, 'r+' for reading and writing"],
  ['open: repair', () => call('open', image, { repair: 'all' }), 'it is an option of check; here known are'],
  [
    'inspect: references',
    () => call('inspect', image, { references: 'deny' }),
    'it is an option of calls that open an image',
  ],
  [
    'convert: overwrte',
    () => call('convert', image, target, { to: 'raw', overwrte: true }),
    "did you mean 'overwrite'?",
  ],
  [
    'convert: constructor',
    () => call('convert', image, target, { constructor: 1 }),
    "unknown option 'constructor': known are",
  ],
  ['Image.truncate: force', () => truncate({ force: true }), "Image.truncate takes 'shrink' for a smaller size"],
  // Values, with the range that they have where they are used.
  [
    'zlib 50',
    () => call('convert', image, target, { to: 'qcow2', compress: { level: 50 } }),
    'compress.level must be 1 to 12 for zlib, not 50 (zstd has 1 to 22)',
  ],
  [
    'zlib 15',
    () => call('convert', image, target, { to: 'qcow2', compress: { level: 15 } }),
    '1 to 12 for zlib, not 15',
  ],
  [
    'a compression that is a word',
    () => call('convert', image, target, { to: 'qcow2', compress: 'zlib' }),
    "compress must be true, false or { type, level, window }, not 'zlib'",
  ],
  ['zlib 0', () => call('convert', image, target, { to: 'qcow2', compress: { level: 0 } }), '1 to 12 for zlib, not 0'],
  [
    'zstd 23',
    () => call('convert', image, target, { to: 'qcow2', compress: { type: 'zstd', level: 23 } }),
    '1 to 22 for zstd, not 23 (zlib has 1 to 12)',
  ],
  [
    'zstd by the shape',
    () => call('convert', image, target, { to: 'qcow2', compress: { level: 40 }, create: { compressionType: 'zstd' } }),
    '1 to 22 for zstd, not 40',
  ],
  [
    'level of a word',
    () => call('convert', image, target, { to: 'qcow2', compress: { level: 'best' } }),
    "zlib has 1 to 12, zstd 1 to 22, not 'best'",
  ],
  [
    'truncate',
    () => truncate(),
    'shrinking from 1048576 to 512 bytes would lose 0 bytes of data: set shrink if that is meant',
  ],
  [
    'amend a size',
    () => call('amend', image, { size: 512 }),
    'a size of 512 bytes cuts off a disk of 1048576 bytes, and what lies behind is lost: say shrink: true if that is meant',
  ],
  [
    'measure a snapshot of raw',
    () => call('measure', raw, { from: 'raw', to: 'raw', snapshot: 'x' }),
    'a raw image has no snapshots',
  ],
  [
    'convert a snapshot of raw',
    () => call('convert', [raw], target, { from: ['raw'], to: 'raw', snapshot: 'x' }),
    `${raw}: a raw image has no snapshots`,
  ],
  [
    'measure a format of a size',
    () => call('measure', { size: 512 }, { from: 'raw', to: 'raw' }),
    'from is for an image, not for a size',
  ],
  [
    'bitmaps of version 2',
    () => call('convert', v2, target, { to: 'qcow2', bitmaps: true }),
    `${v2}: an image of version 2 has no bitmaps`,
  ],
  [
    'bitmaps into version 2',
    () => call('convert', image, v2, { to: 'qcow2', bitmaps: true, existingTarget: true }),
    `${v2}: an image of version 2 has no bitmaps`,
  ],
]

describe.each(CASES)('%s', (_, run, said) => {
  it('says so', async () => {
    const error = await failure(run)
    expect(error.message).toContain(said)
    expect(error.code).toMatch(/^ERR_QCOW2_/)
  })
})

describe.skipIf(process.platform !== 'linux')('an image that this process itself has open', () => {
  it('is told apart from one of another process', async () => {
    const said = async (run: () => Promise<unknown>): Promise<Qcow2Error> => {
      const error = await failure(run)
      expect(error).toMatchObject({ code: 'ERR_QCOW2_LOCKED', path: image })
      return error
    }
    {
      await using writer = await open(image, { flags: 'r+' })
      expect((await said(() => open(image))).message).toContain(
        'this process has it open for writing: close that first',
      )
      expect((await said(() => convert(raw, image, { from: 'raw', to: 'qcow2', overwrite: true }))).message).toContain(
        'this process has it open for writing',
      )
      expect(writer.closed).toBe(false)
    }
    {
      await using reader = await open(image)
      expect((await said(() => open(image, { flags: 'r+' }))).message).toContain('this process has it open for reading')
      expect(reader.closed).toBe(false)
    }
    await (await open(image, { flags: 'r+' })).close()
  })
})

describe('the calls that hints name', () => {
  // A wrong value for an option that the call knows is not "unknown".
  it.each(Object.keys(functions) as (keyof typeof functions)[])('%s takes what it is said to take', async name => {
    const first =
      name === 'measure' || name === 'inspect' || name === 'open' || name === 'check' ? [image] : [image, image]
    for (const option of OPTIONS) {
      const named = takenBy(option)?.split(/, | and /) ?? []
      const error = await failure(() => call(name, ...argumentsOf(name, first), { [option]: Symbol('wrong') }))
      const unknown = error.message.includes('unknown option')
      if (named.includes(name)) expect(unknown, `${name} has ${option}`).toBe(false)
    }
  })
})

const OPTIONS = [
  ...[
    'flags',
    'format',
    'discard',
    'lazyRefcounts',
    'l2CacheSize',
    'cache',
    'detectZeroes',
    'snapshot',
    'overwrite',
    'from',
    'to',
  ],
  ...[
    'compress',
    'salvage',
    'sparseSize',
    'existingTarget',
    'targetIsZero',
    'bitmaps',
    'base',
    'rate',
    'drop',
    'shrink',
    'repair',
  ],
  ...['strict', 'formatA', 'formatB', 'unsafe', 'acknowledgeDataLoss', 'mode', 'zeroes', 'dryRun'],
]

function argumentsOf(name: string, files: readonly string[]): readonly unknown[] {
  if (name === 'create' || name === 'amend' || name === 'commit' || name === 'compact') return files.slice(0, 1)
  return name === 'convert' ? [image, target] : files
}
