/** Images from streams: each format, in pieces of any size, cut off anywhere, hostile, endless, aborted. */

import { execFileSync, spawnSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { gzipSync } from 'node:zlib'
import { compare, convert, create, type IngestOptions, ingest, open, type Qcow2Error } from 'qcow2'
import { afterEach, beforeAll, describe, expect, it, vi } from 'vitest'
import { creationOf, TARGET_FORMATS, type TargetFormat } from '../../src/formats/table.js'
import { execute, haveQemu, workspace } from '../cli/run.js'
import { failure } from './fixtures.js'
import { LIBRARY } from './shell.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const MIB = 1 << 20
const SECRET = 'hunter2'

/** Data that does not shrink, a hole, zeroes as data, data that shrinks, and an end that is no multiple of a cluster. */
const SIZE = 3 * MIB + 1536
const DISK = Buffer.alloc(SIZE)
for (let i = 100_000, x = 1; i < 1_200_000; i++) {
  x = (Math.imul(x, 1_664_525) + 1_013_904_223) >>> 0
  DISK[i] = x >>> 24
}
DISK.fill('text ', 2 * MIB, 2 * MIB + 300_000)
DISK.fill(9, SIZE - 700)

const SHAPES: Readonly<Partial<Record<TargetFormat, object>>> = {
  luks: { encrypt: { secret: SECRET, iterTime: 1 } },
  vpc: { forceSize: true },
  parallels: { clusterSize: 65536 },
}
const isEncrypted = (format: TargetFormat): boolean => creationOf(format).needs === 'encrypt'

/** Compressions that Node does not have. */
const TOOLS = (['xz', 'zstd'] as const).filter(tool => {
  try {
    execFileSync(tool, ['--version'], { stdio: 'ignore' })
    return true
  } catch {
    console.warn(`skipped: there is no ${tool}`)
    return false
  }
})

/** A stream of the bytes in pieces. */
async function* pieces(bytes: Buffer, length: number): AsyncGenerator<Buffer> {
  for (let i = 0; i < bytes.length; i += length) yield bytes.subarray(i, i + length)
}

/** The bytes, then zeroes for ever. */
async function* endless(bytes: Buffer): AsyncGenerator<Buffer> {
  yield* pieces(bytes, 65536)
  for (;;) yield Buffer.alloc(65536)
}

/** What the disk in a file is; it is removed. */
async function holdsDisk(name: string, format: TargetFormat = 'qcow2', disk = 'disk.raw'): Promise<void> {
  const same = await compare(at(name), at(disk), {
    formatA: format,
    formatB: 'raw',
    ...(isEncrypted(format) && { secretA: SECRET }),
  })
  expect(same).toMatchObject({ identical: true })
  rmSync(at(name))
}

/** A call that fails and leaves nothing behind. */
async function fails(call: () => Promise<unknown>): Promise<Qcow2Error> {
  const before = readdirSync(folder)
  const error = await failure(call)
  expect(readdirSync(folder)).toEqual(before)
  return error
}

const into = (name: string, bytes: Buffer, options: Partial<IngestOptions> = {}, length = 65536) =>
  ingest(pieces(bytes, length), at(name), { to: 'qcow2', ...options })

/** Streams by name: their bytes, and what has to be said of them. */
const streams = new Map<string, { readonly bytes: Buffer; readonly options: Partial<IngestOptions> }>()
const stream = (name: string) => streams.get(name)!

beforeAll(async () => {
  writeFileSync(at('disk.raw'), DISK)
  const add = (name: string, bytes: Buffer, options: Partial<IngestOptions> = {}) =>
    streams.set(name, { bytes, options })
  for (const to of TARGET_FORMATS) {
    await convert(at('disk.raw'), at(`from.${to}`), { from: 'raw', to, create: SHAPES[to] as never })
    add(to, readFileSync(at(`from.${to}`)), { from: to, ...(isEncrypted(to) && { secret: SECRET }) })
  }
  const made = [
    ['compressed qcow2', 'c.qcow2', { to: 'qcow2', compress: true }, {}],
    ['qcow2 of small clusters', 's.qcow2', { to: 'qcow2', create: { clusterSize: 512 } }, {}],
    ['fixed vpc', 'f.vhd', { to: 'vpc', create: { subformat: 'fixed', forceSize: true } }, { from: 'vpc' }],
    ['streamOptimized vmdk', 'o.vmdk', { to: 'vmdk', create: { subformat: 'streamOptimized' } }, {}],
  ] as const
  for (const [name, file, options, said] of made) {
    await convert(at('disk.raw'), at(file), { from: 'raw', ...(options as { to: TargetFormat }) })
    add(name, readFileSync(at(file)), said)
  }
  writeFileSync(
    at('machine.ovf'),
    `<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><References><File ovf:id="f"
      ovf:href="o.vmdk"/></References><DiskSection><Disk ovf:diskId="d" ovf:fileRef="f" ovf:capacity="${SIZE}"/></DiskSection></Envelope>`,
  )
  execFileSync('tar', ['-cf', at('m.ova'), '-C', folder, 'machine.ovf', 'o.vmdk'])
  add('ova', readFileSync(at('m.ova')))
  add('raw of a known length', DISK, { from: 'raw', byteLength: SIZE })
  add('gzip', gzipSync(DISK))
  for (const tool of TOOLS) add(tool, execFileSync(tool, ['-1c'], { input: DISK, maxBuffer: 1 << 28 }))
})

// One that should not be there fails its own test alone.
afterEach(() => rmSync(at('out'), { force: true }))

const NAMES = [
  ...TARGET_FORMATS,
  'compressed qcow2',
  'qcow2 of small clusters',
  'fixed vpc',
  'streamOptimized vmdk',
  'ova',
  'raw of a known length',
  'gzip',
  ...TOOLS,
]

describe('a stream', () => {
  it.each(NAMES)('of %s becomes an image with the same disk', async name => {
    const { bytes, options } = stream(name)
    for (const length of [MIB, 5001]) {
      const result = await into('out.qcow2', bytes, options, length)
      expect(result).toMatchObject({ virtualSize: SIZE, byteLength: bytes.length })
      await holdsDisk('out.qcow2')
    }
  })

  it.each(TARGET_FORMATS)('of qcow2 becomes %s', async to => {
    const { bytes } = stream('qcow2')
    const result = await into('out', bytes, { to, create: SHAPES[to] as never, byteLength: bytes.length })
    expect(result.inspection).toMatchObject({ format: 'qcow2', safe: true, virtualSize: SIZE })
    await holdsDisk('out', to)
  })

  it.each(['compressed qcow2', 'qcow2', 'vmdk', 'gzip'])('can come byte by byte: %s', async kind => {
    writeFileSync(at('small.raw'), DISK.subarray(2 * MIB, 2 * MIB + 8192))
    const made = at('small.image')
    if (kind === 'gzip') writeFileSync(made, gzipSync(readFileSync(at('small.raw'))))
    else {
      const to = kind === 'vmdk' ? 'vmdk' : 'qcow2'
      const shape = kind === 'vmdk' ? { subformat: 'streamOptimized' } : { clusterSize: 512 }
      const compress = kind === 'compressed qcow2'
      await convert(at('small.raw'), made, { from: 'raw', to, compress, create: shape as never })
    }
    await into('out.qcow2', readFileSync(made), {}, 1)
    await holdsDisk('out.qcow2', 'qcow2', 'small.raw')
    rmSync(made)
  })

  it('can be a Readable, a web stream, or anything that is iterated', async () => {
    const { bytes } = stream('qcow2')
    const web = () => new Blob([new Uint8Array(bytes)]).stream()
    for (const input of [Readable.from(pieces(bytes, 9999)), web(), pieces(bytes, 70_000)]) {
      await ingest(input, at('out.raw'), { to: 'raw' })
      await holdsDisk('out.raw', 'raw')
    }
    const wrong = [bytes, 'disk.qcow2', null, [bytes]] as unknown as Readable[]
    for (const input of wrong) {
      expect(await fails(() => ingest(input, at('out'), { to: 'raw' }))).toMatchObject({
        code: 'ERR_QCOW2_INVALID_ARGUMENT',
        message: expect.stringContaining('ingest: input must be a Readable, a ReadableStream or an async iterable'),
      })
    }
    const text = Readable.from(['text'])
    expect(await fails(() => ingest(text, at('out'), { to: 'raw' }))).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
      message: "ingest: input must give Buffers or Uint8Arrays, not 'text'",
    })
    expect(text.destroyed).toBe(true)
  })

  it('takes the options of a convert', async () => {
    await convert(at('from.qcow2'), at('own.qcow2'), { to: 'qcow2' })
    {
      await using image = await open(at('own.qcow2'), { flags: 'r+' })
      await image.bitmaps.add('backup')
      await image.snapshots.create('before')
      await image.write(Buffer.alloc(65536, 1), { position: 0 })
    }
    const bytes = readFileSync(at('own.qcow2'))
    await into('out', bytes, { bitmaps: true })
    await using made = await open(at('out'))
    expect(await made.bitmaps.list()).toMatchObject([{ name: 'backup' }])
    await into('out.qcow2', bytes, { snapshot: 'before' })
    await holdsDisk('out.qcow2')
    await into('out.raw', bytes, { to: 'raw', start: MIB, length: MIB })
    expect(readFileSync(at('out.raw')).equals(DISK.subarray(MIB, 2 * MIB))).toBe(true)
    await (await create(at('out.qcow2'), { size: SIZE })).close()
    await into('out.qcow2', bytes, { existingTarget: true, snapshot: 'before' })
    await holdsDisk('out.qcow2')
    rmSync(at('out.raw'))
    const wrong = { to: 'raw', base: at('from.qcow2') } as unknown as IngestOptions
    expect(await fails(() => ingest(pieces(bytes, 65536), at('other'), wrong))).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
      field: 'base',
    })
  })

  it('says what it is where nothing tells, as a file does', async () => {
    const unknown = { code: 'ERR_QCOW2_FORMAT_UNKNOWN', message: expect.stringContaining("from: 'raw'") }
    expect(await fails(() => into('out', DISK))).toMatchObject(unknown)
    expect(await fails(() => into('out', Buffer.alloc(0)))).toMatchObject(unknown)
    const inside = gzipSync(stream('qcow2').bytes)
    expect(await fails(() => into('out', inside))).toMatchObject({
      code: 'ERR_QCOW2_FORMAT_UNKNOWN',
      message: expect.stringContaining('holds a qcow2 image'),
    })
    // A guest can write anything in front of a raw disk.
    await into('out.raw', stream('qcow2').bytes, { from: 'raw', to: 'raw' })
    expect(readFileSync(at('out.raw')).subarray(0, 65536).equals(stream('qcow2').bytes.subarray(0, 65536))).toBe(true)
    rmSync(at('out.raw'))
  })
})

/** A qcow2 head with fields changed: offset, and eight bytes or four. */
function forged(name: string, changes: readonly (readonly [offset: number, value: bigint | number])[]): Buffer {
  const bytes = Buffer.from(stream(name).bytes)
  for (const [offset, value] of changes) {
    if (typeof value === 'bigint') bytes.writeBigUInt64BE(value, offset)
    else bytes.writeUInt32BE(value, offset)
  }
  return bytes
}
const HEADER = { size: 24, l1Size: 36, l1Offset: 40, incompatible: 72 } as const

describe('a hostile stream', () => {
  it('is refused by its head, before more is taken', async () => {
    await create(at('base.qcow2'), { size: MIB }).then(image => image.close())
    await create(at('over.qcow2'), { backingFile: 'base.qcow2', backingFormat: 'qcow2' }).then(image => image.close())
    await create(at('data.qcow2'), { size: MIB, dataFile: at('data.raw') }).then(image => image.close())
    const cases: readonly (readonly [bytes: Buffer, code: string, options?: Partial<IngestOptions>])[] = [
      [readFileSync(at('over.qcow2')), 'ERR_QCOW2_REFERENCE_DENIED'],
      [readFileSync(at('data.qcow2')), 'ERR_QCOW2_REFERENCE_DENIED'],
      [forged('qcow2', [[HEADER.incompatible, 1n << 20n]]), 'ERR_QCOW2_UNSUPPORTED_FEATURE'],
      [forged('qcow2', [[HEADER.size, 1n << 62n]]), 'ERR_QCOW2_INVALID_HEADER'],
      [stream('qcow2').bytes, 'ERR_QCOW2_LIMIT', { limits: { maxVirtualSize: MIB } }],
      [stream('streamOptimized vmdk').bytes, 'ERR_QCOW2_LIMIT', { limits: { maxVirtualSize: MIB } }],
      [forged('qcow2', [[4, 9]]), 'ERR_QCOW2_UNSUPPORTED_FEATURE'],
      [DISK, 'ERR_QCOW2_LIMIT', { from: 'raw', byteLength: SIZE, limits: { maxVirtualSize: MIB } }],
      [DISK, 'ERR_QCOW2_LIMIT', { from: 'raw', byteLength: SIZE, maxBytes: MIB }],
      [forged('qcow2', [[HEADER.l1Offset, 1n << 40n]]), 'ERR_QCOW2_CORRUPT', { byteLength: 1 << 30 }],
    ]
    for (const [bytes, code, options] of cases) {
      let taken = 0
      async function* counted(): AsyncGenerator<Buffer> {
        for await (const piece of endless(bytes)) {
          taken += piece.length
          yield piece
        }
      }
      const error = await fails(() => ingest(counted(), at('out'), { to: 'raw', ...options }))
      expect(error, `${code} ${JSON.stringify(options)}`).toMatchObject({ code })
      // The largest first cluster, and what comes while it is judged.
      expect(taken).toBeLessThan(16 * MIB)
    }
    const exists = await fails(() => ingest(endless(DISK), at('over.qcow2'), { to: 'raw', from: 'raw' }))
    expect(exists).toMatchObject({ code: 'EEXIST', path: at('over.qcow2') })
    // A resolver says what lies below, as for a file.
    const over = await into('out', readFileSync(at('over.qcow2')), { references: () => at('base.qcow2') })
    expect(over).toMatchObject({ virtualSize: MIB })
    rmSync(at('out'))
  })

  it('without an end is refused at a limit', async () => {
    const limits: readonly (readonly [bytes: Buffer, options: Partial<IngestOptions>, field: string])[] = [
      [DISK, { from: 'raw', maxBytes: 20 * MIB }, 'maxBytes'],
      [DISK, { from: 'raw', limits: { maxVirtualSize: 20 * MIB } }, 'maxVirtualSize'],
      [DISK, { from: 'raw', maxSpool: 16 * MIB }, 'maxSpool'],
      [forged('qcow2', [[HEADER.l1Offset, 1n << 40n]]), { maxSpool: 16 * MIB }, 'maxSpool'],
      // What comes behind the image is not stored.
      [stream('qcow2').bytes, { maxBytes: 40 * MIB, maxSpool: 16 * MIB }, 'maxBytes'],
      [gzipSync(DISK), { maxBytes: 20 * MIB }, 'maxBytes'],
    ]
    for (const [bytes, options, field] of limits) {
      const error = await fails(() => ingest(endless(bytes), at('out'), { to: 'raw', ...options }))
      expect(error, field).toMatchObject({ code: 'ERR_QCOW2_LIMIT', field })
    }
    expect(await fails(() => into('out', DISK, { from: 'raw', maxSpool: 1 }))).toMatchObject({ field: 'maxSpool' })
  })

  it.each([
    'qcow2',
    'compressed qcow2',
    'qcow2 of small clusters',
    'streamOptimized vmdk',
    'ova',
    'gzip',
    ...TOOLS,
    'fixed vpc',
    'raw of a known length',
    'vdi',
  ])('that is cut off anywhere leaves nothing: %s', async name => {
    const { bytes, options } = stream(name)
    let seed = bytes.length
    const random = (below: number): number => {
      seed = (seed * 1_103_515_245 + 12_345) % 2 ** 31
      return seed % below
    }
    // Without an error and a length, nobody knows what is missing of the last cluster.
    const sure = bytes.length - 65536 - 512
    const cuts = [0, 1, 511, 512, 65535, 65536, 65537, sure, ...Array.from({ length: 8 }, () => random(sure))]
    for (const cut of cuts) {
      const short = bytes.subarray(0, cut)
      const said = await fails(() => into('out', short, { ...options, byteLength: bytes.length }))
      expect(said, `${cut}`).toMatchObject({ code: 'ERR_QCOW2_IO', field: 'byteLength' })
      if (options.byteLength !== undefined) continue
      // Whatever is missing is not a part of the disk then.
      const made = await into('out', short, options).catch((error: Qcow2Error) => error.code)
      if (typeof made === 'object') await holdsDisk('out')
      else expect(made, `${cut}`).toMatch(/^ERR_QCOW2_(CORRUPT|INVALID_HEADER|FORMAT_UNKNOWN)$/)
    }
    const long = await fails(() => into('out', Buffer.concat([bytes, DISK]), { ...options, byteLength: bytes.length }))
    expect(long).toMatchObject({ code: 'ERR_QCOW2_IO', field: 'byteLength' })
  })

  it('with bytes in two places of its disk is refused where they are gone, and never read as zeroes', async () => {
    const bytes = Buffer.from(stream('qcow2').bytes)
    const l2 = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(HEADER.l1Offset))) & 0xff_ffff_ffff_fe00n)
    // The last cluster of the disk is that of an earlier one.
    const last = Math.floor(SIZE / 65536)
    bytes.copy(bytes, l2 + last * 8, l2 + 3 * 8, l2 + 4 * 8)
    expect(await fails(() => into('out', bytes, { to: 'raw', concurrency: 1 }))).toMatchObject({
      code: 'ERR_QCOW2_UNSUPPORTED_FEATURE',
      message: expect.stringContaining('in two places of its disk'),
    })
  })
})

describe('a stream that fails', () => {
  it('is the cause, and leaves nothing', async () => {
    const reason = new Error('socket hang up')
    for (const name of ['qcow2', 'raw of a known length', 'streamOptimized vmdk']) {
      const { bytes, options } = stream(name)
      for (const after of [0, 1000, 100_000, bytes.length - 1, bytes.length]) {
        async function* broken(): AsyncGenerator<Buffer> {
          yield* pieces(bytes.subarray(0, after), 30_000)
          throw reason
        }
        const input = Readable.from(broken())
        const error = await fails(() => ingest(input, at('out'), { to: 'qcow2', ...options }))
        expect(error).toMatchObject({ code: 'ERR_QCOW2_IO', cause: reason, offset: after })
        expect(error.message).toBe(`the stream broke after ${after} bytes: socket hang up`)
      }
    }
  })

  it('or is aborted, however far it came, ends at once', async () => {
    for (const name of ['qcow2', 'raw of a known length', 'ova', 'gzip']) {
      const { bytes, options } = stream(name)
      for (const after of [0, 70_000, bytes.length]) {
        const abort = new AbortController()
        async function* stalled(): AsyncGenerator<Buffer> {
          yield* pieces(bytes.subarray(0, after), 65536)
          setTimeout(() => abort.abort(reason), 20)
          await new Promise(() => {})
        }
        const reason = new Error('enough')
        const input = Readable.from(stalled())
        const before = readdirSync(folder)
        await expect(ingest(input, at('out'), { to: 'qcow2', ...options, signal: abort.signal })).rejects.toMatchObject(
          { name: 'AbortError', cause: reason },
        )
        expect(readdirSync(folder)).toEqual(before)
        expect(input.destroyed).toBe(true)
      }
    }
  })

  it('is left as it is where its owner still needs it', async () => {
    const input = Readable.from(pieces(DISK, 65536))
    await fails(() => ingest(input, at('out'), { to: 'raw', keepInput: true }))
    expect(input.destroyed).toBe(false)
    let rest = 0
    for await (const piece of input) rest += (piece as Buffer).length
    expect(rest).toBeGreaterThan(SIZE / 2)
  })
})

describe('what is stored', () => {
  const LARGE = 24 * MIB
  const noise = randomBytes(LARGE)

  it('is little of what is read in the order in which it comes', async () => {
    writeFileSync(at('noise.raw'), noise)
    await convert(at('noise.raw'), at('noise.qcow2'), { from: 'raw', to: 'qcow2' })
    const qcow2 = readFileSync(at('noise.qcow2'))
    const gzip = gzipSync(noise, { level: 1 })
    const optimized = { subformat: 'streamOptimized' } as const
    await convert(at('noise.raw'), at('o.vmdk'), { from: 'raw', to: 'vmdk', create: optimized, overwrite: true })
    const vmdk = readFileSync(at('o.vmdk'))
    execFileSync('tar', ['-cf', at('n.ova'), '-C', folder, 'machine.ovf', 'o.vmdk', 'disk.raw'])
    const fixed = { subformat: 'fixed', forceSize: true } as const
    await convert(at('noise.raw'), at('noise.vhd'), { from: 'raw', to: 'vpc', create: fixed })
    const footer = readFileSync(at('noise.vhd')).subarray(LARGE)
    const cases: readonly (readonly [Buffer, Partial<IngestOptions>, number])[] = [
      [noise, { from: 'raw', byteLength: LARGE, maxSpool: 16 * MIB }, 16 * MIB],
      [qcow2, { maxSpool: 16 * MIB }, 16 * MIB],
      [Buffer.concat([noise, footer]), { from: 'vpc', byteLength: LARGE + 512, maxSpool: 16 * MIB }, 16 * MIB],
      [gzip, { diskSize: LARGE, maxSpool: 16 * MIB }, 16 * MIB],
      [vmdk, { maxSpool: 16 * MIB }, 16 * MIB],
      [readFileSync(at('n.ova')), { maxSpool: 16 * MIB }, 16 * MIB],
      [noise, { from: 'raw' }, LARGE],
      [gzip, {}, gzip.length],
    ]
    for (const [bytes, options, most] of cases) {
      const { spooled, byteLength } = await into('out.qcow2', bytes, options, MIB)
      expect(byteLength).toBe(bytes.length)
      expect(spooled).toBeLessThanOrEqual(most)
      await holdsDisk('out.qcow2', 'qcow2', 'noise.raw')
    }
  })

  it('is not much more than what is used, however fast it comes', async () => {
    let taken = 0
    async function* fast(): AsyncGenerator<Buffer> {
      for (; taken < 256 * MIB; taken += MIB) yield noise.subarray(0, MIB)
    }
    const abort = new AbortController()
    const slow = ingest(fast(), at('out'), {
      from: 'raw',
      to: 'qcow2',
      byteLength: 256 * MIB,
      compress: { type: 'zstd', level: 22 },
      create: { compressionType: 'zstd' },
      signal: abort.signal,
    })
    const ended = slow.catch((error: Error) => error.name)
    await vi.waitFor(() => expect(taken).toBeGreaterThan(4 * MIB), { timeout: 20_000 })
    await new Promise(resolve => setTimeout(resolve, 200))
    expect(taken).toBeLessThan(128 * MIB)
    abort.abort()
    expect(await ended).toBe('AbortError')
  })

  it('is not believed to be what its end says that it is not', async () => {
    const { bytes, options } = stream('fixed vpc')
    const byteLength = bytes.length
    const other = Buffer.from(bytes)
    other.fill(0, SIZE)
    const dynamic = Buffer.concat([DISK, stream('vpc').bytes.subarray(0, 512)])
    const wrong: readonly (readonly [Buffer, string])[] = [
      [other, 'ERR_QCOW2_INVALID_HEADER'],
      [dynamic, 'ERR_QCOW2_UNSUPPORTED_FEATURE'],
    ]
    for (const [each, code] of wrong) {
      expect(await fails(() => into('out', each, { ...options, byteLength }))).toMatchObject({ code })
    }
    // The first grain of the stream and the next one change places; and the end speaks of another disk.
    const vmdk = stream('streamOptimized vmdk').bytes
    const [swapped, longer] = [Buffer.from(vmdk), Buffer.from(vmdk)]
    const first = 128 * 512
    const next = first + Math.ceil((12 + vmdk.readUInt32LE(first + 8)) / 512) * 512
    vmdk.copy(swapped, first, next, next + 8)
    vmdk.copy(swapped, next, first, first + 8)
    longer.writeBigUInt64LE(1n << 20n, longer.length - 1024 + 12)
    for (const [each, code] of [
      [swapped, 'ERR_QCOW2_UNSUPPORTED_FEATURE'],
      [longer, 'ERR_QCOW2_CORRUPT'],
    ] as const) {
      expect(await fails(() => into('out', each))).toMatchObject({ code })
    }
    for (const diskSize of [SIZE - 512, SIZE + 512]) {
      expect(await fails(() => into('out', stream('gzip').bytes, { diskSize }))).toMatchObject({
        code: 'ERR_QCOW2_CORRUPT',
        message: expect.stringContaining(`and not at ${diskSize} as was said`),
      })
    }
    await into('out', bytes, { ...options, byteLength })
    await holdsDisk('out')
  })
})

describe.skipIf(!haveQemu)('what QEMU writes', () => {
  it.each([
    ['qcow2', ['-O', 'qcow2'], {}],
    ['qcow2 with subclusters', ['-O', 'qcow2', '-o', 'extended_l2=on,cluster_size=128k'], {}],
    ['compressed qcow2', ['-O', 'qcow2', '-c', '-o', 'compression_type=zstd'], {}],
    ['qcow2 of version 2', ['-O', 'qcow2', '-o', 'compat=0.10'], {}],
    ['preallocated qcow2', ['-O', 'qcow2', '-o', 'preallocation=metadata'], {}],
    ['qcow2 in any order', ['-O', 'qcow2', '-W', '-m', '8'], {}],
    ['streamOptimized vmdk', ['-O', 'vmdk', '-o', 'subformat=streamOptimized'], {}],
    ['fixed vpc', ['-O', 'vpc', '-o', 'subformat=fixed,force_size=on'], { from: 'vpc' }],
    ['vhdx', ['-O', 'vhdx'], {}],
  ] as const)('is read from a stream, and what is made of it is read by QEMU: %s', async (_, options, said) => {
    const made = await execute('qemu-img', ['convert', '-f', 'raw', 'disk.raw', ...options, 'qemu.image'], folder)
    expect(made).toMatchObject({ code: 0 })
    await into('out.qcow2', readFileSync(at('qemu.image')), said, 40_000)
    const compared = await execute('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', 'disk.raw', 'out.qcow2'], folder)
    expect(compared).toMatchObject({ code: 0 })
    const checked = await execute('qemu-img', ['check', 'out.qcow2'], folder)
    expect(checked).toMatchObject({ code: 0 })
    rmSync(at('out.qcow2'))
    rmSync(at('qemu.image'))
  })
})

describe('streams that say nothing for a long time', () => {
  it('hold up nothing else, and end when they are aborted', async () => {
    const abort = new AbortController()
    const names = ['qcow2', 'gzip', 'fixed vpc', 'ova'] as const
    const stalled = Array.from({ length: 40 }, (_, index) => {
      const { bytes, options } = stream(names[index % names.length] ?? 'qcow2')
      async function* begins(): AsyncGenerator<Buffer> {
        yield bytes.subarray(0, 100_000)
        await new Promise(() => {})
      }
      return ingest(begins(), at(`stalled-${index}`), { to: 'raw', ...options, signal: abort.signal })
    })
    const ended = Promise.allSettled(stalled)
    await convert(at('from.qcow2'), at('out'), { to: 'raw' })
    await holdsDisk('out', 'raw')
    await into('out', stream('compressed qcow2').bytes)
    await holdsDisk('out')
    abort.abort()
    for (const end of await ended) expect(end).toMatchObject({ status: 'rejected', reason: { name: 'AbortError' } })
    expect(readdirSync(folder).filter(name => name.startsWith('stalled'))).toEqual([])
  })

  it('do not keep a process or a worker from ending', () => {
    const script = `
      const { Worker, isMainThread, parentPort } = require('node:worker_threads')
      const { ingest } = require(${JSON.stringify(LIBRARY)})
      const { readFileSync } = require('node:fs')
      async function* begins() {
        yield readFileSync('from.qcow2').subarray(0, 100_000)
        if (isMainThread) setTimeout(() => process.exit(7), 50)
        else parentPort.postMessage('begun')
        await new Promise(() => {})
      }
      const start = () => ingest(begins(), isMainThread ? 'a' : 'b', { to: 'raw' }).catch(() => {})
      if (!isMainThread) start()
      else {
        const worker = new Worker(__filename)
        worker.on('message', () => setTimeout(() => worker.terminate().then(start), 50))
      }`
    writeFileSync(at('script.cjs'), script)
    const { status, stderr } = spawnSync(process.execPath, ['script.cjs'], { cwd: folder, timeout: 20_000 })
    expect({ status, stderr: String(stderr) }).toEqual({ status: 7, stderr: '' })
    expect(readdirSync(folder).filter(name => name === 'a' || name === 'b')).toEqual([])
  })
})
