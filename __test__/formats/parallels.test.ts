/** Parallels images: by the command line beside qemu-img, and by the API. */

import { copyFileSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
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
let disk: Buffer

beforeAll(() => {
  disk = writeDisk(at('disk.raw'), SIZE)
})

describeWithQemu('parallels beside qemu-img', () => {
  it.each(['', ' -o cluster_size=64k'])('create%s', async options => {
    await expectSame(folder, `create -f parallels${options} new.hds 10M`)
    const theirBytes = readFileSync(at('new.hds'))
    await ours(`create -q -f parallels${options} new.hds 10M`)
    assertSameBytes(readFileSync(at('new.hds')), theirBytes, 'the disk')
    for (const line of ['info --output=json', 'info', 'check', 'check --output=json', 'map --output=json']) {
      await expectSame(folder, `${line} new.hds`)
    }
  })

  it('lists the options of create', async () => {
    await expectSame(folder, 'create -f parallels -o help')
  })

  it('convert', async () => {
    await ours('convert -f raw -O parallels -o cluster_size=64k disk.raw ours.hds')
    expectDisk(folder, 'ours.hds', 'parallels', disk)
    await expectSame(folder, 'check --output=json ours.hds')
    await expectSame(folder, 'map --output=json ours.hds')
    await theirs('convert -f raw -O parallels -o cluster_size=64k disk.raw theirs.hds')
    await expectSame(folder, 'map --output=json theirs.hds')
    await expectSame(folder, 'compare ours.hds theirs.hds')
    ok(qemuIo('-f', 'parallels', '-c', 'write -P 7 3M 5000', at('theirs.hds')))
    await ours('convert -O raw theirs.hds back.raw')
    assertSameBytes(
      readFileSync(at('back.raw')),
      Buffer.from(disk).fill(7, 3 * 2 ** 20, 3 * 2 ** 20 + 5000),
      'the disk',
    )
  })

  it.each(['check', 'check -r all'])('%s of damaged images', async command => {
    const sound = readFileSync(at('ours.hds'))
    const damage: Record<string, (bytes: Buffer) => Buffer> = {
      open: bytes => {
        bytes.write('Ynot', 44)
        return bytes
      },
      shared: bytes => {
        bytes.writeUInt32LE(bytes.readUInt32LE(64), 64 + 4)
        return bytes
      },
      long: bytes => Buffer.concat([bytes, Buffer.alloc(200_000)]),
    }
    for (const [name, spoil] of Object.entries(damage)) {
      const bytes = spoil(Buffer.from(sound))
      writeFileSync(at('damaged.hds'), bytes)
      const mine = await ours(`${command} damaged.hds`)
      const repaired = readFileSync(at('damaged.hds'))
      writeFileSync(at('damaged.hds'), bytes)
      expect({ name, ...mine }).toEqual({ name, ...(await theirs(`${command} damaged.hds`)) })
      expect(repaired.length, name).toBe(statSync(at('damaged.hds')).size)
    }
  })
})

/** Two storages of 2 MiB and 3 MiB, of which the second has a snapshot; QEMU made the images. */
describeWithQemu('a bundle', () => {
  const TOP = '{5fbaabe3-6958-40ff-92a7-860e329aab41}'
  const ROOT = '{11111111-2222-3333-4444-555555555555}'
  const SIZES = [2 ** 21, 3 * 2 ** 20] as const
  const inside = (name: string): string => at(join('disk.hdd', name))
  const image = (guid: string, file: string, type = 'Compressed') =>
    `<Image><GUID>${guid}</GUID><Type>${type}</Type><File>${file}</File></Image>`
  const storage = (start: number, end: number, images: string) =>
    `<Storage><Start>${start / 512}</Start><End>${end / 512}</End>${images}</Storage>`
  const shot = (guid: string, parent: string) => `<Shot><GUID>${guid}</GUID><ParentGUID>${parent}</ParentGUID></Shot>`
  const describes = (storages: string) =>
    `<?xml version='1.0' encoding='UTF-8'?>
<Parallels_disk_image Version="1.0"><Disk_Parameters><Disk_size>${(SIZES[0] + SIZES[1]) / 512}</Disk_size></Disk_Parameters>
<StorageData>${storages}</StorageData>
<Snapshots><TopGUID>${TOP}</TopGUID>${shot(TOP, ROOT)}${shot(ROOT, '{00000000-0000-0000-0000-000000000000}')}</Snapshots>
</Parallels_disk_image>`
  const second = storage(SIZES[0], SIZES[0] + SIZES[1], image(ROOT, 'b0.hds') + image(TOP, 'b1.hds'))
  const first = (file: string) => storage(0, SIZES[0], image(ROOT, 'a0.raw', 'Plain') + image(TOP, file))
  let expected: Buffer

  beforeAll(async () => {
    mkdirSync(at('disk.hdd'))
    expected = Buffer.from(disk.subarray(0, SIZES[0] + SIZES[1]))
    writeFileSync(inside('a0.raw'), expected.subarray(0, SIZES[0]))
    writeFileSync(at('b0.raw'), expected.subarray(SIZES[0]))
    for (const line of [
      'convert -f raw -O parallels -o cluster_size=64k b0.raw disk.hdd/b0.hds',
      'create -q -f parallels -o cluster_size=64k disk.hdd/a1.hds 2M',
      'create -q -f parallels -o cluster_size=64k disk.hdd/b1.hds 3M',
    ]) {
      expect(await theirs(line), line).toMatchObject({ code: 0 })
    }
    ok(qemuIo('-f', 'parallels', '-c', 'write -P 7 64k 64k', inside('a1.hds')))
    ok(qemuIo('-f', 'parallels', '-c', 'write -P 9 1M 128k', inside('b1.hds')))
    expected.fill(7, 65536, 131_072).fill(9, SIZES[0] + 2 ** 20, SIZES[0] + 2 ** 20 + 131_072)
    writeFileSync(inside('DiskDescriptor.xml'), describes(first('a1.hds') + second))
    writeFileSync(at('bundle.raw'), expected)
  })

  it('is converted, compared and listed by its folder and by its descriptor', async () => {
    for (const name of ['disk.hdd', 'disk.hdd/DiskDescriptor.xml']) {
      expect(await ours(`convert -O qcow2 ${name} bundle.qcow2`), name).toMatchObject({ code: 0, stderr: '' })
      expect(await theirs('compare -f qcow2 -F raw bundle.qcow2 bundle.raw'), name).toMatchObject({ code: 0 })
      expect(await ours(`compare -F raw ${name} bundle.raw`)).toMatchObject({ code: 0 })
      expect((await ours(`info ${name}`)).stdout).toContain('file format: parallels')
      const entries = JSON.parse((await ours(`map --output=json ${name}`)).stdout) as {
        start: number
        length: number
      }[]
      expect(entries.reduce((end, { start, length }) => (start === end ? start + length : -1), 0)).toBe(expected.length)
    }
  })

  it('names files that are opened only where that is allowed, and only its own', async () => {
    const path = inside('DiskDescriptor.xml')
    expect(await failure(() => open(at('disk.hdd')))).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED', path })
    const bundle = await open(at('disk.hdd'), { references: 'allow' })
    expect((await bundle.read(Buffer.alloc(expected.length), { position: 0 })).buffer.equals(expected)).toBe(true)
    await bundle.close()
    const found = await inspect(at('disk.hdd'))
    expect(found).toMatchObject({ format: 'parallels', virtualSize: expected.length, safe: false })
    expect(found.findings.map(({ code }) => code)).toEqual(Array(4).fill('DATA_FILE'))
    expect(await probe(at('disk.hdd'))).toBe('parallels')
    const same = await compare(at('disk.hdd'), at('bundle.raw'), { formatB: 'raw', references: 'allow' })
    expect(same).toMatchObject({ identical: true })
    const write = await failure(() => open(at('disk.hdd'), { references: 'allow', flags: 'r+' }))
    expect(write).toMatchObject({ code: 'ERR_QCOW2_UNSUPPORTED_FEATURE', path })
    for (const file of ['../bundle.raw', at('bundle.raw'), 'sub/a', '..', 'nbd:x']) {
      writeFileSync(path, describes(first(file) + second))
      const error = await failure(() => open(at('disk.hdd'), { references: 'allow' }))
      expect(error, file).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED', field: 'extent' })
    }
    writeFileSync(path, describes(first('gone.hds') + second))
    expect(await failure(() => open(path, { references: 'allow' }))).toMatchObject({ code: 'ERR_QCOW2_CHAIN' })
    writeFileSync(path, describes(first('b1.hds') + second))
    expect(await failure(() => open(path, { references: 'allow' }))).toMatchObject({ code: 'ERR_QCOW2_INVALID_HEADER' })
    expect(await inspect(at('disk.hdd'))).toMatchObject({ format: 'parallels', virtualSize: 0, safe: false })
    rmSync(path)
    expect(await failure(() => open(at('disk.hdd')))).toMatchObject({ code: 'EISDIR', path: at('disk.hdd') })
  })
})

describe('parallels by the API', () => {
  it('is made, written to, grown and read', async () => {
    const path = at('api.hds')
    {
      await using image = await create(path, { format: 'parallels', size: SIZE, clusterSize: 65536 })
      await image.write(disk, { position: 0 })
      expect(readFileSync(path).toString('latin1', 44, 48)).toBe('Ynot')
      await image.resize(SIZE + 2 ** 20)
    }
    expect(readFileSync(path).readUInt32LE(44)).toBe(0)
    expect(await probe(path)).toBe('parallels')
    expect(await inspect(path)).toMatchObject({ format: 'parallels', virtualSize: SIZE + 2 ** 20, safe: true })
    {
      await using image = await open(path)
      expect(await image.info()).toMatchObject({ format: 'parallels', virtualSize: SIZE + 2 ** 20 })
    }
    expect(await check(path)).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 })
    await convert(path, at('api.raw'), { to: 'raw', overwrite: true })
    assertSameBytes(readFileSync(at('api.raw')).subarray(0, SIZE), disk, 'the disk')
  })

  it('an image that is in use is repaired when it is opened for writing', async () => {
    copyFileSync(at('api.hds'), at('used.hds'))
    const bytes = readFileSync(at('used.hds'))
    bytes.write('Ynot', 44)
    writeFileSync(at('used.hds'), bytes)
    const found = await inspect(at('used.hds'))
    expect(found.findings.map(({ code }) => code)).toEqual(['DIRTY_BIT'])
    expect(await check(at('used.hds'))).toMatchObject({ corruptions: 1 })
    await (await open(at('used.hds'), { flags: 'r+' })).close()
    expect(await check(at('used.hds'))).toMatchObject({ corruptions: 0 })
    expect(
      await failure(() => create(at('x.hds'), { format: 'parallels', size: 512, clusterSize: 1000 })),
    ).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
    })
  })
})
