/** The package writes, QEMU checks, compares and reads: the API and the command line. */

import { createHash } from 'node:crypto'
import { readFileSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type ConvertOptions, compare, convert, create, open, type Qcow2Shape } from 'qcow2'
import { describe, expect, it } from 'vitest'
import {
  assertSameBytes,
  describeWithQemu,
  fileSystemImage,
  ok,
  qcow2,
  qemuImg,
  samples,
  temporaryFolder,
} from './qemu.js'

const folder = temporaryFolder()
const images = samples()

/** Targets that differ from the default in each direction once. */
const SHAPES: readonly Qcow2Shape[] = [
  {},
  { version: 2, clusterSize: 4096 },
  { clusterSize: 512, refcountBits: 64 },
  { clusterSize: 2 ** 21, refcountBits: 1, compressionType: 'zstd' },
  { clusterSize: 16384, extendedL2: true, lazyRefcounts: true },
]

function judge(target: string, source: string, format: string): void {
  ok(qemuImg('check', '-q', '-f', 'qcow2', target))
  expect(ok(qemuImg('compare', '-f', format, '-F', 'qcow2', source, target))).toBe('Images are identical.\n')
}

describeWithQemu('what convert writes', () => {
  const cases = images.flatMap((sample, index) =>
    [SHAPES[index % SHAPES.length] ?? {}, SHAPES[(index + 2) % SHAPES.length] ?? {}].map(shape => ({
      sample,
      shape,
      name: `${sample.name} to ${JSON.stringify(shape)}`,
    })),
  )

  it.each(cases)('$name is clean and identical, and raw again', async ({ sample, shape }) => {
    const target = join(folder, 'target.qcow2')
    const options: ConvertOptions = { to: 'qcow2', references: 'allow', create: shape, overwrite: true }
    const result = await convert(sample.path, target, options)
    expect(result.virtualSize).toBe(statSync(sample.guest).size)
    judge(target, sample.path, 'qcow2')

    const compressed = join(folder, 'compressed.qcow2')
    const type = shape.compressionType ?? 'zlib'
    const progress: number[] = []
    await convert(target, compressed, {
      to: 'qcow2',
      compress: { type, level: type === 'zlib' ? 9 : 5 },
      create: shape,
      overwrite: true,
      progressInterval: 1,
      onProgress: ({ current }) => progress.push(current),
    })
    judge(compressed, sample.path, 'qcow2')
    expect(progress.at(-1)).toBe(result.virtualSize)
    expect(progress).toEqual(progress.toSorted((a, b) => a - b))

    const raw = join(folder, 'target.raw')
    await convert(compressed, raw, { to: 'raw', overwrite: true })
    assertSameBytes(readFileSync(sample.guest), readFileSync(raw), 'raw again')
    expect(await compare(sample.path, raw, { formatB: 'raw', references: 'allow' })).toMatchObject({ identical: true })
  })

  it.each(images)('does not depend on the number of threads: $name', async sample => {
    const hashes: string[] = []
    for (const concurrency of [1, 2, 5]) {
      const target = join(folder, `threads${concurrency}.qcow2`)
      await convert(sample.path, target, {
        to: 'qcow2',
        references: 'allow',
        compress: true,
        concurrency,
        overwrite: true,
      })
      hashes.push(createHash('sha256').update(readFileSync(target)).digest('hex'))
    }
    expect(new Set(hashes).size).toBe(1)
  })

  it.each(images.filter(({ snapshots }) => snapshots.length > 0))('from a snapshot of $name', async sample => {
    for (const { name, guest } of sample.snapshots) {
      const target = join(folder, 'snapshot.qcow2')
      await convert(sample.path, target, { to: 'qcow2', references: 'allow', snapshot: name, overwrite: true })
      judge(target, guest, 'raw')
    }
  })

  it('is raw with the length and the holes of the disk', async () => {
    const source = join(folder, 'sparse.qcow2')
    const image = await create(source, { size: 2 ** 36 + 512 })
    expect(image.virtualSize).toBe(2 ** 36 + 512)
    // Until then nobody else can open it.
    await image.close()
    const raw = join(folder, 'sparse.raw')
    await convert(source, raw, { to: 'raw' })
    const { size, blocks } = statSync(raw)
    expect(size).toBe(2 ** 36 + 512)
    expect(blocks * 512).toBeLessThan(2 ** 20)
    ok(qemuImg('compare', '-f', 'raw', '-F', 'qcow2', raw, source))
    truncateSync(raw, 0)
  })
})

describeWithQemu('what create writes', () => {
  it.each(SHAPES.map(shape => ({ shape, name: JSON.stringify(shape) })))(
    '$name is described alike',
    async ({ shape }) => {
      const path = join(folder, 'created.qcow2')
      const image = await create(path, { ...shape, size: 3_000_000, overwrite: true })
      await image.close()
      ok(qemuImg('check', '-q', '-f', 'qcow2', path))
      const theirs = JSON.parse(ok(qemuImg('info', '-f', 'qcow2', '--output=json', path)))
      const ours = JSON.parse(ok(qcow2('info', '-f', 'qcow2', '--output=json', path)))
      expect(ours).toEqual(theirs)
      expect(image.virtualSize).toBe(theirs['virtual-size'])
      expect(image.clusterSize).toBe(shape.clusterSize ?? 65536)
    },
  )
})

describeWithQemu('the command line converts as qemu-img does', () => {
  const cases = [
    { name: 'to qcow2', args: ['-O', 'qcow2'] },
    { name: 'compressed', args: ['-c', '-O', 'qcow2'] },
    { name: 'compressed with zstd', args: ['-c', '-O', 'qcow2', '-o', 'compression_type=zstd,cluster_size=32k'] },
    { name: 'with old options', args: ['-O', 'qcow2', '-o', 'compat=0.10,cluster_size=1k'] },
    { name: 'with preallocation', args: ['-O', 'qcow2', '-o', 'preallocation=metadata'] },
    { name: 'without holes', args: ['-S', '0', '-O', 'qcow2'] },
    { name: 'with large holes only, four threads', args: ['-S', '1M', '-m', '4', '-W', '-O', 'qcow2'] },
  ]

  it.each(cases)('$name', ({ args }) => {
    const [sample] = images
    if (sample === undefined) throw new Error('there is no sample')
    const [ours, theirs] = [join(folder, 'ours.qcow2'), join(folder, 'theirs.qcow2')]
    expect(qcow2('convert', '-f', 'qcow2', ...args, sample.path, ours)).toEqual({ code: 0, stdout: '', stderr: '' })
    ok(qemuImg('convert', '-f', 'qcow2', ...args, sample.path, theirs))
    judge(ours, theirs, 'qcow2')
    expect(ok(qcow2('compare', '-f', 'qcow2', '-F', 'qcow2', ours, theirs))).toBe('Images are identical.\n')
    const info = (path: string) => {
      const document = JSON.parse(ok(qemuImg('info', '-f', 'qcow2', '--output=json', path)))
      return [document['virtual-size'], document['cluster-size'], document['format-specific']]
    }
    expect(info(ours)).toEqual(info(theirs))
  })

  it('a snapshot, and onto a base', () => {
    const sample = images.find(({ name, snapshots }) => name.includes('LongerQcow2') && snapshots.length > 0)
    if (sample === undefined) throw new Error('there is no sample with a base and snapshots')
    const target = join(folder, 'by-name.raw')
    const [first] = sample.snapshots
    ok(qcow2('convert', '-f', 'qcow2', '-O', 'raw', '-l', first?.name ?? '', sample.path, target))
    assertSameBytes(readFileSync(first?.guest ?? ''), readFileSync(target), 'a snapshot')

    const base = join(sample.path, '..', 'base.qcow2')
    const delta = join(folder, 'delta.qcow2')
    ok(qcow2('convert', '-f', 'qcow2', '-O', 'qcow2', '-B', base, '-F', 'qcow2', sample.path, delta))
    judge(delta, sample.path, 'qcow2')
    expect(JSON.parse(ok(qemuImg('info', '--output=json', delta)))).toMatchObject({ 'backing-filename': base })
  })
})

describe('disks with random contents', () => {
  /** Deterministic bytes and numbers: a seed in a failure repeats it. */
  function random(seed: number): { bytes(length: number): Buffer; below(bound: number): number } {
    let counter = 0
    const next = (): Buffer => createHash('sha512').update(`${seed}:${counter++}`).digest()
    return {
      below: bound => next().readUIntBE(0, 6) % bound,
      bytes: length => Buffer.concat(Array.from({ length: Math.ceil(length / 64) }, next)).subarray(0, length),
    }
  }

  it.each(Array.from({ length: 12 }, (_, seed) => seed))('survive raw, qcow2 and raw, seed %i', async seed => {
    const { below, bytes } = random(seed)
    const disk = Buffer.alloc(512 * (1 + below(4000)))
    for (let i = below(20); i > 0; i--) {
      const at = below(disk.length)
      const length = 1 + below(Math.min(200_000, disk.length - at))
      if (below(2) === 0) disk.fill(bytes(64), at, at + length)
      else bytes(length).copy(disk, at)
    }
    const [raw, image, back] = [join(folder, 'a.raw'), join(folder, 'b.qcow2'), join(folder, 'c.raw')]
    writeFileSync(raw, disk)
    const zstd = below(2) === 0
    const shape: Qcow2Shape = {
      clusterSize: 2 ** (9 + below(13)),
      refcountBits: ([1, 2, 4, 8, 16, 32, 64] as const)[below(7)],
      compressionType: zstd ? 'zstd' : 'zlib',
    }
    if ((shape.clusterSize ?? 0) >= 16384) shape.extendedL2 = below(2) === 0
    const what = `seed ${seed}, ${JSON.stringify(shape)}`
    await convert(raw, image, { from: 'raw', to: 'qcow2', compress: below(2) === 0, create: shape, overwrite: true })
    await convert(image, back, { to: 'raw', overwrite: true })
    assertSameBytes(disk, readFileSync(back), what)
    await using opened = await open(image)
    const position = below(disk.length)
    const { buffer, bytesRead } = await opened.read(Buffer.alloc(100_000), { position })
    assertSameBytes(disk.subarray(position, position + 100_000), buffer.subarray(0, bytesRead), what)
    expect(await opened.check()).toMatchObject({ ok: true, corruptions: 0, leaks: 0 })
  })
})

const fileSystem = fileSystemImage(folder)

describe.skipIf(fileSystem === undefined)('a file system image', () => {
  const raw = fileSystem ?? ''

  it.each(['zlib', 'zstd'] as const)(
    'goes raw, compressed with %s, raw, and compares equal by both tools',
    async type => {
      const [image, back] = [join(folder, `fs-${type}.qcow2`), join(folder, `fs-${type}.raw`)]
      await convert(raw, image, { from: 'raw', to: 'qcow2', compress: { type }, create: { compressionType: type } })
      await convert(image, back, { to: 'raw' })
      assertSameBytes(readFileSync(raw), readFileSync(back), 'raw again')
      expect(await compare(raw, image, { formatA: 'raw' })).toMatchObject({ identical: true })
      expect(statSync(image).size).toBeLessThan(statSync(raw).blocks * 512)
      const args = ['compare', '-f', 'raw', '-F', 'qcow2', raw, image]
      const theirs = qemuImgIfAny(args)
      expect(qcow2(...args)).toEqual(theirs ?? { code: 0, stdout: 'Images are identical.\n', stderr: '' })
      if (theirs !== undefined) ok(qemuImg('check', '-q', '-f', 'qcow2', image))
    },
  )
})

function qemuImgIfAny(args: readonly string[]): ReturnType<typeof qemuImg> | undefined {
  return images.length > 0 ? qemuImg(...args) : undefined
}
