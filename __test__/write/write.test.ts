/** Writing: every shape of image against a model and QEMU's tools, many requests at once, every cache mode. */

import { spawnSync } from 'node:child_process'
import { readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import {
  type CacheMode,
  create,
  type Image,
  type NewImageOptions,
  type OpenOptions,
  open,
  type Qcow2Shape,
} from 'qcow2'
import { describe, expect, it } from 'vitest'
import { failure, pattern, temporaryFolder, writeRaw } from '../api/fixtures.js'
import { assertSameBytes, describeWithQemu, ok, qemuImg } from '../interop/qemu.js'
import { library } from '../lifecycle/child.js'
import { drawer, Model } from './model.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const SIZE = 3 * 2 ** 20

const base = writeRaw(at('base.raw'), 2 * 2 ** 20, [
  [0, 700_000],
  [1_000_000, 300_000],
])

/** The guest's bytes, as QEMU reads them. */
function guest(path: string): Buffer {
  const out = `${path}.out`
  ok(qemuImg('convert', '-O', 'raw', path, out))
  return readFileSync(out)
}

const shapes: Record<string, NewImageOptions & Qcow2Shape> = {
  default: { size: SIZE },
  'version 2': { size: SIZE, version: 2 },
  'small clusters': { size: SIZE, clusterSize: 512 },
  'large clusters': { size: SIZE, clusterSize: 2 ** 21 },
  subclusters: { size: SIZE, extendedL2: true, clusterSize: 2 ** 16 },
  zstd: { size: SIZE, compressionType: 'zstd' },
  '1-bit refcounts': { size: SIZE, refcountBits: 1 },
  '64-bit refcounts': { size: SIZE, refcountBits: 64 },
  'lazy refcounts': { size: SIZE, lazyRefcounts: true },
  'metadata preallocation': { size: SIZE, preallocation: 'metadata' },
  overlay: { size: SIZE, backingFile: base, backingFormat: 'raw' },
  'overlay with subclusters': { size: SIZE, backingFile: base, backingFormat: 'raw', extendedL2: true },
  'overlay of version 2': { size: SIZE, backingFile: base, backingFormat: 'raw', version: 2 },
  'data file': { size: SIZE, dataFile: at('data.bin') },
  'raw data file': { size: SIZE, dataFile: at('data.raw'), dataFileRaw: true },
}

describeWithQemu('random changes', () => {
  const variants: OpenOptions[] = [{}, { detectZeroes: 'unmap', discard: 'unmap', cache: 'none' }]
  const cases = Object.entries(shapes).flatMap(([name, shape]) =>
    variants.map((variant, index) => ({ name: `${name} ${JSON.stringify(variant)}`, shape, variant, index })),
  )
  it.each(cases)('$name', async ({ name, shape, variant, index }) => {
    const path = at(`shape${index}-${name.replace(/\W+/g, '-')}.qcow2`)
    const start = Buffer.alloc(SIZE)
    if (shape.backingFile !== undefined) readFileSync(base).copy(start)
    const model = new Model(start, name)
    {
      await using image = await create(path, { ...shape, overwrite: true })
      expect(image.readOnly).toBe(false)
      for (let i = 0; i < 25; i++) await model.change(image)
      await model.compare(image)
    }
    assertSameBytes(model.bytes, guest(path), 'read by QEMU')
    {
      const options: OpenOptions = { flags: 'r+', references: 'allow', ...variant }
      await using image = await open(path, options)
      await model.compare(image)
      for (let i = 0; i < 25; i++) await model.change(image)
      await model.compare(image)
      expect(await image.check()).toMatchObject({ ok: true })
    }
    ok(qemuImg('check', '-f', 'qcow2', path))
    assertSameBytes(model.bytes, guest(path), 'read by QEMU after the second time')
    if (shape.dataFileRaw) assertSameBytes(model.bytes, readFileSync(at('data.raw')).subarray(0, SIZE), 'the data file')
  })
})

describeWithQemu('compressed writes', () => {
  it.each(['zlib', 'zstd'] as const)('%s clusters are packed, and a ragged end is a cluster too', async type => {
    const path = at(`compressed-${type}.qcow2`)
    const text = Buffer.from('all work and no play makes a dull disk\n'.repeat(40_000)).subarray(0, 20 * 65536 + 1024)
    {
      await using image = await create(path, { size: text.length, compressionType: type })
      await image.write(text, { position: 0, length: 65536 * 10, compressed: true })
      const rest = text.subarray(65536 * 10)
      await image.writev([rest.subarray(0, 100_000), rest.subarray(100_000)], 65536 * 10, { compressed: true })
      expect((await image.check()).compressedClusters).toBe(21)
      // Random bytes do not shrink: they are stored as they are.
      const noise = Buffer.from(Uint8Array.from({ length: 65536 }, drawer('noise').bind(null, 256)))
      await image.write(noise, { position: 65536, compressed: true })
      noise.copy(text, 65536)
      expect((await image.check()).compressedClusters).toBe(20)
      // And a write into a compressed cluster inflates it.
      await image.write(Buffer.alloc(10, 1), { position: 3 * 65536 + 5 })
      text.fill(1, 3 * 65536 + 5, 3 * 65536 + 15)
    }
    ok(qemuImg('check', path))
    assertSameBytes(text, guest(path), 'read by QEMU')
    expect(statSync(path).size).toBeLessThan(12 * 65536)
  })
})

describeWithQemu('discard and zeroes', () => {
  it('frees clusters only when told to', async () => {
    const path = at('discard.qcow2')
    await (await create(path, { size: SIZE })).close()
    const allocated = async (): Promise<number> => {
      await using image = await open(path, { forceShare: true })
      return (await image.check()).allocatedClusters
    }
    for (const discard of [undefined, 'ignore', 'unmap'] as const) {
      {
        await using image = await open(path, { flags: 'r+', discard })
        await image.write(Buffer.alloc(SIZE, 9), { position: 0 })
        await image.discard(65536, 10 * 65536)
        const { buffer } = await image.read(Buffer.alloc(1), { position: 70_000 })
        expect(buffer[0]).toBe(discard === 'unmap' ? 0 : 9)
      }
      expect(await allocated()).toBe(discard === 'unmap' ? 38 : 48)
    }
    {
      await using image = await open(path, { flags: 'r+' })
      await image.writeZeroes(20 * 65536, 5 * 65536)
      await image.writeZeroes(30 * 65536, 5 * 65536, { unmap: true })
    }
    expect(await allocated()).toBe(33)
    ok(qemuImg('check', path))
  })

  it.each([
    ['off', 48],
    ['on', 48],
    ['unmap', 0],
  ] as const)('detectZeroes %s', async (detectZeroes, clusters) => {
    const path = at(`zeroes-${detectZeroes}.qcow2`)
    {
      await using image = await create(path, { size: SIZE })
      await image.write(Buffer.alloc(SIZE, 1), { position: 0 })
    }
    await using image = await open(path, { flags: 'r+', detectZeroes })
    await image.write(Buffer.alloc(SIZE), { position: 0 })
    expect((await image.check()).allocatedClusters).toBe(clusters)
    let zero = 0
    for await (const entry of image.map()) if (entry.zero) zero += entry.length
    expect(zero).toBe(detectZeroes === 'off' ? 0 : SIZE)
  })
})

describeWithQemu('truncate', () => {
  it.each([512, 65536])('grows the disk, with clusters of %i bytes', async clusterSize => {
    const path = at(`grow-${clusterSize}.qcow2`)
    const model = new Model(Buffer.alloc(100 * 512), 'grow')
    {
      await using image = await create(path, { size: 100 * 512, clusterSize })
      await image.write(pattern(0, 100 * 512), { position: 0 })
      model.bytes = pattern(0, 100 * 512)
      for (const size of [101 * 512, 5_000_192, 2 ** 23]) {
        await image.truncate(size)
        expect(image.virtualSize).toBe(size)
        model.bytes = Buffer.concat([model.bytes, Buffer.alloc(size - model.bytes.length)])
        await model.compare(image)
        await model.change(image)
      }
      const shrunk = await failure(() => image.truncate(512))
      expect(shrunk.code).toBe('ERR_QCOW2_DATA_LOSS')
      expect((await failure(() => image.truncate(2 ** 23 + 1))).code).toBe('ERR_QCOW2_INVALID_ARGUMENT')
      expect((await failure(() => image.truncate(2 ** 52))).code).toBe('ERR_QCOW2_LIMIT')
      expect(image.virtualSize).toBe(2 ** 23)
    }
    ok(qemuImg('check', path))
    assertSameBytes(model.bytes, guest(path), 'read by QEMU')
  })

  it('grows a raw image', async () => {
    const path = writeRaw(at('grow.raw'), 1024, [[0, 1024]])
    await using image = await open(path, { format: 'raw', flags: 'r+' })
    await image.truncate(4096)
    await image.write(Buffer.alloc(1, 5), { position: 4095 })
    await image.close()
    expect(readFileSync(path)).toEqual(Buffer.concat([pattern(0, 1024), Buffer.alloc(3071), Buffer.alloc(1, 5)]))
  })
})

describeWithQemu('many requests at once', () => {
  it('1000 writes, each of them right', async () => {
    const path = at('thousand.qcow2')
    const size = 64 * 2 ** 20
    const expected = Buffer.alloc(size)
    {
      await using image = await create(path, { size })
      const writes = Array.from({ length: 1000 }, async (_, i) => {
        // Neighbours share clusters, and no two overlap.
        const position = ((i * 389) % 1000) * 65_000
        const data = pattern(position, 1 + ((i * 7919) % 64_999))
        data.copy(expected, position)
        const { bytesWritten, buffer } = await image.write(data, { position })
        expect(bytesWritten).toBe(data.length)
        expect(buffer).toBe(data)
      })
      const others = Array.from({ length: 50 }, (_, i) =>
        i % 10 === 0 ? image.datasync() : image.read(Buffer.alloc(9999), { position: i * 1_000_000 }),
      )
      await Promise.all([...writes, ...others])
    }
    ok(qemuImg('check', path))
    assertSameBytes(expected, guest(path), 'read by QEMU')
  })

  it('overlapping writes end up whole: the last bytes are of one of them', async () => {
    const path = at('overlap.qcow2')
    await using image = await create(path, { size: SIZE, clusterSize: 4096 })
    for (let round = 0; round < 10; round++) {
      const writes = Array.from({ length: 20 }, (_, i) =>
        i % 7 === 3
          ? image.writeZeroes(round * 1000, 50_000, { unmap: true })
          : image.write(Buffer.alloc(50_000, i + 1), { position: round * 1000 }),
      )
      await Promise.all(writes)
      const { buffer } = await image.read(Buffer.alloc(50_000), { position: round * 1000 })
      // Within a cluster, one request wins.
      for (let sector = 0; sector < 40_000; sector += 512) {
        const value = buffer[sector]
        expect(buffer.subarray(sector, sector + 1).every(byte => byte === value)).toBe(true)
      }
    }
    expect((await image.check()).ok).toBe(true)
    await image.close()
    ok(qemuImg('check', path))
  })
})

describe('cache modes', () => {
  const modes: CacheMode[] = ['writeback', 'none', 'writethrough', 'directsync', 'unsafe']
  it.each(modes)('%s: written, read back, there after closing', async cache => {
    const path = at(`cache-${cache}.qcow2`)
    await (await create(path, { size: SIZE })).close()
    const model = new Model(Buffer.alloc(SIZE), `cache ${cache}`)
    {
      await using image = await open(path, { flags: 'r+', cache })
      for (let i = 0; i < 30; i++) await model.change(image)
    }
    await using image = await open(path, { cache })
    await model.compare(image)
    expect((await image.check()).ok).toBe(true)
  })

  it.each(modes)('%s: a raw disk keeps its length and its bytes', async cache => {
    const path = writeRaw(at(`cache-${cache}.raw`), 10_752, [[0, 10_752]])
    {
      await using image = await open(path, { format: 'raw', flags: 'r+', cache })
      const buffers = [Buffer.alloc(3, 1), Buffer.alloc(700, 2)]
      await image.writev(buffers, 5_000)
      await image.write(Buffer.alloc(4, 3), { position: 10_748 })
    }
    const expected = pattern(0, 10_752)
    expected.fill(1, 5_000, 5_003).fill(2, 5_003, 5_703).fill(3, 10_748)
    expect(readFileSync(path).equals(expected)).toBe(true)
  })
})

const traced = spawnSync('strace', ['-V'], { stdio: 'ignore' }).status === 0
if (!traced) process.stderr.write('SKIPPED strace is not installed: host calls are not counted\n')

describe.skipIf(!traced)('host calls', () => {
  const WRITES = 10
  it.each([
    ['writeback', false, 0],
    ['none', true, 0],
    ['writethrough', false, WRITES],
    ['directsync', true, WRITES],
    ['unsafe', false, undefined],
  ] as const)('%s', async (cache, direct, syncsPerWrite) => {
    const path = at(`traced-${cache}.qcow2`)
    await (await create(path, { size: SIZE })).close()
    const count = (writes: number): { syncs: number; direct: boolean } => {
      const program = `require(${JSON.stringify(library)}).open(${JSON.stringify(path)}, { flags: 'r+', cache: '${cache}' })
        .then(async image => {
          for (let i = 0; i < ${writes}; i++) await image.write(Buffer.alloc(65536, 1), { position: i * 65536 })
          await image.close()
        })`
      const trace = at(`trace-${cache}`)
      const args = ['-f', '-e', 'trace=fdatasync,fsync,?open,openat', '-o', trace, process.execPath, '-e', program]
      expect(spawnSync('strace', args, { stdio: 'inherit' }).status).toBe(0)
      const calls = readFileSync(trace, 'utf8').split('\n')
      return {
        syncs: calls.filter(line => /f(?:data)?sync\(/.test(line)).length,
        direct: calls.some(line => line.includes(path) && line.includes('O_DIRECT')),
      }
    }
    const first = count(1)
    expect(first.direct).toBe(direct)
    if (syncsPerWrite === undefined) expect(first.syncs).toBe(0)
    else {
      expect(first.syncs).toBeGreaterThan(0)
      // Of clusters that are allocated by now: one sync per write in the modes that write through, none in the others.
      count(WRITES + 1)
      expect(count(WRITES + 1).syncs - count(1).syncs).toBe(syncsPerWrite)
    }
  })
})

describe('the buffers', () => {
  it('of every kind, and parts of them', async () => {
    const path = at('buffers.qcow2')
    await using image = await create(path, { size: 65536 })
    // From bytes: what a number's bytes are depends on the processor.
    const words = new Uint32Array(Uint8Array.from([4, 3, 2, 1, 8, 7, 6, 5]).buffer)
    await image.write(words, { position: 0 })
    await image.write(new DataView(new ArrayBuffer(8), 2, 4), { position: 2n })
    await image.write(Buffer.from('0123456789'), { position: 100, offset: 2, length: 5 })
    await image.write(new Uint8Array(0), { position: 65536 })
    await image.writev([], 5)
    await image.writev(
      [Buffer.from('ab'), new Uint8Array(0), new Uint16Array(Uint8Array.from(Buffer.from('cd')).buffer)],
      200,
    )
    const { buffer } = await image.read(Buffer.alloc(256), { position: 0 })
    expect(buffer.subarray(0, 8)).toEqual(Buffer.from([4, 3, 0, 0, 0, 0, 6, 5]))
    expect(buffer.toString('latin1', 100, 106)).toBe('23456\0')
    expect(buffer.toString('latin1', 200, 205)).toBe('abcd\0')
  })

  it('more than a mebibyte in pieces', async () => {
    const path = at('pieces.qcow2')
    const image: Image = await create(path, { size: 2 ** 23 })
    const pieces = Array.from({ length: 9 }, (_, i) => pattern(i * 300_001, 300_001))
    expect(await image.writev(pieces, 12_345)).toEqual({ bytesWritten: 2_700_009, buffers: pieces })
    const { buffer } = await image.read(Buffer.alloc(2_700_009), { position: 12_345 })
    assertSameBytes(pattern(0, 2_700_009), buffer, 'read back')
    await image.close()
  })
})
