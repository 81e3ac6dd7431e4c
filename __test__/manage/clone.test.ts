/** Copies of a disk at one moment, taken while it is written to. */

import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type CloneOptions, check, convert, create, type Image, open, type TargetFormat } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { failure, pattern, temporaryFolder, writeRaw } from '../api/fixtures.js'
import { describeWithQemu, ok, qemuImg } from '../interop/qemu.js'
import { drawer } from '../write/model.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20
const SECTOR = 512

const content = async (image: Image): Promise<Buffer> => {
  const buffer = Buffer.alloc(image.virtualSize)
  await image.read(buffer, { position: 0 })
  return buffer
}

const contentOf = async (path: string, format: TargetFormat): Promise<Buffer> => {
  await using image = await open(path, { format, references: 'allow' })
  return await content(image)
}

/** Bytes that say where they belong and which write made them; write 0 is what was never written. */
const stamp = (sector: number, write: number): Buffer => {
  const bytes = Buffer.alloc(SECTOR)
  for (let i = 0; write > 0 && i < SECTOR; i += 16) {
    bytes.writeDoubleLE(sector + 1, i)
    bytes.writeDoubleLE(write, i + 8)
  }
  return bytes
}

/** The write that made a sector; fails for bytes that no write made. */
const writeIn = (bytes: Buffer, sector: number): number => {
  const part = bytes.subarray(sector * SECTOR, (sector + 1) * SECTOR)
  const write = part.readDoubleLE(8)
  expect(part.equals(stamp(sector, write)), `sector ${sector}`).toBe(true)
  return write
}

const LANES = 1000
const SECTORS = 8

/** Writes one behind the other to a lane's own sectors: every thousandth of the disk, so that all lanes meet everywhere. */
class Lane {
  readonly number: number
  readonly log: number[] = []
  issued = 0
  done = 0

  constructor(number: number) {
    this.number = number
  }

  async write(image: Image, draw: (bound: number) => number): Promise<void> {
    const sector = draw(SECTORS) * LANES + this.number
    this.log.push(sector)
    this.issued += 1
    await image.write(stamp(sector, this.issued), { position: sector * SECTOR })
    this.done += 1
  }

  /** Whether the copy is what the first `n` writes made of this lane, for one `n` of the range. */
  isIn(copy: Buffer, least: number, most: number): boolean {
    const own = Array.from({ length: SECTORS }, (_, i) => i * LANES + this.number)
    const found = new Map(own.map(sector => [sector, writeIn(copy, sector)]))
    for (let n = least; n <= most; n++) {
      const expected = new Map(own.map(sector => [sector, this.log.lastIndexOf(sector, n - 1) + 1]))
      if (n === 0) for (const sector of own) expected.set(sector, 0)
      if (own.every(sector => expected.get(sector) === found.get(sector))) return true
    }
    return false
  }
}

/** 1,000 requests in flight, all the time; clones in the middle of them. */
async function stress(image: Image, clones: readonly [string, CloneOptions][], seed: string): Promise<void> {
  const draw = drawer(seed)
  const lanes = Array.from({ length: LANES }, (_, number) => new Lane(number))
  let going = true
  const writers = lanes.map(async lane => {
    while (going) await lane.write(image, draw)
  })
  for (const [path, options] of clones) {
    const before = lanes.map(lane => lane.done)
    let after: number[] = []
    const onPointInTime = (): void => {
      after = lanes.map(lane => lane.issued)
    }
    const result = await image.clone(path, { ...options, onPointInTime })
    expect(result.virtualSize).toBe(image.virtualSize)
    const copy = await contentOf(path, options.to)
    for (const lane of lanes) {
      const [least, most] = [before[lane.number] ?? 0, after[lane.number] ?? -1]
      expect(lane.isIn(copy, least, most), `${path}: lane ${lane.number}, ${least} to ${most} writes`).toBe(true)
    }
  }
  going = false
  await Promise.all(writers)
  const end = await content(image)
  for (const lane of lanes) expect(lane.isIn(end, lane.issued, lane.issued)).toBe(true)
}

const SIZE = LANES * SECTORS * SECTOR

describe('1,000 requests in flight', () => {
  it('do not show in a clone of a qcow2 image', { timeout: 120_000 }, async () => {
    const path = at('busy.qcow2')
    await using image = await create(path, { size: SIZE, clusterSize: 4096 })
    await stress(
      image,
      [
        [at('busy-copy.raw'), { to: 'raw' }],
        [at('busy-copy.qcow2'), { to: 'qcow2' }],
        [at('busy-small.qcow2'), { to: 'qcow2', create: { clusterSize: 512 }, concurrency: 1 }],
        [at('busy-packed.qcow2'), { to: 'qcow2', compress: true }],
      ],
      'qcow2',
    )
    await image.close()
    expect((await check(path)).ok).toBe(true)
  })

  it('do not show in a clone of a raw image', { timeout: 120_000 }, async () => {
    const path = writeRaw(at('busy.raw'), SIZE, [])
    await using image = await open(path, { format: 'raw', flags: 'r+' })
    await stress(
      image,
      [
        [at('raw-copy.raw'), { to: 'raw' }],
        [at('raw-copy.qcow2'), { to: 'qcow2' }],
      ],
      'raw',
    )
  })
})

describe('a clone', () => {
  it('is the disk at its point in time, with what the backing file has', async () => {
    writeRaw(at('base.raw'), 3 * MIB, [[0, 3 * MIB]])
    await using image = await create(at('overlay.qcow2'), {
      size: 4 * MIB,
      backingFile: 'base.raw',
      backingFormat: 'raw',
    })
    await image.write(Buffer.alloc(200_000, 7), { position: 100_000 })
    const then = await content(image)
    const progress: number[] = []
    const writes: Promise<unknown>[] = []
    const result = await image.clone(at('whole.qcow2'), {
      to: 'qcow2',
      onProgress: ({ phase, current, total }) => {
        expect(phase).toBe('clone')
        progress.push(current / total)
      },
      onPointInTime: () => {
        writes.push(image.write(Buffer.alloc(3 * MIB, 9), { position: 0 }), image.writeZeroes(3 * MIB, MIB))
      },
    })
    await Promise.all(writes)
    expect(result).toMatchObject({ virtualSize: 4 * MIB, bytesWritten: 3 * MIB })
    expect(progress.at(-1)).toBe(1)
    expect((await contentOf(at('whole.qcow2'), 'qcow2')).equals(then)).toBe(true)
    expect((await content(image)).equals(then)).toBe(false)
    await using copy = await open(at('whole.qcow2'))
    expect((await copy.info()).backingFilename).toBeUndefined()
  })

  it('is made of an image that is open for reading, and of a view of a snapshot', async () => {
    const path = at('views.qcow2')
    {
      await using image = await create(path, { size: MIB })
      await image.write(pattern(0, MIB), { position: 0 })
      await image.snapshots.create('then')
      await image.write(Buffer.alloc(MIB, 3), { position: 0 })
    }
    for (const [snapshot, expected] of [
      ['then', pattern(0, MIB)],
      [undefined, Buffer.alloc(MIB, 3)],
    ] as const) {
      await using view = await open(path, { snapshot })
      await view.clone(at('view.raw'), { to: 'raw', overwrite: true })
      expect(readFileSync(at('view.raw')).equals(expected)).toBe(true)
    }
  })

  it('is sparse', async () => {
    await using image = await create(at('sparse.qcow2'), { size: 2 ** 40 })
    await image.write(Buffer.alloc(1000, 1), { position: 2 ** 39 })
    await image.write(Buffer.alloc(MIB), { position: 0 })
    const { bytesWritten } = await image.clone(at('sparse.raw'), { to: 'raw' })
    expect(bytesWritten).toBe(4096)
    expect(statSync(at('sparse.raw')).size).toBe(2 ** 40)
    expect(statSync(at('sparse.raw')).blocks * 512).toBeLessThan(MIB)
    const qcow2 = await image.clone(at('sparse-copy.qcow2'), { to: 'qcow2' })
    expect(qcow2.bytesWritten).toBe(65536)
  })

  it('keeps its data in a data file where it is asked to', async () => {
    await using image = await create(at('for-data.qcow2'), { size: MIB })
    await image.write(pattern(0, MIB), { position: 0 })
    await image.clone(at('with-data.qcow2'), {
      to: 'qcow2',
      create: { dataFile: at('with-data.raw'), dataFileRaw: true },
    })
    expect(readFileSync(at('with-data.raw')).equals(pattern(0, MIB))).toBe(true)
    expect((await contentOf(at('with-data.qcow2'), 'qcow2')).equals(pattern(0, MIB))).toBe(true)
  })

  it('that cannot be is refused, and nothing is there', async () => {
    await using image = await create(at('refused.qcow2'), { size: MIB })
    await image.write(pattern(0, MIB), { position: 0 })
    const before = readdirSync(folder).sort()
    const refused: [string, unknown, string, string | undefined][] = [
      [at('no'), {}, 'ERR_QCOW2_INVALID_ARGUMENT', 'to'],
      [at('no'), { to: 'vhd' }, 'ERR_QCOW2_INVALID_ARGUMENT', 'to'],
      [at('no'), { to: 'raw', compress: true }, 'ERR_QCOW2_INVALID_ARGUMENT', 'compress'],
      [at('no'), { to: 'raw', create: { clusterSize: 512 } }, 'ERR_QCOW2_INVALID_ARGUMENT', 'clusterSize'],
      [at('no'), { to: 'raw', create: { preallocation: 'metadata' } }, 'ERR_QCOW2_INVALID_ARGUMENT', 'preallocation'],
      [at('no'), { to: 'qcow2', create: { clusterSize: 1000 } }, 'ERR_QCOW2_INVALID_ARGUMENT', 'clusterSize'],
      [at('no'), { to: 'qcow2', overwriting: true }, 'ERR_QCOW2_INVALID_ARGUMENT', 'overwriting'],
      [
        at('no'),
        { to: 'qcow2', create: { backingFile: 'base.raw', backingFormat: 'raw' } },
        'ERR_QCOW2_INVALID_ARGUMENT',
        'backingFile',
      ],
      [
        at('no'),
        { to: 'qcow2', compress: true, create: { preallocation: 'full' } },
        'ERR_QCOW2_INVALID_ARGUMENT',
        'preallocation',
      ],
      [at('refused.qcow2'), { to: 'qcow2' }, 'ERR_QCOW2_INVALID_ARGUMENT', undefined],
      [at('refused.qcow2'), { to: 'raw', overwrite: true }, 'ERR_QCOW2_INVALID_ARGUMENT', undefined],
      [at('missing/no'), { to: 'raw' }, 'ENOENT', undefined],
      [folder, { to: 'raw' }, 'EISDIR', undefined],
    ]
    for (const [target, options, code, field] of refused) {
      const error = await failure(() => image.clone(target, options as CloneOptions))
      expect(error.code, error.message).toBe(code)
      if (field !== undefined) expect(error.field).toBe(field)
    }
    writeFileSync(at('there'), 'something')
    expect((await failure(() => image.clone(at('there'), { to: 'raw' }))).code).toBe('EEXIST')
    expect(readFileSync(at('there'), 'utf8')).toBe('something')
    expect(readdirSync(folder).sort()).toEqual([...before, 'there'].sort())
    await image.clone(at('there'), { to: 'raw', overwrite: true })
    expect(readFileSync(at('there')).equals(pattern(0, MIB))).toBe(true)
  })

  it('can be aborted, and leaves nothing', async () => {
    await using image = await create(at('abort.qcow2'), { size: 64 * MIB })
    for (let position = 0; position < 64 * MIB; position += 8 * MIB) {
      await image.write(Buffer.alloc(8 * MIB, 5), { position })
    }
    const reason = new Error('enough')
    const aborted = AbortSignal.abort(reason)
    await expect(image.clone(at('aborted'), { to: 'raw', signal: aborted })).rejects.toMatchObject({ cause: reason })
    const controller = new AbortController()
    const cloning = image.clone(at('aborted'), {
      to: 'qcow2',
      signal: controller.signal,
      concurrency: 1,
      onPointInTime: () => controller.abort(reason),
    })
    await expect(cloning).rejects.toMatchObject({ name: 'AbortError', cause: reason })
    const thrown = new Error('thrown')
    const throwing = image.clone(at('aborted'), {
      to: 'qcow2',
      onPointInTime: () => {
        throw thrown
      },
    })
    await expect(throwing).rejects.toBe(thrown)
    expect(existsSync(at('aborted'))).toBe(false)
    await image.write(Buffer.alloc(MIB, 6), { position: 0 })
    expect((await image.check()).ok).toBe(true)
  })

  it('ends when the image is closed', async () => {
    const image = await create(at('closing.qcow2'), { size: 64 * MIB })
    for (let position = 0; position < 64 * MIB; position += 8 * MIB) {
      await image.write(Buffer.alloc(8 * MIB, 5), { position })
    }
    let closing: Promise<void> | undefined
    const cloning = image.clone(at('closed-over'), {
      to: 'qcow2',
      concurrency: 1,
      onPointInTime: () => {
        closing = image.close()
      },
    })
    const error = await failure(() => cloning)
    expect(error.code).toBe('ERR_QCOW2_CLOSED')
    await closing
    expect(existsSync(at('closed-over'))).toBe(false)
    expect((await failure(() => image.clone(at('closed-over'), { to: 'raw' }))).code).toBe('ERR_QCOW2_CLOSED')
    expect((await check(at('closing.qcow2'))).ok).toBe(true)
  })
})

describeWithQemu('QEMU', () => {
  it.each([
    ['plain', {}],
    ['compressed', { compress: { type: 'zstd', level: 3 } }],
    ['for readers of small windows', { compress: { window: 'small' } }],
    ['with subclusters', { create: { extendedL2: true, clusterSize: 65536 } }],
    ['preallocated', { create: { preallocation: 'falloc' } }],
    ['of version 2', { create: { version: 2 } }],
  ] as const)('finds a clone sound: %s', async (name, options) => {
    const path = at(`qemu ${name}.qcow2`)
    const copy = at(`qemu ${name} copy.qcow2`)
    await using image = await create(path, { size: 5 * MIB + 512 })
    await image.write(pattern(0, 3 * MIB), { position: 70_000 })
    const then = await content(image)
    const writes: Promise<unknown>[] = []
    await image.clone(copy, {
      to: 'qcow2',
      ...options,
      onPointInTime: () => {
        for (let n = 0; n < 40; n++) writes.push(image.write(Buffer.alloc(9000, n), { position: n * 120_000 }))
      },
    })
    await Promise.all(writes)
    ok(qemuImg('check', copy))
    ok(qemuImg('convert', '-O', 'raw', copy, `${copy}.raw`))
    expect(readFileSync(`${copy}.raw`).equals(then)).toBe(true)
    // A clone is an image like others: it converts back.
    await convert(copy, at(`qemu ${name}.raw`), { to: 'raw' })
    expect(readFileSync(at(`qemu ${name}.raw`)).equals(then)).toBe(true)
  })
})
