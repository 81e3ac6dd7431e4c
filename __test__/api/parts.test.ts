/** convert: into targets that exist, from several sources, parts of a disk, at a rate. */

import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type ConvertOptions, check, convert, create, open } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { temporaryFolder } from '../interop/qemu.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const KIB = 1024

let count = 0
async function image(
  size: number,
  fill: readonly [byte: number, position: number, length: number][],
  backing?: string,
) {
  count += 1
  const path = at(`image${count}`)
  const below = backing === undefined ? {} : { backingFile: backing, backingFormat: 'qcow2' as const }
  const made = await create(path, { size, ...below, references: 'allow' })
  for (const [byte, position, length] of fill) await made.write(Buffer.alloc(length, byte), { position })
  await made.close()
  return path
}

const contents = async (path: string): Promise<Buffer> => {
  const opened = await open(path, { references: 'allow' })
  const bytes = Buffer.alloc(opened.virtualSize)
  await opened.read(bytes, { position: 0 })
  await opened.close()
  return bytes
}

describe('a target with a backing file that the source does not have', () => {
  it.each([
    { clusterSize: 65536 },
    { clusterSize: 512 },
    { clusterSize: 65536, extendedL2: true },
    { clusterSize: 4096, version: 2 as const },
  ])('reads as the source all the same: %j', async shape => {
    const below = await image(1024 * KIB, [[1, 0, 1024 * KIB]])
    const source = await image(
      1024 * KIB,
      [
        [2, 100 * KIB, 200 * KIB],
        [0, 400 * KIB, 100 * KIB],
      ],
      below,
    )
    const raw = at(`raw${count}`)
    writeFileSync(raw, await contents(source))
    // One smaller and one larger than the source.
    for (const size of [700 * KIB, 2048 * KIB]) {
      const base = await image(size, [[7, 0, size]])
      for (const compress of [false, true]) {
        for (const [from, file] of [
          ['qcow2', source],
          ['qcow2', await image(1024 * KIB, [[3, 200 * KIB, 1]])],
          ['raw', raw],
        ] as const) {
          const target = at(`onto${++count}`)
          const onto = { backingFile: base, backingFormat: 'qcow2', ...shape } as const
          await convert(file, target, { from, to: 'qcow2', compress, base, create: onto, references: 'allow' })
          const want = from === 'raw' ? readFileSync(file) : await contents(file)
          expect((await contents(target)).equals(want), `${from}, ${size}, ${compress}`).toBe(true)
          expect(await check(target)).toMatchObject({ ok: true, leaks: 0 })
        }
      }
    }
  })
})

describe('an existing qcow2 target', () => {
  it('gets the source, and keeps what it has behind its end', async () => {
    const source = await image(1024 * KIB, [
      [1, 0, 300 * KIB],
      [2, 700 * KIB, KIB],
    ])
    const base = await image(2048 * KIB, [[8, 0, 2048 * KIB]])
    for (const compress of [false, true]) {
      const target = await image(2048 * KIB, [[9, 200 * KIB, 1800 * KIB]], base)
      const want = await contents(target)
      const bytes = await contents(source)
      bytes.copy(want)
      await convert(source, target, { to: 'qcow2', existingTarget: true, compress, references: 'allow' })
      expect((await contents(target)).equals(want)).toBe(true)
    }
  })

  it('is refused when it is too small, in use or a source, and not changed', async () => {
    const base = await image(1024 * KIB, [[1, 0, 300 * KIB]])
    const source = await image(1024 * KIB, [[2, 0, KIB]], base)
    const small = await image(512 * KIB, [[3, 0, KIB]])
    const files = [base, source, small]
    const before = files.map(file => readFileSync(file))
    const refused = async (target: string, options: Partial<ConvertOptions>, expected: object) => {
      const all = { to: 'qcow2', existingTarget: true, references: 'allow', ...options } as const
      await expect(convert(source, target, all)).rejects.toMatchObject(expected)
      for (const [index, file] of files.entries()) expect(before[index]?.equals(readFileSync(file))).toBe(true)
    }
    const invalid = (field: string) => ({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field })
    await refused(small, {}, invalid('target'))
    await refused(source, {}, invalid('target'))
    await refused(base, {}, invalid('target'))
    await refused(at('nowhere'), {}, { code: 'ENOENT' })
    await refused(small, { create: {} }, invalid('existingTarget'))
    await refused(small, { compress: { level: 3 } }, invalid('compress'))
    const busy = await open(small)
    await refused(small, {}, { code: 'ERR_QCOW2_LOCKED' })
    await busy.close()
    await refused(small, { signal: AbortSignal.abort() }, { name: 'AbortError' })
  })
})

describe('several sources and parts', () => {
  it('of every format become one disk of whole sectors', async () => {
    const a = await image(64 * KIB, [[1, 0, KIB]])
    const raw = at('odd.raw')
    writeFileSync(raw, Buffer.alloc(1000, 7))
    const target = at('together')
    const { virtualSize } = await convert([a, raw, a], target, { from: ['qcow2', 'raw', 'qcow2'], to: 'raw' })
    expect(virtualSize).toBe(129 * KIB)
    const bytes = await contents(a)
    const want = Buffer.concat([bytes, Buffer.alloc(1000, 7), Buffer.alloc(24), bytes])
    expect(readFileSync(target).equals(want)).toBe(true)
  })

  it('a part of a disk', async () => {
    const source = await image(1024 * KIB, [
      [1, 0, 100 * KIB],
      [2, 500 * KIB, 300 * KIB],
    ])
    const bytes = await contents(source)
    for (const [start, length] of [
      [0, 10],
      [99 * KIB, 450 * KIB],
      [1000, 5000],
      [1023 * KIB, KIB],
    ] as const) {
      const target = at('part')
      await convert(source, target, { to: 'raw', start, length, overwrite: true })
      const got = readFileSync(target)
      expect(got.length).toBe(Math.ceil(length / 512) * 512)
      expect(got.subarray(0, length).equals(bytes.subarray(start, start + length))).toBe(true)
      expect(got.subarray(length).every(byte => byte === 0)).toBe(true)
    }
    await convert(source, at('rest'), { to: 'raw', start: 512n })
    expect(readFileSync(at('rest')).equals(bytes.subarray(512))).toBe(true)
  })

  it('refused', async () => {
    const source = await image(64 * KIB, [])
    const refused = (sources: string | string[], options: Partial<ConvertOptions>, field: string) =>
      expect(convert(sources, at('new'), { to: 'qcow2', ...options })).rejects.toMatchObject({
        code: 'ERR_QCOW2_INVALID_ARGUMENT',
        field,
      })
    await refused([], {}, 'source')
    await refused([source, source], { from: ['qcow2'] }, 'from')
    await refused([source, source], { snapshot: 'one' }, 'snapshot')
    await refused([source, source], { bitmaps: true }, 'bitmaps')
    await refused(source, { bitmaps: true, start: 0 }, 'bitmaps')
    await refused(source, { base: source, create: { backingFile: source, backingFormat: 'qcow2' }, length: 1 }, 'base')
    await refused(source, { start: 65 * KIB }, 'length')
    await refused(source, { start: 1, length: 64 * KIB }, 'length')
  })
})

it('a rate holds a conversion back, and it can still be cancelled', async () => {
  const source = await image(4096 * KIB, [[1, 0, 4096 * KIB]])
  const begin = performance.now()
  await convert(source, at('slow'), { to: 'raw', rate: 16 * 1024 * KIB, concurrency: 1 })
  expect(performance.now() - begin).toBeGreaterThan(150)
  const signal = AbortSignal.timeout(50)
  await expect(convert(source, at('slower'), { to: 'raw', rate: 1, signal })).rejects.toMatchObject({
    name: 'AbortError',
  })
})

it('a conversion into an existing image can be cancelled while its chunks wait for each other', async () => {
  const source = await image(16 * 1024 * KIB, [[1, 0, 16 * 1024 * KIB]])
  const target = await image(16 * 1024 * KIB, [])
  const options = { to: 'qcow2', existingTarget: true, concurrency: 4, rate: 1024 * KIB } as const
  const signal = AbortSignal.timeout(200)
  await expect(convert(source, target, { ...options, signal })).rejects.toMatchObject({ name: 'AbortError' })
  await convert(source, target, { ...options, rate: 0 })
  expect((await contents(target)).equals(await contents(source))).toBe(true)
  expect(await check(target)).toMatchObject({ ok: true })
})

it('salvage tells that nothing was lost of a sound disk', async () => {
  const source = await image(64 * KIB, [[1, 0, KIB]])
  const result = await convert(source, at('saved'), { to: 'raw', salvage: true })
  expect(result.unreadable).toEqual([])
  expect(readFileSync(at('saved')).equals(await contents(source))).toBe(true)
})
