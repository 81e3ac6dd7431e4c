/** Bitmaps that a convert copies: the same as qemu-img copies, and what is refused. */

import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { convert, create, type DirtyRange, open } from 'qcow2'
import { expect, it } from 'vitest'
import { failure, temporaryFolder } from '../api/fixtures.js'
import { describeWithQemu, ok, qcow2, qemuImg } from '../interop/qemu.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20

/** A disk of 32 MiB with an enabled, a disabled and an empty bitmap of different granularities. */
async function source(name: string): Promise<string> {
  const path = at(name)
  await (await create(path, { size: 32 * MIB, overwrite: true })).close()
  ok(qemuImg('bitmap', '--add', '-g', '32k', path, 'enabled'))
  ok(qemuImg('bitmap', '--add', path, 'disabled'))
  ok(qemuImg('bitmap', '--add', '--disable', '-g', '1M', path, 'empty'))
  const image = await open(path, { flags: 'r+' })
  await image.write(Buffer.alloc(100_000, 1), { position: 5 * MIB })
  await image.bitmaps.disable('disabled')
  await image.write(Buffer.alloc(100, 2), { position: 20 * MIB })
  await image.close()
  return path
}

/** As a crash leaves it: the bitmaps that record are marked in use. */
async function broken(name: string): Promise<string> {
  const path = await source(name)
  const image = await open(path, { flags: 'r+' })
  await image.write(Buffer.alloc(512, 3), { position: 0 })
  await image.datasync()
  const bytes = readFileSync(path)
  await image.close()
  writeFileSync(path, bytes)
  return path
}

async function dirty(path: string): Promise<Record<string, DirtyRange[]>> {
  const image = await open(path)
  const found: Record<string, DirtyRange[]> = {}
  for (const { name } of await image.bitmaps.list()) {
    const ranges: DirtyRange[] = []
    for await (const range of image.bitmaps.extents(name)) ranges.push(range)
    found[name] = ranges
  }
  await image.close()
  return found
}

const bitmapsOf = (path: string): unknown =>
  JSON.parse(ok(qemuImg('info', '--output=json', path)))['format-specific'].data.bitmaps

describeWithQemu('convert with bitmaps', () => {
  it('copies them as qemu-img does', async () => {
    const from = await source('from.qcow2')
    const expected = {
      enabled: [
        { start: 5 * MIB, length: 131072 },
        { start: 20 * MIB, length: 32768 },
      ],
      disabled: [{ start: 5 * MIB, length: 131072 }],
      empty: [],
    }
    expect(await dirty(from)).toEqual(expected)
    const [ours, theirs, api] = [at('ours.qcow2'), at('theirs.qcow2'), at('api.qcow2')]
    ok(qcow2('convert', '-O', 'qcow2', '--bitmaps', '-c', '-o', 'cluster_size=4k', from, ours))
    ok(qemuImg('convert', '-O', 'qcow2', '--bitmaps', '-c', '-o', 'cluster_size=4k', from, theirs))
    const result = await convert(from, api, { to: 'qcow2', bitmaps: true, create: { extendedL2: true } })
    expect(result.skippedBitmaps).toEqual([])
    for (const path of [ours, theirs, api]) {
      ok(qemuImg('check', path))
      ok(qemuImg('compare', from, path))
      expect(await dirty(path)).toEqual(expected)
      expect(bitmapsOf(path)).toEqual(bitmapsOf(from))
    }
    // They live on: QEMU changes what we copied.
    ok(qemuImg('bitmap', '--merge', 'enabled', '--enable', ours, 'empty'))
    expect((await dirty(ours))['empty']).toEqual([
      { start: 5 * MIB, length: MIB },
      { start: 20 * MIB, length: MIB },
    ])
  })

  it('copies into an image with an external data file', async () => {
    const from = await source('to-external.qcow2')
    const to = at('external.qcow2')
    await convert(from, to, { to: 'qcow2', bitmaps: true, create: { dataFile: at('external.raw') } })
    ok(qemuImg('check', to))
    ok(qemuImg('compare', from, to))
    expect(bitmapsOf(to)).toEqual(bitmapsOf(from))
  })

  it('copies into an image that exists', async () => {
    const from = await source('onto.qcow2')
    const [ours, theirs, smaller] = [at('existing.qcow2'), at('existing-theirs.qcow2'), at('larger.qcow2')]
    for (const [path, size] of [
      [ours, '32M'],
      [theirs, '32M'],
      [smaller, '40M'],
    ] as const) {
      ok(qemuImg('create', '-q', '-f', 'qcow2', path, size))
    }
    ok(qcow2('convert', '-n', '-O', 'qcow2', '--bitmaps', from, ours))
    ok(qemuImg('convert', '-n', '-O', 'qcow2', '--bitmaps', from, theirs))
    ok(qemuImg('check', ours))
    ok(qemuImg('compare', from, ours))
    expect(bitmapsOf(ours)).toEqual(bitmapsOf(theirs))
    expect(await dirty(ours)).toEqual(await dirty(from))
    for (const path of [ours, smaller]) {
      // The names are taken; the disk has another size.
      const again = convert(from, path, { to: 'qcow2', existingTarget: true, bitmaps: true })
      expect(await failure(() => again)).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
      ok(qemuImg('check', path))
    }
  })

  it('refuses inconsistent bitmaps, or leaves them out when asked', async () => {
    const from = await broken('broken.qcow2')
    const to = at('none.qcow2')
    expect(await failure(() => convert(from, to, { to: 'qcow2', bitmaps: true }))).toMatchObject({
      code: 'ERR_QCOW2_CORRUPT',
    })
    for (const tool of [qcow2, qemuImg]) {
      const { code, stderr } = tool('convert', '-O', 'qcow2', '--bitmaps', from, to)
      expect(code).toBe(1)
      expect(stderr).toContain("Cannot copy inconsistent bitmap 'enabled'")
      expect(stderr).toContain('Try --skip-broken-bitmaps, or use ')
    }
    expect(() => readFileSync(to)).toThrow('ENOENT')
    const [ours, theirs] = [at('skipped.qcow2'), at('skipped-theirs.qcow2')]
    const said = qcow2('convert', '-O', 'qcow2', '--bitmaps', '--skip-broken-bitmaps', from, ours)
    expect(said.stderr).toContain("warning: Skipping inconsistent bitmap 'enabled'")
    ok(said)
    ok(qemuImg('convert', '-O', 'qcow2', '--bitmaps', '--skip-broken-bitmaps', from, theirs))
    expect(bitmapsOf(ours)).toEqual(bitmapsOf(theirs))
    const skipped = await convert(from, at('skip.qcow2'), { to: 'qcow2', bitmaps: { skipBroken: true } })
    expect(skipped.skippedBitmaps).toEqual(['enabled'])
  })

  it.each([
    [['-O', 'raw', '--bitmaps'], "Format driver 'raw' does not support bitmaps"],
    [['-f', 'raw', '-O', 'qcow2', '--bitmaps'], 'Source lacks bitmap support'],
    [['-O', 'qcow2', '--skip-broken-bitmaps'], 'Use of --skip-broken-bitmaps requires --bitmaps'],
    [['-O', 'qcow2', '-o', 'compat=0.10', '--bitmaps'], "Format driver 'qcow2' does not support bitmaps"],
  ])('refuses %j', async (args, message) => {
    const from = await source('refused.qcow2')
    for (const tool of [qcow2, qemuImg]) {
      const { code, stderr } = tool('convert', ...args, from, at('refused-target'))
      expect(code).toBe(1)
      expect(stderr).toContain(message)
    }
  })

  it('refuses contradictions with a code', async () => {
    const from = await source('codes.qcow2')
    for (const options of [
      { to: 'raw', bitmaps: true },
      { to: 'qcow2', from: 'raw', bitmaps: true },
      { to: 'qcow2', create: { version: 2 }, bitmaps: true },
      { to: 'qcow2', bitmaps: 1 as never },
      { to: 'qcow2', bitmaps: { skip: true } as never },
    ] as const) {
      expect(await failure(() => convert(from, at('no.qcow2'), options))).toMatchObject({
        code: 'ERR_QCOW2_INVALID_ARGUMENT',
      })
    }
  })
})
