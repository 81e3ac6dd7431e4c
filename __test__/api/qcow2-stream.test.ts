/** New images as streams, judged by QEMU, by this library's own check, and by what a file of the same disk holds. */

import { randomBytes } from 'node:crypto'
import { closeSync, openSync, statSync, truncateSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { Writable } from 'node:stream'
import { buffer as collect } from 'node:stream/consumers'
import { pipeline } from 'node:stream/promises'
import { gzipSync } from 'node:zlib'
import {
  check,
  compare,
  convert,
  create,
  createQcow2Stream,
  nbdSource,
  open,
  type Qcow2StreamOptions,
  serveNbd,
} from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { describeWithQemu, ok, qemuImg } from '../interop/qemu.js'
import { failure, pattern, temporaryFolder, writeRaw } from './fixtures.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20
/** Holes between, no whole cluster at the end, and more than one L2 table of small clusters. */
const SIZE = 9 * MIB + 512 * 5
const RUNS = [
  [0, 70_000],
  [3 * MIB - 100, 2_300_000],
  [6 * MIB, 4096],
  [SIZE - 700, 700],
] as const
const DISK = Buffer.alloc(SIZE)
for (const [start, length] of RUNS) pattern(start, length).copy(DISK, start)
/** What does not shrink: it makes a compressed image as long as a chunk, at least. */
const NOISE = randomBytes(MIB + 3000)
NOISE.copy(DISK, 4 * MIB)
const raw = at('disk.raw')

beforeAll(async () => {
  writeRaw(raw, SIZE, RUNS)
  const file = openSync(raw, 'r+')
  writeSync(file, NOISE, 0, NOISE.length, 4 * MIB)
  closeSync(file)
  await convert(raw, at('disk.qcow2'), { from: 'raw', to: 'qcow2', compress: true })
})

const SHAPES: readonly (Qcow2StreamOptions & { readonly name: string })[] = [
  { name: 'qcow2' },
  { name: 'clusters of 512 bytes', create: { clusterSize: 512 } },
  { name: 'clusters of 2 MiB', create: { clusterSize: 2 * MIB } },
  { name: 'version 2', create: { version: 2, clusterSize: 4096 } },
  { name: 'extended L2 entries', create: { extendedL2: true, clusterSize: 16384 } },
  { name: 'refcounts of a bit', create: { refcountBits: 1 } },
  { name: 'refcounts of 64 bits', create: { refcountBits: 64, lazyRefcounts: true, clusterSize: 1024 } },
  { name: 'compressed', compress: true },
  {
    name: 'compressed by zstd',
    compress: { type: 'zstd', level: 1 },
    create: { clusterSize: 4096, extendedL2: false },
  },
  {
    name: 'compressed beside subclusters',
    compress: true,
    create: { extendedL2: true, clusterSize: 16384 },
    concurrency: 1,
  },
  { name: 'compressed with refcounts of a bit', compress: true, create: { refcountBits: 1, clusterSize: 512 } },
  { name: 'streamOptimized VMDK', to: 'vmdk' },
  { name: 'streamOptimized VMDK for ESXi', to: 'vmdk', create: { preset: 'esxi' }, compress: { level: 1 } },
  { name: 'raw', to: 'raw' },
  { name: 'fixed VHD', to: 'vpc', create: { forceSize: true } },
  { name: 'fixed VHD of whole cylinders', to: 'vpc' },
]

/** What a stream without a shape to be said in the name is made of. */
const made = async (options: Qcow2StreamOptions & { readonly name?: string }, source = raw): Promise<Buffer> => {
  const { name: _, ...rest } = options
  const stream = await createQcow2Stream(source, { from: 'raw', ...rest })
  const bytes = await collect(stream)
  expect(bytes.length).toBe(stream.byteLength)
  return bytes
}

describeWithQemu('createQcow2Stream and QEMU', () => {
  it.each(SHAPES)('$name is what QEMU reads, the same each time, and from any offset on', async shape => {
    const bytes = await made(shape)
    const { to = 'qcow2' } = shape
    const path = at('streamed')
    writeFileSync(path, bytes)
    ok(qemuImg('compare', '-f', to, '-F', 'raw', path, raw))
    if (to === 'qcow2') {
      ok(qemuImg('check', '-f', to, path))
      expect(await check(path)).toMatchObject({ leaks: 0, corruptions: 0 })
    }
    expect(await compare(path, raw, { formatA: to, formatB: 'raw' })).toMatchObject({ identical: true })
    expect((await made(shape)).equals(bytes)).toBe(true)
    for (const start of [1, 511, 65_536, Math.min(MIB - 1, bytes.length), bytes.length - 513, bytes.length]) {
      expect((await made({ ...shape, start })).equals(bytes.subarray(start)), `start ${start}`).toBe(true)
    }
  })
})

/** A consumer that takes one chunk and calls `then`. */
const taking = (then: () => void): Writable =>
  new Writable({
    highWaterMark: 1,
    write(_chunk, _encoding, done) {
      then()
      setImmediate(done)
    },
  })

/** Whether nobody holds the image any more: a writer excludes everybody. */
const free = async (path: string): Promise<void> => (await open(path, { flags: 'r+' })).close()

describe('sources', () => {
  it('are what a convert takes: chains, compressed files, several, snapshots', async () => {
    const plain = await made({ to: 'raw' })
    expect(plain.equals(DISK)).toBe(true)
    writeFileSync(at('disk.gz'), gzipSync(DISK))
    expect((await made({ from: undefined, to: 'raw' }, at('disk.gz'))).equals(DISK)).toBe(true)
    expect(
      (await made({ from: undefined, to: 'raw', start: 5 * MIB }, at('disk.gz'))).equals(DISK.subarray(5 * MIB)),
    ).toBe(true)
    // Zeroes are found. A VMDK has an identifier in front that depends on the map, which says nothing of them here.
    for (const [options, head] of [[{ compress: true }, 0] as const, [{ to: 'vmdk' }, 65_536] as const]) {
      const [inOrder, anyhow] = [await made({ from: undefined, ...options }, at('disk.gz')), await made(options)]
      expect(inOrder.subarray(head).equals(anyhow.subarray(head)) || options).toBe(true)
    }
    await convert(at('disk.qcow2'), at('snapshots.qcow2'), { to: 'qcow2' })
    await using image = await open(at('snapshots.qcow2'), { flags: 'r+' })
    await image.snapshots.create('before')
    await image.write(Buffer.alloc(512, 1), { position: 0 })
    await image.close()
    const of = { from: 'qcow2', to: 'raw' } as const
    expect((await made({ ...of, snapshot: 'before' }, at('snapshots.qcow2'))).equals(DISK)).toBe(true)
    expect((await made(of, at('snapshots.qcow2'))).subarray(0, 512)).toEqual(Buffer.alloc(512, 1))
    const several = await createQcow2Stream([raw, at('disk.qcow2')], { from: ['raw', undefined], to: 'raw' })
    expect((await collect(several)).equals(Buffer.concat([DISK, DISK]))).toBe(true)
  })

  it('can be an open image, which stays open, and is closed only when the stream has ended', async () => {
    const image = await open(at('disk.qcow2'))
    const stream = await createQcow2Stream(image, { to: 'raw', onProgress: () => {} })
    expect((await collect(stream)).equals(DISK)).toBe(true)
    const second = await createQcow2Stream(image, { to: 'raw' })
    const ended = failure(async () => await collect(second))
    await image.close()
    expect((await ended).code).toBe('ERR_QCOW2_CLOSED')
    expect(second.destroyed).toBe(true)
    expect((await failure(() => createQcow2Stream(image))).code).toBe('ERR_QCOW2_CLOSED')
    // Closing ends the counting, too, which would take longer.
    const other = await open(at('disk.qcow2'))
    const compress = { type: 'zstd', level: 22 } as const
    const counting = failure(() => createQcow2Stream(other, { compress, create: { clusterSize: 512 } }))
    await other.close()
    expect((await counting).code).toBe('ERR_QCOW2_CLOSED')
    await free(at('disk.qcow2'))
  })

  it('can be exports of a server', async () => {
    await using image = await open(at('disk.qcow2'))
    await using server = await serveNbd(image, { path: at('nbd.sock') })
    const source = nbdSource(`nbd+unix:///?socket=${at('nbd.sock')}`)
    const options = { from: 'raw', compress: true, concurrency: 4 } as const
    const bytes = await collect(await createQcow2Stream(source, options))
    expect(bytes.equals(await made({ compress: true }))).toBe(true)
    const unread = await createQcow2Stream(source, options)
    await new Promise(resolve => unread.once('close', resolve).destroy())
    await expect.poll(() => server.connections).toBe(0)
  })

  it('can be of any size: what takes no room in it takes none in the stream', async () => {
    const path = at('large.qcow2')
    const size = 64 * 2 ** 40
    await using image = await create(path, { size })
    await image.write(pattern(0, 512), { position: size - 512 })
    await image.close()
    const begin = performance.now()
    const bytes = await collect(await createQcow2Stream(path))
    expect(bytes.length).toBeLessThan(2 * MIB)
    writeFileSync(at('streamed'), bytes)
    expect(await compare(at('streamed'), path)).toMatchObject({ identical: true })
    const whole = await createQcow2Stream(path, { to: 'raw', start: size - 512 })
    expect((await collect(whole)).equals(pattern(0, 512))).toBe(true)
    const small = { create: { clusterSize: 512 } }
    expect((await failure(() => createQcow2Stream(path, small))).code).toBe('ERR_QCOW2_LIMIT')
    expect(performance.now() - begin).toBeLessThan(10_000)
  })

  it('take the memory of what is read ahead, however long the stream is', async () => {
    writeRaw(at('long.raw'), 2 ** 30, [[2 ** 30 - 512, 512]])
    const stream = await createQcow2Stream(at('long.raw'), { from: 'raw', to: 'raw' })
    const before = process.memoryUsage.rss()
    let [most, length] = [0, 0]
    for await (const chunk of stream) {
      length += chunk.length
      most = Math.max(most, process.memoryUsage.rss())
    }
    expect(length).toBe(2 ** 30)
    expect((most - before) / MIB).toBeLessThan(256)
  })

  it('in too many pieces are refused', async () => {
    const pieces = { from: 'raw', limits: { maxMemory: 31 } } as const
    expect(await failure(() => createQcow2Stream(raw, pieces))).toMatchObject({
      code: 'ERR_QCOW2_LIMIT',
      message: expect.stringContaining('larger clusters'),
    })
  })
})

describe('a stream', () => {
  it('waits for its consumer, and tells how far it is', async () => {
    const seen: number[] = []
    const onProgress = ({ phase, current, total }: { phase: string; current: number; total: number }) => {
      expect([phase, total]).toEqual(['stream', SIZE])
      seen.push(current)
    }
    const stream = await createQcow2Stream(raw, { from: 'raw', to: 'raw', onProgress, progressInterval: 1 })
    stream.once('readable', () => {})
    await new Promise(resolve => setTimeout(resolve, 100))
    expect(stream.readableLength).toBeGreaterThan(0)
    expect(stream.readableLength).toBeLessThanOrEqual(2 * MIB)
    await pipeline(
      stream,
      taking(() => {}),
    )
    expect(seen.at(-1)).toBe(SIZE)
    expect(seen.toSorted((a, b) => a - b)).toEqual(seen)
  })

  it('that is compressed counts first, and is half done then', async () => {
    const seen: [number, number][] = []
    const onProgress = ({ current, total }: { current: number; total: number }) => void seen.push([current, total])
    const controller = new AbortController()
    await collect(await createQcow2Stream(at('disk.qcow2'), { compress: true, onProgress, signal: controller.signal }))
    expect(seen).toContainEqual([SIZE, 2 * SIZE])
    expect(seen.at(-1)).toEqual([2 * SIZE, 2 * SIZE])
    expect(seen.toSorted(([a], [b]) => a - b)).toEqual(seen)
    // Nor is anything counted that cannot be stored.
    const large = at('zeroes.raw')
    writeFileSync(large, '')
    truncateSync(large, 2 ** 40)
    const counting = createQcow2Stream(large, { from: 'raw', create: { clusterSize: 512 }, compress: true })
    expect((await failure(() => counting)).code).toBe('ERR_QCOW2_LIMIT')
    const stopped = createQcow2Stream(raw, {
      from: 'raw',
      compress: { level: 12 },
      create: { clusterSize: 2 * MIB },
      signal: controller.signal,
    })
    controller.abort()
    await expect(stopped).rejects.toMatchObject({ name: 'AbortError' })
  })

  it('ends by a signal, by destroy, by a progress that fails, and holds nothing then', async () => {
    const controller = new AbortController()
    const path = at('disk.qcow2')
    const aborted = await createQcow2Stream(path, { to: 'raw', signal: controller.signal })
    await expect(
      pipeline(
        aborted,
        taking(() => controller.abort('enough')),
      ),
    ).rejects.toMatchObject({ name: 'AbortError', cause: 'enough' })
    await free(path)
    await expect(createQcow2Stream(path, { signal: controller.signal })).rejects.toMatchObject({ name: 'AbortError' })

    const destroyed = await createQcow2Stream(path, { to: 'raw' })
    for await (const _ of destroyed) break
    expect(destroyed.destroyed).toBe(true)
    const unread = await createQcow2Stream(path)
    unread.destroy()
    await new Promise(resolve => unread.once('close', resolve))
    await free(path)

    const onProgress = (): never => {
      throw new RangeError('no')
    }
    const failing = await createQcow2Stream(path, { to: 'raw', onProgress })
    await expect(collect(failing)).rejects.toBeInstanceOf(RangeError)
    await new Promise(resolve => (failing.closed ? resolve(undefined) : failing.once('close', resolve)))
    await free(path)
  })

  it('has the error of a source that cannot be read any more', async () => {
    const path = at('damaged.qcow2')
    // It shrinks by half.
    const nibbles = randomBytes(4 * MIB).map(byte => byte & 15)
    writeFileSync(at('nibbles'), nibbles)
    await convert(at('nibbles'), path, { from: 'raw', to: 'qcow2', compress: true })
    const stream = await createQcow2Stream(path)
    truncateSync(path, Math.floor(statSync(path).size * 0.7))
    let got = 0
    const sink = new Writable({
      write(chunk: Buffer, _encoding, done) {
        got += chunk.length
        done()
      },
    })
    expect(await failure(() => pipeline(stream, sink))).toMatchObject({ code: 'ERR_QCOW2_CORRUPT', path })
    expect(got).toBeGreaterThan(0)
    expect(got).toBeLessThan(stream.byteLength)
  })

  it.each([
    [{ create: { backingFile: 'base.qcow2', backingFormat: 'qcow2' } }, 'ERR_QCOW2_INVALID_ARGUMENT', 'backingFile'],
    [{ create: { dataFile: 'data.raw' } }, 'ERR_QCOW2_INVALID_ARGUMENT', 'dataFile'],
    [{ create: { preallocation: 'metadata' } }, 'ERR_QCOW2_INVALID_ARGUMENT', 'preallocation'],
    [{ create: { encrypt: { secret: 'x' } } }, 'ERR_QCOW2_INVALID_ARGUMENT', 'encrypt'],
    [{ to: 'raw', create: { preallocation: 'full' } }, 'ERR_QCOW2_INVALID_ARGUMENT', 'preallocation'],
    [{ to: 'vpc', create: { subformat: 'dynamic' } }, 'ERR_QCOW2_UNSUPPORTED_FEATURE', 'to'],
    [{ to: 'vmdk', create: { subformat: 'monolithicSparse' } }, 'ERR_QCOW2_UNSUPPORTED_FEATURE', 'subformat'],
    [{ to: 'raw', compress: true }, 'ERR_QCOW2_INVALID_ARGUMENT', 'compress'],
    [{ to: 'vpc', compress: true }, 'ERR_QCOW2_INVALID_ARGUMENT', 'compress'],
    [{ compress: { level: 13 } }, 'ERR_QCOW2_INVALID_ARGUMENT', 'level'],
    [{ to: 'vdi' }, 'ERR_QCOW2_INVALID_ARGUMENT', 'to'],
    [{ start: 2 ** 40 }, 'ERR_QCOW2_INVALID_ARGUMENT', 'start'],
    [{ references: 'layer' }, 'ERR_QCOW2_INVALID_ARGUMENT', 'references'],
    [{ overwrite: true }, 'ERR_QCOW2_INVALID_ARGUMENT', 'overwrite'],
  ])('is refused for %o, and holds nothing', async (options, code, field) => {
    const given = options as unknown as Qcow2StreamOptions
    expect(await failure(() => createQcow2Stream(at('disk.qcow2'), given))).toMatchObject({ code, field })
    await free(at('disk.qcow2'))
  })
})
