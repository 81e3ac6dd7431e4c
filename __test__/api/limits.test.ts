/** Bounds on what an image may claim. */

import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, compare, convert, create, inspect, type Limits, measure, open } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { failure, temporaryFolder } from './fixtures.js'

const folder = temporaryFolder()
const path = join(folder, 'disk.qcow2')

beforeAll(async () => {
  // An L1 table of 2048 entries, 16 KiB.
  await (await create(path, { size: 2 ** 40 })).close()
})

/** All that there is to iterate over. */
async function all<T>(iterable: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = []
  for await (const each of iterable) found.push(each)
  return found
}

const tight: [string, Limits, RegExp][] = [
  ['the virtual size', { maxVirtualSize: 2 ** 40 - 1 }, /size of 1099511627776 exceeds the limit of 1099511627775/],
  ['the metadata', { maxMetadataBytes: 16383 }, /16384 exceeds the limit of 16383/],
]

describe.each(tight)('%s', (_, limits, message) => {
  it('is bounded for open, check and convert', async () => {
    for (const call of [
      () => open(path, { limits }),
      () => check(path, { limits }),
      () => convert(path, join(folder, 'out'), { to: 'raw', limits }),
    ]) {
      const error = await failure(call)
      expect(error).toMatchObject({ code: 'ERR_QCOW2_LIMIT', path })
      expect(error.message).toMatch(message)
    }
  })

  it('is a finding of an inspection', async () => {
    const { findings, safe } = await inspect(path, { limits })
    expect(safe).toBe(false)
    expect(findings.map(({ code }) => code)).toContain('LIMIT')
    expect(findings.map(finding => finding.message).join()).toMatch(message)
  })
})

it('what is just within the limits opens', async () => {
  const image = await open(path, { limits: { maxVirtualSize: 2n ** 40n, maxMetadataBytes: 65536 } })
  expect(image.virtualSize).toBe(2 ** 40)
  await image.close()
})

it('a check that needs more memory than allowed says so', async () => {
  expect((await failure(() => check(path, { limits: { maxMemory: 1 } }))).code).toBe('ERR_QCOW2_LIMIT')
})

describe('a disk beyond 2^53 - 1 bytes', () => {
  const huge = join(folder, 'huge.qcow2')
  const size = 2n ** 53n + 1024n
  const ask = { code: 'ERR_QCOW2_LIMIT', message: expect.stringMatching(/9007199254742016.*bigint: true/) }

  it('is read and written at places that are bigints, and described in bigints alone', async () => {
    await using image = await create(huge, { size, clusterSize: 2 ** 21 })
    expect(image.virtualSizeBigInt).toBe(size)
    expect(() => image.virtualSize).toThrow(expect.objectContaining(ask))
    const at = size - 512n
    await image.write(Buffer.alloc(512, 5), { position: at })
    await image.writev([Buffer.alloc(512, 6), Buffer.alloc(512, 7)], at - 512n)
    const { bytesRead, buffer } = await image.read(Buffer.alloc(1536), { position: at - 512n })
    expect([bytesRead, buffer[0], buffer[512], buffer[1024]]).toEqual([1024, 6, 7, 0])
    await image.writeZeroes(at, 512n)
    expect(await failure(() => image.info())).toMatchObject(ask)
    expect(await failure(() => image.chain())).toMatchObject(ask)
    expect(await image.info({ bigint: true })).toMatchObject({ virtualSize: size, clusterSize: 2 ** 21 })
    const entries = await all(image.map({ bigint: true }))
    expect(entries.at(-1)).toMatchObject({ start: 2n ** 53n, length: 1024n, data: true })
    expect(entries.at(-1)?.offset).toBeTypeOf('bigint')
    expect(entries.reduce((sum, { length }) => sum + length, 0n)).toBe(size)
    expect(await failure(() => all(image.map({ start: 2n ** 53n })))).toMatchObject({ code: 'ERR_QCOW2_LIMIT' })
    const chunks: Buffer[] = await all(image.createReadStream({ start: at - 512n, highWaterMark: 512 }))
    expect(chunks.map(chunk => [chunk.length, chunk[0]])).toEqual([
      [512, 6],
      [512, 0],
    ])
    await image.truncate(size + 512n)
    expect(image.virtualSizeBigInt).toBe(size + 512n)
    await image.truncate(size, { shrink: true })
    await image.snapshots.create('s')
    expect((await image.snapshots.list()).map(({ name }) => name)).toEqual(['s'])
  })

  it('is never counted by a rounded number', async () => {
    await using image = await open(huge, { flags: 'r+' })
    const buffer = Buffer.alloc(10)
    for (const call of [
      () => image.read(buffer, { position: 2n ** 53n + 1n }),
      () => image.read(buffer, { position: 2 ** 53 }),
      () => image.readv([buffer, buffer], 2n ** 53n),
      () => image.writev([buffer, buffer], 2n ** 53n - 15n),
      () => image.discard(0, 2n ** 53n + 1n),
      async () => image.createReadStream({ highWaterMark: 1000 }),
      () => image.write(Buffer.alloc(513), { position: size - 512n }),
    ]) {
      expect((await failure(call)).code).toBe('ERR_QCOW2_INVALID_ARGUMENT')
    }
    const stream = image.createWriteStream({ start: 2n ** 53n })
    const failed = new Promise(resolve => stream.once('error', resolve))
    stream.write(buffer)
    stream.write(buffer)
    expect(await failed).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
  })

  it('is copied, measured and compared, and refused before anything is done where its size cannot be said', async () => {
    const copy = join(folder, 'copy.qcow2')
    const to = { to: 'qcow2', create: { clusterSize: 2 ** 21 } } as const
    expect(await failure(() => convert(huge, copy, to))).toMatchObject({ code: 'ERR_QCOW2_LIMIT' })
    expect(existsSync(copy)).toBe(false)
    expect(await convert(huge, copy, { ...to, bigint: true })).toMatchObject({ virtualSize: size, bytesRead: 1024n })
    expect(await compare(huge, copy)).toMatchObject({ identical: true })
    expect(await failure(() => measure({ size }, to))).toMatchObject({ code: 'ERR_QCOW2_LIMIT' })
    const { fullyAllocated } = await measure(huge, { ...to, bigint: true })
    expect(fullyAllocated).toBeGreaterThan(size)
    await (await create(copy, { size: 2n ** 53n + 2048n, clusterSize: 2 ** 21, overwrite: true })).close()
    const other = await open(copy, { flags: 'r+' })
    await other.write(Buffer.of(1), { position: size - 512n })
    await other.close()
    // The ten bytes before are zero in both.
    expect(await compare(huge, copy, { bigint: true })).toMatchObject({ firstDifference: 2n ** 53n + 10n })
  })

  it('is a finding where sizes are numbers', async () => {
    const found = await inspect(huge)
    expect(found).toMatchObject({ virtualSize: 0, safe: false })
    expect(found.findings.map(({ code }) => code)).toContain('LIMIT')
    expect(await inspect(huge, { bigint: true })).toMatchObject({ virtualSize: size })
  })

  it('must be whole sectors', async () => {
    const odd = readFileSync(huge)
    odd.writeBigUInt64BE(size + 1n, 24)
    const path = join(folder, 'odd.qcow2')
    writeFileSync(path, odd)
    expect(await failure(() => open(path))).toMatchObject({ code: 'ERR_QCOW2_LIMIT', path, field: 'size' })
    expect(await inspect(path, { bigint: true })).toMatchObject({ virtualSize: size + 1n })
  })
})
