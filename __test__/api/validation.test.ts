/** Wrong arguments: refused asynchronously, with a code, the name of the argument, and the caller in the stack. */

import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { check, compare, convert, create, inspect, measure, open, probe } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { failure, openRaw, temporaryFolder, writeRaw } from './fixtures.js'

const folder = temporaryFolder()
const target = join(folder, 'target')
let raw = ''
let empty = ''

beforeAll(async () => {
  raw = writeRaw(join(folder, 'disk.raw'), 1 << 20, [[0, 4096]])
  empty = join(folder, 'empty.qcow2')
  await (await create(empty, { size: 1 << 20 })).close()
})

type Loose = (...values: unknown[]) => Promise<unknown>
const functions = { check, compare, convert, create, inspect, measure, open, probe }
const loose = (name: keyof typeof functions): Loose => functions[name] as Loose

const long = 2 ** 31
const cases: [name: string, call: () => Promise<unknown>, field: RegExp][] = [
  // Where the image is.
  ['open nothing', () => loose('open')(), /source/],
  ['open a number', () => loose('open')(3), /source/],
  ['open an empty name', () => loose('open')(''), /source/],
  ['open a name with a null character', () => loose('open')('a\0b'), /source/],
  ['open bytes with a null character', () => loose('open')(Buffer.from('a\0b')), /source/],
  ['open an http URL', () => loose('open')(new URL('http://example.org/a')), /source/],
  ['open a plain object', () => loose('open')({ path: 'a' }), /source/],
  ['create nowhere', () => loose('create')(undefined, { size: 512 }), /path/],
  ['create on a handle', () => loose('create')({ fd: 3 }, { size: 512 }), /path/],
  ['convert to nowhere', () => loose('convert')(empty, undefined, { to: 'raw' }), /target/],
  ['compare with nothing', () => loose('compare')(empty), /b/],
  ['check nothing', () => loose('check')(), /source/],
  ['inspect nothing', () => loose('inspect')(), /source/],
  ['probe nothing', () => loose('probe')(null), /source/],
  // Options.
  ['open with a misspelt option', () => loose('open')(empty, { reference: 'allow' }), /reference/],
  ['open with an unknown format', () => loose('open')(empty, { format: 'qed' }), /format/],
  ['open with flags of another kind', () => loose('open')(empty, { flags: 'w+' }), /flags/],
  ['open with a wrong policy', () => loose('open')(empty, { references: true }), /references/],
  ['open with a wrong signal', () => loose('open')(empty, { signal: {} }), /signal/],
  ['open with a wrong limit', () => loose('open')(empty, { limits: { maxSnapshots: -1 } }), /maxSnapshots/],
  ['open with a misspelt limit', () => loose('open')(empty, { limits: { maxSnapshot: 1 } }), /maxSnapshot/],
  ['open a snapshot of a raw disk', () => loose('open')(raw, { format: 'raw', snapshot: '1' }), /snapshot/],
  ['open with a cache beyond 2^53', () => loose('open')(empty, { l2CacheSize: 2n ** 53n + 1n }), /l2CacheSize/],
  ['open with a string for options', () => loose('open')(empty, 'raw'), /options/],
  ['create without a size', () => loose('create')(target, {}), /size/],
  ['create without options', () => loose('create')(target), /size/],
  ['create a negative size', () => loose('create')(target, { size: -1 }), /size/],
  ['create a fraction', () => loose('create')(target, { size: 0.5 }), /size/],
  ['create beyond 2^53', () => loose('create')(target, { size: 2n ** 63n }), /size/],
  ['create version 4', () => loose('create')(target, { size: 512, version: 4 }), /version/],
  ['create odd clusters', () => loose('create')(target, { size: 512, clusterSize: 65535 }), /^clusterSize$/],
  ['create small clusters', () => loose('create')(target, { size: 512, clusterSize: 256 }), /clusterSize/],
  ['create odd refcounts', () => loose('create')(target, { size: 512, refcountBits: 3 }), /refcountBits/],
  ['create on an untyped backing file', () => loose('create')(target, { backingFile: empty }), /backingFormat/],
  [
    'create with a format of nothing',
    () => loose('create')(target, { size: 1, backingFormat: 'raw' }),
    /backingFormat/,
  ],
  [
    'create raw with clusters',
    () => loose('create')(target, { format: 'raw', size: 1, clusterSize: 512 }),
    /clusterSize/,
  ],
  ['create a raw data file of nothing', () => loose('create')(target, { size: 1, dataFileRaw: true }), /dataFileRaw/],
  [
    'create extended L2 in version 2',
    () => loose('create')(target, { size: 512, version: 2, extendedL2: true }),
    /^extendedL2$/,
  ],
  [
    'create on a protocol',
    () => loose('create')(target, { size: 512, backingFile: 'nbd:host:1', backingFormat: 'raw' }),
    /backingFile/,
  ],
  ['convert without a format', () => loose('convert')(empty, target), /to/],
  ['convert to an unknown format', () => loose('convert')(empty, target, { to: 'qed' }), /to/],
  ['convert one layer', () => loose('convert')(empty, target, { to: 'raw', references: 'layer' }), /references/],
  ['compress raw', () => loose('convert')(empty, target, { to: 'raw', compress: true }), /compress/],
  [
    'compress with an unknown codec',
    () => loose('convert')(empty, target, { to: 'qcow2', compress: { type: 'lz4' } }),
    /type/,
  ],
  ['compress beyond', () => loose('convert')(empty, target, { to: 'qcow2', compress: { level: 23 } }), /level/],
  [
    'compress two ways',
    () =>
      loose('convert')(empty, target, { to: 'qcow2', compress: { type: 'zstd' }, create: { compressionType: 'zlib' } }),
    /compress/,
  ],
  ['convert onto a base without its name', () => loose('convert')(empty, target, { to: 'qcow2', base: raw }), /base/],
  [
    'convert onto a name without its base',
    () => loose('convert')(empty, target, { to: 'qcow2', create: { backingFile: raw, backingFormat: 'raw' } }),
    /base/,
  ],
  [
    'convert into an existing image that is to be created',
    () => loose('convert')(empty, target, { to: 'qcow2', existingTarget: true, create: {} }),
    /existing/,
  ],
  [
    'convert onto zeroes in a new file',
    () => loose('convert')(empty, target, { to: 'raw', targetIsZero: true }),
    /targetIsZero/,
  ],
  ['convert with odd holes', () => loose('convert')(empty, target, { to: 'raw', sparseSize: 1000 }), /^sparseSize$/],
  ['convert with no threads', () => loose('convert')(empty, target, { to: 'raw', concurrency: 0 }), /concurrency/],
  [
    'convert with a slow clock',
    () => loose('convert')(empty, target, { to: 'raw', progressInterval: long }),
    /progressInterval/,
  ],
  ['convert with a wrong callback', () => loose('convert')(empty, target, { to: 'raw', onProgress: 1 }), /onProgress/],
  ['convert onto itself', () => loose('convert')(empty, empty, { to: 'raw', overwrite: true }), /^$/],
  ['measure without a format', () => loose('measure')(empty), /to/],
  ['measure a negative size', () => loose('measure')({ size: -1 }, { to: 'raw' }), /size/],
  ['measure a string', () => loose('measure')({ size: '1' }, { to: 'raw' }), /size/],
  ['compare strictly with a string', () => loose('compare')(empty, empty, { strict: 'yes' }), /strict/],
  ['check with a misspelt option', () => loose('check')(empty, { onprogress: () => {} }), /onprogress/],
  ['inspect with an unknown option', () => loose('inspect')(empty, { deep: true }), /deep/],
  ['probe with an unknown option', () => loose('probe')(empty, { format: 'raw' }), /format/],
]

describe.each(cases)('%s', (_, call, field) => {
  it('is refused', async () => {
    const error = await failure(call)
    expect(error.code).toBe('ERR_QCOW2_INVALID_ARGUMENT')
    expect(error.field ?? '').toMatch(field)
    expect(error.field ?? '', 'a name alone').not.toMatch(/[: ]/)
    expect(error.stack).toContain('validation.test.ts')
    expect(existsSync(target)).toBe(false)
  })
})

describe('a read', () => {
  const buffer = Buffer.alloc(16)
  it.each<[string, unknown[], RegExp]>([
    ['without a buffer', [undefined, { position: 0 }], /buffer/],
    ['into a string', ['x', { position: 0 }], /buffer/],
    ['into an ArrayBuffer', [new ArrayBuffer(16), { position: 0 }], /buffer/],
    ['without options', [buffer], /position/],
    ['without a position', [buffer, {}], /position/],
    ['at a string', [buffer, { position: '0' }], /position/],
    ['at a negative position', [buffer, { position: -1 }], /position/],
    ['at a fraction', [buffer, { position: 0.5 }], /position/],
    ['beyond 2^53', [buffer, { position: 2n ** 53n + 1n }], /position/],
    ['with an offset beyond the buffer', [buffer, { position: 0, offset: 17 }], /offset/],
    ['with a length beyond the buffer', [buffer, { position: 0, length: 17 }], /length/],
    ['with a range beyond the buffer', [buffer, { position: 0, offset: 9, length: 8 }], /length/],
    ['with a misspelt option', [buffer, { position: 0, lenght: 8 }], /lenght/],
    ['with a wrong signal', [buffer, { position: 0, signal: 1 }], /signal/],
    ['with an array for options', [buffer, [0]], /options/],
  ])('%s is refused', async (_, values, field) => {
    await using image = await openRaw(raw)
    const error = await failure(() => (image.read as Loose).apply(image, values))
    expect(error.code).toBe('ERR_QCOW2_INVALID_ARGUMENT')
    expect(error.field).toMatch(field)
    expect(error.field, 'a name alone').not.toMatch(/[: ]/)
    expect(error.stack).toContain('validation.test.ts')
  })

  it.each<[string, unknown[], RegExp]>([
    ['without buffers', [undefined, 0], /buffers/],
    ['into a buffer that is no array', [buffer, 0], /buffers/],
    ['into an array with a hole', [[buffer, undefined], 0], /buffers\[1\]/],
    ['without a position', [[buffer]], /position/],
    ['with an unknown option', [[buffer], 0, { offset: 0 }], /offset/],
  ])('of several buffers, %s, is refused', async (_, values, field) => {
    await using image = await openRaw(raw)
    const error = await failure(() => (image.readv as Loose).apply(image, values))
    expect(error.code).toBe('ERR_QCOW2_INVALID_ARGUMENT')
    expect(error.field).toMatch(field)
  })
})

describe('a stream', () => {
  it.each([
    [{ start: -1 }, /start/],
    [{ start: 512, end: 511 }, /end/],
    [{ highWaterMark: 0 }, /highWaterMark/],
    [{ sparse: 1 }, /sparse/],
    [{ begin: 0 }, /begin/],
  ])('with %j is refused at once', async (options, field) => {
    await using image = await openRaw(raw)
    expect(() => image.createReadStream(options as object)).toThrow(
      expect.objectContaining({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field: expect.stringMatching(field) }),
    )
  })
})

it('leaves no file behind', () => {
  expect(readdirSync(folder).toSorted()).toEqual(['disk.raw', 'empty.qcow2'])
})
