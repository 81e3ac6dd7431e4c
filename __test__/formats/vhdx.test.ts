/** VHDX images: what QEMU makes is read, written to and checked here, what is made here is QEMU's to read. */

import { closeSync, copyFileSync, openSync, readFileSync, statSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { check, convert, create, inspect, measure, open, probe } from '../../dist/index.js'
import { failure, pattern, temporaryFolder } from '../api/fixtures.js'
import { asQemuImg, bothTools, describeWithQemu } from '../cli/run.js'
import { ok, qemuImg } from '../interop/qemu.js'

const MIB = 1 << 20
const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const { inTurn, ours, theirs } = bothTools(folder)

/** Data, zeroes, data at the end, which is no whole block. */
const disk = Buffer.concat([pattern(0, MIB), Buffer.alloc(20 * MIB), pattern(9, MIB + 512)])

beforeAll(() => writeFileSync(at('disk.raw'), disk))

/** The disk as qemu-img reads it, which finds nothing wrong with the image. */
function byQemu(name: string): Buffer {
  ok(qemuImg('check', '-q', '-f', 'vhdx', at(name)))
  ok(qemuImg('convert', '-f', 'vhdx', '-O', 'raw', at(name), at('theirs.raw')))
  return readFileSync(at('theirs.raw'))
}

async function read(source: string, options: object = {}): Promise<Buffer> {
  await using image = await open(source, options)
  const bytes = Buffer.alloc(image.virtualSize)
  await image.read(bytes, { position: 0 })
  return bytes
}

describeWithQemu('vhdx beside qemu-img', () => {
  it.each([
    'create -f vhdx NAME 10M',
    'create -f vhdx -o subformat=fixed,block_size=1M NAME 3145728',
    'create -f vhdx -o block_size=3500k,log_size=1500k,block_state_zero=off NAME 2G',
    'create -f vhdx -o help',
    'create -f vhdx -o subformat=sparse NAME 1M',
  ])('%s says the same', async line => {
    const [a, b] = await inTurn(line.replace('NAME', 'made.vhdx'))
    if (line.includes('sparse')) {
      expect([a.code, b.code]).toEqual([1, 1])
      return
    }
    expect({ code: a.code, stdout: a.stdout }).toEqual({ code: b.code, stdout: b.stdout })
  })

  it('info has its size and its blocks', async () => {
    ok(qemuImg('create', '-q', '-f', 'vhdx', '-o', 'block_size=2M', at('info.vhdx'), '30M'))
    const [a, b] = (await inTurn('info --output=json info.vhdx')).map(({ stdout }) => JSON.parse(stdout))
    for (const field of ['format', 'virtual-size', 'cluster-size', 'actual-size']) {
      expect(a[field], field).toEqual(b[field])
    }
  })

  it.each([
    'subformat=dynamic',
    'subformat=dynamic,block_size=1M,block_state_zero=off',
    'subformat=fixed,block_size=4M',
  ])('disks are converted in both directions, %s', async options => {
    const made = await ours(`convert -f raw -O vhdx -o ${options} disk.raw ours.vhdx`)
    expect(made).toMatchObject({ code: 0, stderr: '' })
    expect(byQemu('ours.vhdx').equals(disk)).toBe(true)
    ok(qemuImg('convert', '-f', 'raw', '-O', 'vhdx', '-o', options, at('disk.raw'), at('theirs.vhdx')))
    await convert(at('theirs.vhdx'), at('back.raw'), { to: 'raw', overwrite: true })
    expect(readFileSync(at('back.raw')).equals(disk)).toBe(true)
    expect((await ours('compare ours.vhdx theirs.vhdx')).code).toBe(0)
    const { stdout } = await ours('measure -O vhdx -f raw --output=json disk.raw')
    expect(JSON.parse(stdout)['required']).toBeGreaterThan(2 * MIB)
  })

  it('an image of QEMU is written to, and another tool goes on', async () => {
    ok(qemuImg('convert', '-f', 'raw', '-O', 'vhdx', '-o', 'block_size=1M', at('disk.raw'), at('write.vhdx')))
    const expected = Buffer.from(disk)
    {
      await using image = await open(at('write.vhdx'), { flags: 'r+' })
      const bytes = pattern(77, 3 * MIB)
      bytes.copy(expected, 5 * MIB + 512)
      await image.write(bytes, { position: 5 * MIB + 512 })
      await image.writeZeroes(0, MIB, { unmap: true })
      expected.fill(0, 0, MIB)
      await image.datasync()
      // Who looks now sees the log, in memory.
      expect((await inspect(at('write.vhdx'))).findings.map(({ code }) => code)).toEqual(['DIRTY_BIT'])
    }
    expect((await inspect(at('write.vhdx'))).safe).toBe(true)
    expect(byQemu('write.vhdx').equals(expected)).toBe(true)
    expect((await read(at('write.vhdx'))).equals(expected)).toBe(true)
  })

  it('a larger disk is one to QEMU, too, which resizes none', async () => {
    ok(qemuImg('create', '-q', '-f', 'vhdx', at('grow.vhdx'), '10M'))
    expect((await theirs('resize grow.vhdx 20M')).code).toBe(1)
    expect(await ours('resize grow.vhdx 20M')).toMatchObject({ code: 0 })
    {
      await using image = await open(at('grow.vhdx'), { flags: 'r+' })
      await image.truncate(21 * MIB)
    }
    expect(JSON.parse(ok(qemuImg('info', '--output=json', at('grow.vhdx'))))['virtual-size']).toBe(21 * MIB)
    expect(byQemu('grow.vhdx').length).toBe(21 * MIB)
  })

  it('a check finds a damaged copy, and repairs it', async () => {
    ok(qemuImg('convert', '-f', 'raw', '-O', 'vhdx', at('disk.raw'), at('check.vhdx')))
    expect(await check(at('check.vhdx'))).toMatchObject({ ok: true, totalClusters: 3, allocatedClusters: 2 })
    expect(await ours('check check.vhdx')).toMatchObject({ code: 0 })
    const file = openSync(at('check.vhdx'), 'r+')
    writeSync(file, 'X', (256 << 10) + 100)
    closeSync(file)
    const found = await check(at('check.vhdx'))
    expect(found.findings).toMatchObject([{ code: 'COPY', offset: 256 << 10, severity: 'corruption' }])
    expect(await ours('check -r all check.vhdx')).toMatchObject({ code: 0 })
    expect(await check(at('check.vhdx'))).toMatchObject({ ok: true })
    expect(byQemu('check.vhdx').equals(disk)).toBe(true)
  })

  /** QEMU makes no such images: the metadata of one of its own get a parent locator. */
  it('a parent is opened where that is allowed, and else refused', async () => {
    ok(qemuImg('convert', '-f', 'raw', '-O', 'vhdx', at('disk.raw'), at('parent.vhdx')))
    ok(qemuImg('create', '-q', '-f', 'vhdx', '-o', 'block_state_zero=off', at('child.vhdx'), String(disk.length)))
    const utf16 = (text: string): Buffer => Buffer.from(text, 'utf16le')
    const [key, value] = [utf16('relative_path'), utf16('.\\parent.vhdx')]
    const locator = Buffer.alloc(32)
    locator.write('b7ef4ab09ed1814ab78925b8e9445913', 0, 'hex')
    locator.writeUInt16LE(1, 18)
    locator.writeUInt32LE(32, 20)
    locator.writeUInt32LE(32 + key.length, 24)
    locator.writeUInt16LE(key.length, 28)
    locator.writeUInt16LE(value.length, 30)
    const item = Buffer.concat([locator, key, value])
    const entry = Buffer.alloc(32)
    entry.write('2d5fd3a80bb34d45abf7d3d84834ab0c', 0, 'hex')
    entry.writeUInt32LE(128 << 10, 16)
    entry.writeUInt32LE(item.length, 20)
    entry.writeUInt32LE(4, 24)
    const file = openSync(at('child.vhdx'), 'r+')
    const metadata = 3 * MIB
    writeSync(file, item, 0, item.length, metadata + (128 << 10))
    writeSync(file, entry, 0, 32, metadata + 32 + 5 * 32)
    writeSync(file, Buffer.from([6]), 0, 1, metadata + 10)
    writeSync(file, Buffer.from([2]), 0, 1, metadata + (64 << 10) + 4)
    closeSync(file)
    expect(await failure(() => open(at('child.vhdx')))).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    expect(await inspect(at('child.vhdx'))).toMatchObject({
      format: 'vhdx',
      backingFilename: './parent.vhdx',
      backingFilenameFormat: 'vhdx',
      safe: false,
    })
    expect((await read(at('child.vhdx'), { references: 'allow' })).equals(disk)).toBe(true)
  })
})

describe('vhdx', () => {
  it('images are made with their options, and with no other', async () => {
    const options = { format: 'vhdx', size: 5 * MIB, subformat: 'fixed', blockSize: MIB, logSize: 2 * MIB } as const
    await (await create(at('api.vhdx'), options)).close()
    expect(statSync(at('api.vhdx')).size).toBe(14 * MIB)
    expect(await probe(at('api.vhdx'))).toBe('vhdx')
    await using image = await open(at('api.vhdx'))
    expect(await image.info()).toMatchObject({ format: 'vhdx', virtualSize: 5 * MIB, clusterSize: MIB })
    const make = (more: object) => () => create(at('not.vhdx'), { format: 'vhdx', size: MIB, ...more } as never)
    for (const [more, field] of [
      [{ subformat: 'differencing' }, 'subformat'],
      [{ blockSize: 3 * MIB }, 'blockSize'],
      [{ logSize: 5 }, 'logSize'],
      [{ clusterSize: 65536 }, 'clusterSize'],
      [{ size: 65 * 2 ** 40 }, 'size'],
    ] as const) {
      expect(await failure(make(more)), field).toMatchObject({ field })
    }
  })

  it('a map shows what is there, and a measurement what it will take', async () => {
    await convert(at('disk.raw'), at('map.vhdx'), { from: 'raw', to: 'vhdx', create: { blockSize: MIB } })
    const entries: (readonly [number, number, boolean])[] = []
    await using image = await open(at('map.vhdx'))
    for await (const { start, length, zero } of image.map()) entries.push([start, length, zero])
    expect(entries).toEqual([
      [0, MIB, false],
      [MIB, 20 * MIB, true],
      [21 * MIB, MIB + 512, false],
    ])
    const { required } = await measure(at('map.vhdx'), { to: 'vhdx', create: { blockSize: MIB } })
    expect(required).toBe(statSync(at('map.vhdx')).size)
  })

  it('files that are cut off anywhere are refused or read', async () => {
    await convert(at('disk.raw'), at('whole.vhdx'), { from: 'raw', to: 'vhdx' })
    copyFileSync(at('whole.vhdx'), at('cut.vhdx'))
    for (const length of [9 * MIB, 4 * MIB, 2 * MIB + 8, 300_000, 70_000, 8]) {
      writeFileSync(at('cut.vhdx'), readFileSync(at('whole.vhdx')).subarray(0, length))
      expect(await failure(() => read(at('cut.vhdx'))), String(length)).toMatchObject({
        code: expect.stringMatching(/CORRUPT|INVALID_HEADER/),
      })
    }
    const { code, stderr } = await asQemuImg(['info', 'cut.vhdx'], folder)
    expect([code, stderr.includes('cut.vhdx')]).toEqual([1, true])
  })
})
