/** Compaction through the npm API and the command line: less space, the same disk, and both tools find nothing wrong. */

import { execFileSync } from 'node:child_process'
import { copyFileSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { compact, create, type NewImageOptions, open, Qcow2Error, type Qcow2Shape } from 'qcow2'
import { expect, it } from 'vitest'
import { failure, temporaryFolder } from '../api/fixtures.js'
import { describeWithQemu, ok, qcow2, qemuImg, qemuIo } from '../interop/qemu.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20
const space = (path: string): number => statSync(path).blocks * 512

/** Bytes that no two clusters share, and that do not compress away. */
function noise(length: number, seed: number): Buffer {
  const bytes = Buffer.alloc(length)
  let state = seed * 2654435761 + 1
  for (let i = 0; i + 4 <= length; i += 4) {
    state = (Math.imul(state, 1664525) + 1013904223) | 0
    bytes.writeInt32LE(state, i)
  }
  return bytes
}

async function disk(path: string, snapshot?: string): Promise<Buffer> {
  const image = await open(path, { references: 'allow', snapshot })
  const bytes = Buffer.alloc(image.virtualSize)
  await image.read(bytes, { position: 0 })
  await image.close()
  return bytes
}

/** A used disk: written, snapshotted, discarded in stripes, with zeroes stored as data, and compressed clusters. */
async function used(path: string, shape: NewImageOptions & Qcow2Shape): Promise<void> {
  await (await create(path, { ...shape, size: 16 * MIB })).close()
  const image = await open(path, { flags: 'r+', discard: 'unmap', references: 'allow' })
  await image.write(noise(6 * MIB, 1), { position: 0 })
  const external = shape.dataFile !== undefined
  if (!external && shape.refcountBits !== 1) await image.snapshots.create('first')
  await image.write(noise(4 * MIB, 2), { position: 4 * MIB })
  await image.write(Buffer.alloc(MIB), { position: 9 * MIB })
  if (!external && shape.refcountBits === undefined) {
    await image.write(Buffer.concat([noise(MIB, 3), Buffer.alloc(MIB, 7)]), { position: 12 * MIB, compressed: true })
  }
  for (let n = 0; n < 8; n++) await image.discard(n * MIB, MIB / 2)
  await image.close()
}

describeWithQemu('compact', () => {
  const shapes: readonly (NewImageOptions & Qcow2Shape)[] = [
    {},
    { clusterSize: 512 },
    { clusterSize: 4096, refcountBits: 1 },
    { clusterSize: 2 * MIB },
    { version: 2 },
    { extendedL2: true, compressionType: 'zstd' },
    { refcountBits: 64, clusterSize: 16384 },
    { dataFile: at('used.raw') },
  ].map(shape => ({ size: 0, ...shape }) as NewImageOptions & Qcow2Shape)

  for (const [number, shape] of shapes.entries()) {
    for (const mode of ['in-place', 'rewrite'] as const) {
      it(`${mode}: an image of ${JSON.stringify(shape)}`, async () => {
        const path = at(`used-${number}-${mode}.qcow2`)
        await used(path, { ...shape, overwrite: true })
        const snapshots = shape.dataFile === undefined && shape.refcountBits !== 1
        const contents = async () => [await disk(path), ...(snapshots ? [await disk(path, 'first')] : [])]
        const before = await contents()
        const info = ok(qemuImg('snapshot', '-l', path))
        const bytes = readFileSync(path)
        const told = await compact(path, { mode, zeroes: true, dryRun: true, references: 'allow' })
        expect(readFileSync(path).equals(bytes)).toBe(true)
        const seen: number[] = []
        const result = await compact(path, {
          mode,
          zeroes: true,
          references: 'allow',
          onProgress: ({ phase, current, total }) => {
            expect(phase).toBe('compact')
            expect(current).toBeLessThanOrEqual(total)
            seen.push(current)
          },
        })
        expect(seen.at(-1)).toBeGreaterThan(0)
        expect([...seen].sort((a, b) => a - b)).toEqual(seen)
        ok(qemuImg('check', path))
        const after = await contents()
        expect(after.map((bytes, n) => bytes.equals(before[n] as Buffer))).toEqual(before.map(() => true))
        expect(ok(qemuImg('snapshot', '-l', path))).toBe(info)
        expect(result.fileLengthAfter).toBe(statSync(path).size)
        if (mode === 'rewrite' && shape.dataFile === undefined) {
          expect(result.movedClusters).toBeGreaterThan(0)
          expect(result.fileLengthAfter).toBeLessThan(result.fileLengthBefore - MIB)
          expect(result.fileLengthAfter).toBeLessThan(told.fileLengthAfter * 1.05 + 4 * (shape.clusterSize ?? 65536))
        }
        expect(result.zeroClusters).toBe(told.zeroClusters)
        expect(result.zeroClusters).toBeGreaterThan(0)
        expect(result.reclaimedBytes).toBe(result.actualSizeBefore - result.actualSizeAfter)
        expect(result.reclaimedBytes).toBeGreaterThan(MIB / 2)
        expect(Math.abs(told.reclaimedBytes - result.reclaimedBytes)).toBeLessThan(MIB)
        if (snapshots) {
          ok(qemuImg('snapshot', '-a', 'first', path))
          ok(qemuImg('check', path))
          expect((await disk(path)).equals(before[1] as Buffer)).toBe(true)
        }
        ok(qemuIo('-c', 'write -P 9 1M 3M', path))
        ok(qemuImg('check', path))
      })
    }
  }

  it('works on an open image while it is read', async () => {
    const path = at('live.qcow2')
    await used(path, { size: 0 })
    const before = await disk(path)
    const image = await open(path, { flags: 'r+' })
    let done = false
    const compacted = image.compact({ zeroes: true, mode: 'rewrite' }).finally(() => {
      done = true
    })
    const buffer = Buffer.alloc(MIB)
    for (let n = 0; !done || n < 32; n++) {
      const position = (n % 16) * MIB
      await image.read(buffer, { position })
      expect(buffer.equals(before.subarray(position, position + MIB))).toBe(true)
    }
    await compacted
    await image.write(noise(2 * MIB, 9), { position: 3 * MIB })
    noise(2 * MIB, 9).copy(before, 3 * MIB)
    await image.close()
    ok(qemuImg('check', path))
    expect((await disk(path)).equals(before)).toBe(true)
  })

  it.skipIf(process.platform !== 'linux')('gives back space that was taken ahead and never used', async () => {
    // Holes that take space: a file system tells of them as of holes that do not.
    const fill = (path: string, more = 0): void => {
      execFileSync('fallocate', ['--length', String(statSync(path).size + more), path])
    }
    for (const dataFile of [undefined, at('ahead.raw')]) {
      const path = at('ahead.qcow2')
      await (await create(path, { size: 16 * MIB, dataFile, overwrite: true })).close()
      const image = await open(path, { flags: 'r+', discard: 'unmap', references: 'allow' })
      await image.write(noise(8 * MIB, 5), { position: 0 })
      await image.discard(MIB, 6 * MIB)
      await image.close()
      const before = await disk(path)
      fill(path, 2 * MIB)
      if (dataFile !== undefined) fill(dataFile)
      const length = statSync(path).size
      const told = await compact(path, { dryRun: true, references: 'allow' })
      const result = await compact(path, { references: 'allow' })
      expect(result.fileLengthBefore).toBe(length)
      expect(result.reclaimedBytes).toBeGreaterThan(7.5 * MIB)
      // The promise is kept: what is not known to be free is not promised.
      expect(told.reclaimedBytes).toBeLessThan(result.reclaimedBytes + MIB / 8)
      expect(told.reclaimedBytes).toBeGreaterThan(result.reclaimedBytes - MIB / 8)
      expect(space(path) + (dataFile === undefined ? 0 : space(dataFile))).toBeLessThan(3 * MIB)
      ok(qemuImg('check', path))
      expect((await disk(path)).equals(before)).toBe(true)
    }
    const path = at('falloc.qcow2')
    await (await create(path, { size: 16 * MIB, preallocation: 'falloc' })).close()
    const told = await compact(path, { dryRun: true, zeroes: true })
    const result = await compact(path, { zeroes: true })
    expect(result.reclaimedBytes).toBeGreaterThan(15 * MIB)
    expect(told.reclaimedBytes).toBeGreaterThan(result.reclaimedBytes - MIB / 8)
    expect((await compact(path, { dryRun: true, zeroes: true })).reclaimedBytes).toBe(0)
  })

  it('frees what a crash leaked', async () => {
    const path = at('leaked.qcow2')
    await (await create(path, { size: 16 * MIB })).close()
    const image = await open(path, { flags: 'r+' })
    await image.write(noise(MIB, 4), { position: 0 })
    await image.datasync()
    const crashed = readFileSync(path)
    await image.close()
    writeFileSync(path, crashed)
    expect(qemuImg('check', path).code).toBe(3)
    const { leakedClusters, fileLengthAfter } = await compact(path)
    expect(leakedClusters).toBeGreaterThan(0)
    expect(fileLengthAfter).toBeLessThan(2 * MIB)
    ok(qemuImg('check', path))
  })

  it('stops when it is told to, and leaves a sound image', async () => {
    const path = at('aborted.qcow2')
    await used(path, { size: 0, clusterSize: 512 })
    const before = await disk(path)
    for (const mode of ['in-place', 'rewrite'] as const) {
      const abort = new AbortController()
      const options = { mode, zeroes: true, signal: abort.signal, progressInterval: 1, onProgress: () => abort.abort() }
      const stopped = await compact(path, options).then(
        () => 'done',
        (error: Error) => error.name,
      )
      expect(['AbortError', 'done']).toContain(stopped)
      ok(qemuImg('check', path))
      expect((await disk(path)).equals(before)).toBe(true)
    }
    const abort = AbortSignal.abort()
    expect((await failure(() => compact(path, { signal: abort }))).name).toBe('AbortError')
  })

  it('refuses with a code, and changes nothing', async () => {
    const path = at('refused.qcow2')
    await used(path, { size: 0 })
    const reader = await open(path)
    expect(await failure(() => reader.compact())).toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
    expect((await reader.compact({ dryRun: true })).leakedClusters).toBe(0)
    expect(await failure(() => reader.compact({ mode: 'fast' as never }))).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
    })
    expect(await failure(() => compact(path))).toMatchObject({ code: 'ERR_QCOW2_LOCKED' })
    await reader.close()
    expect(await failure(() => reader.compact())).toMatchObject({ code: 'ERR_QCOW2_CLOSED' })
    const raw = await open(path, { format: 'raw', flags: 'r+' })
    expect(await failure(() => raw.compact())).toMatchObject({ code: 'ERR_QCOW2_UNSUPPORTED_FEATURE' })
    await raw.close()
    // A refcount of 0 for a cluster in use.
    const damaged = at('damaged.qcow2')
    copyFileSync(path, damaged)
    const bytes = readFileSync(damaged)
    const block = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(48))))
    bytes.writeUInt16BE(0, block + 2 * 3)
    writeFileSync(damaged, bytes)
    const error = await failure(() => compact(damaged))
    expect(error).toBeInstanceOf(Qcow2Error)
    expect(error).toMatchObject({ code: 'ERR_QCOW2_CORRUPT', path: damaged })
    expect(readFileSync(damaged).equals(bytes)).toBe(true)
    expect(qcow2('compact', damaged)).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('repair it before it is compacted'),
    })
  })

  it('has a command line', async () => {
    const path = at('cli.qcow2')
    await used(path, { size: 0 })
    const before = space(path)
    const told = JSON.parse(ok(qcow2('compact', '--dry-run', '--zeroes', '--output=json', path)))
    expect(told['reclaimed-bytes']).toBeGreaterThan(MIB / 2)
    expect(space(path)).toBe(before)
    expect(ok(qcow2('compact', '-n', path))).toMatch(/^would reclaim: .*\ndisk size: .* -> .*\nfile length: /)
    expect(ok(qcow2('compact', '-q', path))).toBe('')
    const said = ok(qcow2('compact', '--zeroes', '-p', path))
    expect(said).toMatch(/\(100.00\/100%\)\r\nreclaimed: [\s\S]*\nclusters: \d+ of zeroes\n$/)
    expect(before - space(path)).toBeGreaterThan(MIB / 2)
    expect(ok(qcow2('compact', '--rewrite', path))).toMatch(/\nfile length: .* -> .*\nclusters: \d+ moved\n$/)
    ok(qemuImg('check', path))
    for (const [args, message] of [
      [['-f', 'raw', path], 'This image format does not support compaction'],
      [[at('none.qcow2')], 'No such file or directory'],
      [['--fast', path], "unrecognized option '--fast'"],
    ] as const) {
      expect(qcow2('compact', ...args)).toMatchObject({ code: 1, stderr: expect.stringContaining(message) })
    }
  })
})
