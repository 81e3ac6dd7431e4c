import { open as openFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { convert, type Image, open } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { failure, openRaw, pattern, temporaryFolder, writeRaw } from './fixtures.js'

const folder = temporaryFolder()
const SIZE = 3 * 65536 + 512
const RUNS = [
  [0, 700],
  [65536 - 100, 200],
  [SIZE - 512, 512],
] as const
const files: Record<string, string> = {}

const expected = Buffer.alloc(SIZE)
for (const [start, length] of RUNS) pattern(start, length).copy(expected, start)

beforeAll(async () => {
  const raw = writeRaw(join(folder, 'disk.raw'), SIZE, RUNS)
  const plain = join(folder, 'plain.qcow2')
  const zlib = join(folder, 'zlib.qcow2')
  const zstd = join(folder, 'zstd.qcow2')
  await convert(raw, plain, { from: 'raw', to: 'qcow2' })
  await convert(raw, zlib, { from: 'raw', to: 'qcow2', compress: true })
  await convert(raw, zstd, { from: 'raw', to: 'qcow2', compress: { type: 'zstd' } })
  Object.assign(files, { raw, plain, zlib, zstd })
})

const openKind = (kind: string): Promise<Image> =>
  kind === 'raw' ? openRaw(files[kind] ?? '') : open(files[kind] ?? '')

describe.each(['raw', 'plain', 'zlib', 'zstd'])('%s', kind => {
  it('reads the whole disk, whatever the buffer held', async () => {
    await using image = await openKind(kind)
    const buffer = Buffer.alloc(SIZE, 0xaa)
    expect((await image.read(buffer, { position: 0 })).bytesRead).toBe(SIZE)
    expect(buffer.equals(expected)).toBe(true)
  })

  it('reads any range, many at once, into any part of a buffer', async () => {
    await using image = await openKind(kind)
    const ranges = Array.from({ length: 200 }, (_, i) => [(i * 7919) % SIZE, 1 + ((i * 104729) % 70000)] as const)
    await Promise.all(
      ranges.map(async ([position, length]) => {
        const buffer = Buffer.alloc(length + 7, 0xaa)
        const { bytesRead } = await image.read(buffer, { position, offset: 5, length })
        const end = Math.min(SIZE, position + length)
        expect(bytesRead).toBe(end - position)
        expect(buffer.subarray(5, 5 + bytesRead).equals(expected.subarray(position, end))).toBe(true)
        expect(buffer.subarray(0, 5).every(byte => byte === 0xaa)).toBe(true)
        expect(buffer.subarray(5 + bytesRead).every(byte => byte === 0xaa)).toBe(true)
      }),
    )
  })

  it('ends at the end of the disk', async () => {
    await using image = await openKind(kind)
    const buffer = Buffer.alloc(16)
    const at = async (position: number | bigint) => (await image.read(buffer, { position })).bytesRead
    expect([await at(SIZE - 4), await at(SIZE), await at(BigInt(SIZE) + 1n), await at(2 ** 53 - 1)]).toEqual([
      4, 0, 0, 0,
    ])
    expect((await image.read(Buffer.alloc(0), { position: 0 })).bytesRead).toBe(0)
    expect((await image.read(buffer, { position: 0, length: 0 })).bytesRead).toBe(0)
  })

  it('reads into several buffers', async () => {
    await using image = await openKind(kind)
    const sizes = [1, 0, 511, 65536, 3]
    const { bytesRead, buffers } = await image.readv(
      sizes.map(size => Buffer.alloc(size)),
      65000,
    )
    expect(bytesRead).toBe(66051)
    expect(Buffer.concat(buffers).equals(expected.subarray(65000, 65000 + 66051))).toBe(true)
    expect((await image.readv([Buffer.alloc(10), Buffer.alloc(10)], SIZE - 15)).bytesRead).toBe(15)
    expect((await image.readv([], 0)).bytesRead).toBe(0)
  })
})

describe('bytes in memory', () => {
  // What was inflated is read without the event loop, whose turn comes all the same.
  it.each(['zlib', 'zstd'])('of %s clusters keep nobody else waiting', async kind => {
    await using image = await openKind(kind)
    const buffer = Buffer.alloc(512)
    await image.read(buffer, { position: 65536 })
    let [reads, turns] = [0, 0]
    const used = new Set<number>()
    const turn = (): void => {
      turns++
      if (reads < 1000) setImmediate(turn)
    }
    setImmediate(turn)
    for (; reads < 1000; reads++) {
      const position = (reads * 64) % 65024
      buffer.fill(0xaa)
      const { bytesRead } = await image.read(buffer, { position: 65536 + position })
      used.add(turns)
      expect(bytesRead).toBe(512)
      expect(buffer.equals(expected.subarray(65536 + position, 65536 + position + 512))).toBe(true)
    }
    // 32 in a row, which may happen a few times in a turn.
    expect(used.size).toBeGreaterThan(5)
    expect(used.size).toBeLessThan(100)
  })

  it('are those that were written last', async () => {
    const path = join(folder, 'written.qcow2')
    await convert(files['raw'] ?? '', path, { from: 'raw', to: 'qcow2', compress: true })
    await using image = await open(path, { flags: 'r+' })
    const buffer = Buffer.alloc(512)
    for (let round = 0; round < 20; round++) {
      const compressed = round % 3 !== 0
      const length = compressed ? 65536 : 512
      await image.write(Buffer.alloc(length, round), { position: 65536, compressed })
      for (const position of [65536, 65536 + 100]) {
        await image.read(buffer, { position, length: 412 })
        expect(buffer.subarray(0, 412).every(byte => byte === round)).toBe(true)
      }
    }
  })
})

describe('buffers', () => {
  it.each<[string, () => NodeJS.ArrayBufferView]>([
    ['Buffer', () => Buffer.alloc(64)],
    ['a pooled Buffer', () => Buffer.allocUnsafe(64)],
    ['Uint8Array', () => new Uint8Array(64)],
    ['Uint8ClampedArray', () => new Uint8ClampedArray(64)],
    ['Float64Array', () => new Float64Array(8)],
    ['BigUint64Array', () => new BigUint64Array(8)],
    ['DataView', () => new DataView(new ArrayBuffer(100), 10, 64)],
    ['a part of an ArrayBuffer', () => new Uint8Array(new ArrayBuffer(100), 30, 64)],
    ['shared memory', () => new Uint8Array(new SharedArrayBuffer(64))],
    ['growable shared memory', () => new Uint8Array(growable())],
  ])('%s is filled, and handed back', async (_, make) => {
    await using image = await open(files['plain'] ?? '')
    const view = make()
    const { bytesRead, buffer } = await image.read(view, { position: 100 })
    expect(bytesRead).toBe(64)
    expect(buffer).toBe(view)
    const bytes = Buffer.from(view.buffer, view.byteOffset, view.byteLength)
    expect(Buffer.compare(bytes, expected.subarray(100, 164))).toBe(0)
  })

  const growable = (): SharedArrayBuffer =>
    Reflect.construct(SharedArrayBuffer, [64, { maxByteLength: 128 }]) as SharedArrayBuffer

  it('that are detached are refused, not read as empty', async () => {
    await using image = await open(files['plain'] ?? '')
    const view = new Uint8Array(64)
    structuredClone(view.buffer, { transfer: [view.buffer] })
    const error = await failure(() => image.read(view, { position: 0 }))
    expect(error.code).toBe('ERR_QCOW2_INVALID_ARGUMENT')
    expect(error.message).toContain('detached')
    expect((await failure(() => image.readv([view], 0))).message).toContain('detached')
  })

  it('that can be resized are refused', async () => {
    await using image = await open(files['plain'] ?? '')
    const memory = Reflect.construct(ArrayBuffer, [64, { maxByteLength: 128 }]) as ArrayBuffer
    const error = await failure(() => image.read(new Uint8Array(memory), { position: 0 }))
    expect(error.code).toBe('ERR_QCOW2_INVALID_ARGUMENT')
    expect(error.message).toContain('resizable')
  })
})

describe('sources', () => {
  it('a URL, and a path as bytes', async () => {
    await using a = await open(pathToFileURL(files['plain'] ?? ''))
    await using b = await open(Buffer.from(files['plain'] ?? ''))
    expect([a.virtualSize, b.virtualSize]).toEqual([SIZE, SIZE])
  })

  it('a FileHandle, which stays the caller’s', async () => {
    const handle = await openFile(files['plain'] ?? '')
    const before = (await handle.read(Buffer.alloc(4), 0, 4, null)).buffer
    await using image = await open(handle)
    const buffer = Buffer.alloc(700)
    await image.read(buffer, { position: 0 })
    expect(buffer.equals(expected.subarray(0, 700))).toBe(true)
    // The cursor is where it was, and the handle closes alone.
    expect((await handle.read(Buffer.alloc(4), 0, 4, null)).buffer).toEqual(Buffer.from([0, 0, 0, 3]))
    expect(before.toString('latin1')).toBe('QFI\xfb')
    await handle.close()
    await image.read(buffer, { position: 0 })
    expect(buffer.equals(expected.subarray(0, 700))).toBe(true)
  })

  it('a FileHandle that is closed is refused', async () => {
    const handle = await openFile(files['plain'] ?? '')
    await handle.close()
    expect((await failure(() => open(handle))).code).toBe('EBADF')
  })

  it('a raw disk only where that is said', async () => {
    const error = await failure(() => open(files['raw'] ?? ''))
    expect(error.code).toBe('ERR_QCOW2_FORMAT_UNKNOWN')
    expect(error.path).toBe(files['raw'])
    expect(error.message).toContain("format: 'raw'")
  })

  it('a directory and a missing file, with the system’s codes', async () => {
    expect(await failure(() => open(folder))).toMatchObject({ code: 'EISDIR', syscall: 'open', path: folder })
    const missing = join(folder, 'missing')
    const error = await failure(() => open(missing))
    expect(error).toMatchObject({ code: 'ENOENT', errno: -2, syscall: 'open', path: missing })
    expect(error.message).toBe(`ENOENT: no such file or directory, open '${missing}'`)
    expect(error.stack).toContain('read.test.ts')
  })
})
