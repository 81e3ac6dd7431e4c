/** VHDs: by the command line beside qemu-img, and by the API. */

import { readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, compare, convert, create, inspect, open, probe } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { failure } from '../api/fixtures.js'
import { bothTools, describeWithQemu, workspace } from '../cli/run.js'
import { assertSameBytes, ok, qemuIo } from '../interop/qemu.js'
import { expectDisk, expectSame, writeDisk } from './both.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const { ours, theirs } = bothTools(folder)
const SIZE = 5 * 2 ** 20 + 512
/** Of a dynamic image whose blocks all have their place. */
const MADE = [{ preallocation: 'metadata' }, { preallocation: 'full' }] as const
const OPTIONS = ['', ' -o subformat=fixed', ' -o force_size=on', ' -o subformat=fixed,force_size=on']
let disk: Buffer

beforeAll(() => {
  disk = writeDisk(at('disk.raw'), SIZE)
})

/** The first sum of bytes that a structure of 512 or more bytes has in place of its own checksum. */
function seal(bytes: Buffer, start: number, length: number, at: number): void {
  bytes.writeUInt32BE(0, start + at)
  const sum = bytes.subarray(start, start + length).reduce((total, byte) => total + byte, 0)
  bytes.writeUInt32BE(~sum >>> 0, start + at)
}

/** A child of a dynamic image without data, with nothing of its own, which names `parent`. */
function childOf(image: Buffer, parent: string, uuid: Buffer): Buffer {
  const bytes = Buffer.from(image)
  uuid.copy(bytes, 512 + 40)
  bytes.fill(0, 512 + 64, 512 + 576)
  for (const [index, unit] of [...parent].entries()) bytes.writeUInt16BE(unit.charCodeAt(0), 512 + 64 + index * 2)
  seal(bytes, 512, 1024, 36)
  for (const start of [0, bytes.length - 512]) {
    bytes.writeUInt32BE(4, start + 60)
    bytes.fill(0x77, start + 68, start + 84)
    seal(bytes, start, 512, 64)
  }
  return bytes
}

describeWithQemu('vpc beside qemu-img', () => {
  it.each(OPTIONS)('create%s', async options => {
    await expectSame(folder, `create -f vpc${options} new.vhd 10M`)
    for (const line of ['info --output=json', 'info', 'map --output=json']) {
      await expectSame(folder, `${line} -f vpc new.vhd`)
    }
    const size = statSync(at('new.vhd')).size
    await ours(`create -q -f vhd${options} new.vhd 10M`)
    expect(statSync(at('new.vhd')).size).toBe(size)
    expect((await ours('info -f vhd new.vhd')).stdout).toContain('file format: vpc\n')
  })

  it('lists the options of create', async () => {
    await expectSame(folder, 'create -f vpc -o help')
  })

  it('refuses what is too large', async () => {
    const { code, stderr } = await ours('create -f vpc large.vhd 2041G')
    expect([code, stderr]).toEqual([1, expect.stringContaining('2040 GiB')])
  })

  it.each(OPTIONS)('convert%s', async options => {
    await ours(`convert -f raw -O vpc${options} disk.raw ours.vhd`)
    expectDisk(folder, 'ours.vhd', 'vpc', disk)
    await theirs(`convert -f raw -O vpc${options} disk.raw theirs.vhd`)
    expect(statSync(at('ours.vhd')).size).toBe(statSync(at('theirs.vhd')).size)
    await expectSame(folder, 'map --output=json -f vpc theirs.vhd')
    await expectSame(folder, 'info --output=json -f vpc theirs.vhd')
    await expectSame(folder, 'compare -f vpc -F vpc ours.vhd theirs.vhd')
    ok(qemuIo('-f', 'vpc', '-c', 'write -P 7 3M 5000', at('theirs.vhd')))
    await ours('convert -f vpc -O raw theirs.vhd back.raw')
    const expected = Buffer.from(disk).fill(7, 3 * 2 ** 20, 3 * 2 ** 20 + 5000)
    assertSameBytes(readFileSync(at('back.raw')).subarray(0, SIZE), expected, 'the disk')
    expect(await ours('check -f vpc theirs.vhd')).toMatchObject({ code: 0 })
  })

  it('a disk grows, which QEMU does not do', async () => {
    for (const options of OPTIONS.slice(2)) {
      await ours(`convert -f raw -O vpc${options} disk.raw grown.vhd`)
      expect(await ours('resize -f vpc grown.vhd 20M')).toMatchObject({ code: 0, stdout: 'Image resized.\n' })
      expectDisk(folder, 'grown.vhd', 'vpc', disk)
    }
  })
})

describe('vpc by the API', () => {
  it('is made, written to, grown and read', async () => {
    const path = at('api.vhd')
    {
      await using image = await create(path, { format: 'vpc', size: SIZE, forceSize: true })
      expect([image.virtualSize, image.clusterSize]).toEqual([SIZE, 2 ** 21])
      await image.write(disk, { position: 0 })
      await image.resize(SIZE + 2 ** 20)
    }
    expect(await probe(path)).toBe('vpc')
    expect(await inspect(path)).toMatchObject({ format: 'vpc', virtualSize: SIZE + 2 ** 20, safe: true, findings: [] })
    {
      await using image = await open(path)
      expect(await image.info()).toMatchObject({ format: 'vpc', virtualSize: SIZE + 2 ** 20, clusterSize: 2 ** 21 })
    }
    expect(await check(path)).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 })
    await convert(path, at('api.raw'), { to: 'raw', overwrite: true })
    assertSameBytes(readFileSync(at('api.raw')).subarray(0, SIZE), disk, 'the disk')
  })

  it.each(MADE)('every block has its place with %o', async shape => {
    const path = at('full.vhd')
    await (await create(path, { format: 'vpc', size: SIZE, forceSize: true, overwrite: true, ...shape })).close()
    const bytes = readFileSync(path)
    const places = [0, 1, 2].map(block => bytes.readUInt32BE(1536 + block * 4) * 512)
    expect(places.map(place => bytes.readUInt8(place))).toEqual([0xff, 0xff, 0xff])
    expect(await check(path)).toMatchObject({ ok: true, allocatedClusters: 3 })
    await convert(at('disk.raw'), path, {
      from: 'raw',
      to: 'vpc',
      create: { forceSize: true, ...shape },
      overwrite: true,
    })
    expect(await compare(at('disk.raw'), path, { formatA: 'raw' })).toMatchObject({ identical: true })
  })

  it('a damaged copy of the footer is found and repaired', async () => {
    const bytes = readFileSync(at('api.vhd'))
    bytes.writeUInt8(0x55, 100)
    writeFileSync(at('damaged.vhd'), bytes)
    expect(await check(at('damaged.vhd'))).toMatchObject({ corruptions: 1, findings: [{ code: 'COPY', offset: 0 }] })
    expect(await check(at('damaged.vhd'), { repair: 'all' })).toMatchObject({ corruptions: 0, corruptionsFixed: 1 })
    assertSameBytes(readFileSync(at('damaged.vhd')), readFileSync(at('api.vhd')), 'the disk')
  })

  it('a differencing image is opened with its parent, where the caller allows that', async () => {
    const parent = readFileSync(at('api.vhd'))
    await (await create(at('empty.vhd'), { format: 'vpc', size: SIZE + 2 ** 20, forceSize: true })).close()
    const empty = readFileSync(at('empty.vhd'))
    writeFileSync(at('child.vhd'), childOf(empty, 'api.vhd', parent.subarray(68, 84)))
    writeFileSync(at('stray.vhd'), childOf(empty, 'api.vhd', Buffer.alloc(16, 9)))
    const found = await inspect(at('child.vhd'))
    expect([found.safe, found.backingFilename]).toEqual([false, 'api.vhd'])
    expect(await failure(() => open(at('child.vhd')))).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    {
      await using image = await open(at('child.vhd'), { references: 'allow' })
      const { buffer } = await image.read(Buffer.alloc(SIZE), { position: 0 })
      assertSameBytes(buffer, disk, 'the disk')
    }
    {
      await using alone = await open(at('child.vhd'), { references: 'layer' })
      expect((await alone.read(Buffer.alloc(SIZE, 1), { position: 0 })).buffer.every(byte => byte === 0)).toBe(true)
    }
    const stray = await failure(() => open(at('stray.vhd'), { references: 'allow' }))
    expect(stray).toMatchObject({ code: 'ERR_QCOW2_CHAIN' })
  })

  it('options of other formats and words are refused by name', async () => {
    const refused = (options: object) => failure(() => create(at('x.vhd'), { format: 'vpc', size: 512, ...options }))
    expect(await refused({ subformat: 'sparse' })).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
      field: 'subformat',
    })
    expect(await refused({ static: true })).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'static' })
    expect(await refused({ clusterSize: 65536 })).toMatchObject({ field: 'clusterSize' })
  })
})
