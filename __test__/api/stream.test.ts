import { join } from 'node:path'
import { Readable, Writable } from 'node:stream'
import { buffer as collect } from 'node:stream/consumers'
import { pipeline } from 'node:stream/promises'
import { convert, type Image, open, type SparseChunk } from 'qcow2'
import { beforeAll, describe, expect, it, vi } from 'vitest'
import { failure, pattern, temporaryFolder, writeRaw } from './fixtures.js'

const folder = temporaryFolder()
const SIZE = 5 * 2 ** 20 + 512
const RUNS = [
  [0, 65536],
  [2 ** 20, 300000],
  [SIZE - 512, 512],
] as const
const expected = Buffer.alloc(SIZE)
for (const [start, length] of RUNS) pattern(start, length).copy(expected, start)
const path = join(folder, 'disk.qcow2')

beforeAll(async () => {
  const raw = writeRaw(join(folder, 'disk.raw'), SIZE, RUNS)
  await convert(raw, path, { from: 'raw', to: 'qcow2' })
})

describe('createReadStream', () => {
  it.each([
    [{}, 0, SIZE],
    [{ highWaterMark: 512 * 3 }, 0, SIZE],
    [{ start: 100 }, 100, SIZE],
    [{ end: 99 }, 0, 100],
    [{ start: 65530n, end: 65541n }, 65530, 65542],
    [{ start: SIZE - 10, end: SIZE + 10 }, SIZE - 10, SIZE],
    [{ start: SIZE }, SIZE, SIZE],
    [{ start: 2 ** 40 }, SIZE, SIZE],
  ])('%o gives the guest’s bytes', async (options, start, end) => {
    await using image = await open(path)
    const bytes = await collect(image.createReadStream(options))
    expect(bytes.length).toBe(end - start)
    expect(bytes.equals(expected.subarray(start, end))).toBe(true)
  })

  it('reads no further ahead than the consumer lets it', async () => {
    await using image = await open(path)
    const read = vi.spyOn(image, 'read')
    const stream = image.createReadStream({ highWaterMark: 65536 })
    stream.once('readable', () => {})
    await new Promise(resolve => setTimeout(resolve, 50))
    expect(read.mock.calls.length).toBeGreaterThan(0)
    expect(read.mock.calls.length).toBeLessThanOrEqual(3)
    stream.destroy()
  })

  it('gives every chunk a buffer of its own', async () => {
    await using image = await open(path)
    const chunks: Buffer[] = []
    for await (const chunk of image.createReadStream({ highWaterMark: 4096 })) chunks.push(chunk)
    expect(new Set(chunks.map(chunk => chunk.buffer)).size).toBe(chunks.length)
    expect(Buffer.concat(chunks).equals(expected)).toBe(true)
  })

  it('stops at a signal, and leaves the image open', async () => {
    await using image = await open(path)
    const controller = new AbortController()
    const sink = new Writable({
      write(_chunk, _encoding, done) {
        controller.abort()
        done()
      },
    })
    const stream = image.createReadStream({ highWaterMark: 4096, signal: controller.signal })
    await expect(pipeline(stream, sink)).rejects.toMatchObject({ name: 'AbortError' })
    expect((await image.read(Buffer.alloc(16), { position: 0 })).bytesRead).toBe(16)
  })

  it('leaves the image open when it ends', async () => {
    await using image = await open(path)
    await collect(image.createReadStream())
    expect(image.closed).toBe(false)
  })
})

describe('a sparse stream', () => {
  const chunksOf = async (image: Image, options: object): Promise<SparseChunk[]> =>
    (await image.createReadStream({ sparse: true, ...options }).toArray()) as SparseChunk[]

  it.each([{}, { highWaterMark: 4096 }, { start: 65000, end: 2 ** 20 + 10 }])(
    '%o gives what is not zero, with its place',
    async (options: { start?: number; end?: number }) => {
      await using image = await open(path)
      const disk = Buffer.alloc(SIZE)
      let last = 0
      let total = 0
      for (const { position, buffer } of await chunksOf(image, options)) {
        expect(position).toBeGreaterThanOrEqual(last)
        last = position + buffer.length
        total += buffer.length
        buffer.copy(disk, position)
      }
      const { start = 0, end = SIZE - 1 } = options
      const wanted = Buffer.alloc(SIZE)
      expected.copy(wanted, start, start, end + 1)
      expect(disk.equals(wanted)).toBe(true)
      expect(total).toBeLessThan(SIZE / 2)
    },
  )

  it('passes over an empty disk without a chunk', async () => {
    await using image = await open(path)
    expect(await chunksOf(image, { start: 65536, end: 2 ** 20 - 1 })).toEqual([])
  })
})

describe('readableWebStream', () => {
  it('gives the guest’s bytes', async () => {
    await using image = await open(path)
    const bytes = await collect(image.readableWebStream({ start: 10, end: 2 ** 20 + 9, highWaterMark: 100000 }))
    expect(bytes.equals(expected.subarray(10, 2 ** 20 + 10))).toBe(true)
  })

  it('can be cancelled, and becomes a Node stream', async () => {
    await using image = await open(path)
    const reader = image.readableWebStream().getReader()
    await reader.read()
    await reader.cancel()
    expect((await reader.read()).done).toBe(true)
    const node = Readable.fromWeb(image.readableWebStream({ end: 999 }))
    expect((await collect(node)).equals(expected.subarray(0, 1000))).toBe(true)
  })

  it('fails when the image is closed under it', async () => {
    const image = await open(path)
    const reader = image.readableWebStream({ highWaterMark: 4096 }).getReader()
    await reader.read()
    await image.close()
    const error = await failure(async () => {
      for (;;) if ((await reader.read()).done) return 'ended'
    })
    expect(error.code).toBe('ERR_QCOW2_CLOSED')
  })
})
