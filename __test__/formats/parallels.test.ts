/** Parallels images: by the command line beside qemu-img, and by the API. */

import { copyFileSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, convert, create, inspect, open, probe } from 'qcow2'
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
