/** Lazy refcounts, and what a write of zeroes becomes on a raw disk. */

import { copyFileSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, create, inspect, open } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { failure, pattern, temporaryFolder, writeRaw } from '../api/fixtures.js'
import { describeWithQemu, ok, qemuImg } from '../interop/qemu.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20
const INCOMPATIBLE = 72

const isDirty = (path: string): boolean => (readFileSync(path).readBigUInt64BE(INCOMPATIBLE) & 1n) === 1n

/** An image written to with lazy refcounts, and a copy of the file from before it was closed, as a crash leaves it. */
async function crashed(name: string): Promise<{ closed: string; crash: string }> {
  const closed = at(`${name}.qcow2`)
  const crash = at(`${name}-crash.qcow2`)
  await (await create(closed, { size: 8 * MIB })).close()
  await using image = await open(closed, { flags: 'r+', lazyRefcounts: true })
  expect(isDirty(closed)).toBe(false)
  await image.write(pattern(0, 4 * MIB), { position: MIB })
  await image.datasync()
  expect(isDirty(closed)).toBe(true)
  copyFileSync(closed, crash)
  return { closed, crash }
}

describe('lazyRefcounts', () => {
  it('marks the image dirty until it is closed', async () => {
    const { closed } = await crashed('closed')
    expect(isDirty(closed)).toBe(false)
    expect(await check(closed)).toMatchObject({ ok: true, leaks: 0 })
  })

  it('leaves an image that the next opening for writing repairs', async () => {
    const { crash } = await crashed('repaired')
    const { findings } = await inspect(crash)
    expect(findings.map(({ code }) => code)).toContain('DIRTY_BIT')
    await using image = await open(crash, { flags: 'r+' })
    const { buffer } = await image.read(Buffer.alloc(4 * MIB), { position: MIB })
    expect(buffer.equals(pattern(0, 4 * MIB))).toBe(true)
    await image.write(Buffer.alloc(MIB, 1), { position: 6 * MIB })
    await image.close()
    expect(isDirty(crash)).toBe(false)
    expect(await check(crash)).toMatchObject({ ok: true, leaks: 0 })
  })

  it('is refused where there are no refcounts to postpone, and changes nothing', async () => {
    const old = at('old.qcow2')
    await (await create(old, { size: MIB, version: 2 })).close()
    const before = readFileSync(old)
    const error = await failure(() => open(old, { flags: 'r+', lazyRefcounts: true }))
    expect([error.code, error.field]).toEqual(['ERR_QCOW2_INVALID_ARGUMENT', 'lazyRefcounts'])
    expect(readFileSync(old).equals(before)).toBe(true)
    const raw = writeRaw(at('lazy.raw'), MIB, [])
    const onRaw = await failure(() => open(raw, { format: 'raw', flags: 'r+', lazyRefcounts: true }))
    expect([onRaw.code, onRaw.field]).toEqual(['ERR_QCOW2_INVALID_ARGUMENT', 'lazyRefcounts'])
    const reading = await failure(() => open(old, { lazyRefcounts: false }))
    expect([reading.code, reading.message]).toEqual(['ERR_QCOW2_INVALID_ARGUMENT', expect.stringContaining("'r+'")])
  })
})

describeWithQemu('lazyRefcounts', () => {
  it('leaves an image that QEMU repairs', async () => {
    const { crash } = await crashed('qemu')
    expect(ok(qemuImg('info', crash))).toContain('cleanly shut down: no')
    ok(qemuImg('check', '-r', 'all', crash))
    ok(qemuImg('check', crash))
    ok(qemuImg('convert', '-O', 'raw', crash, at('qemu.raw')))
    const raw = readFileSync(at('qemu.raw'))
    expect(raw.subarray(MIB, 5 * MIB).equals(pattern(0, 4 * MIB))).toBe(true)
  })
})

describe('detectZeroes on a raw image', () => {
  it.each([
    ['off', 0],
    ['on', 0],
    ['unmap', 4 * MIB],
  ] as const)('%s', async (detectZeroes, freed) => {
    const path = at(`zeroes-${detectZeroes}.raw`)
    writeFileSync(path, Buffer.alloc(8 * MIB, 1), { flush: true })
    const full = statSync(path).blocks * 512
    await using image = await open(path, { format: 'raw', flags: 'r+', detectZeroes })
    await image.write(Buffer.alloc(4 * MIB), { position: MIB })
    await image.write(Buffer.from([0, 0, 2]), { position: 7 * MIB })
    await image.datasync()
    expect(full - statSync(path).blocks * 512).toBe(freed)
    const bytes = readFileSync(path)
    expect(bytes.subarray(MIB, 5 * MIB).equals(Buffer.alloc(4 * MIB))).toBe(true)
    expect([bytes[MIB - 1], bytes[5 * MIB], ...bytes.subarray(7 * MIB, 7 * MIB + 4)]).toEqual([1, 1, 0, 0, 2, 1])
    expect(bytes.length).toBe(8 * MIB)
  })
})
