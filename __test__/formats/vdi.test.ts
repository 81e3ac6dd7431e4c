/** VirtualBox disk images: by the command line beside qemu-img, and by the API. */

import { copyFileSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, convert, create, inspect, open, probe } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { failure } from '../api/fixtures.js'
import { bothTools, describeWithQemu, workspace } from '../cli/run.js'
import { assertSameBytes, ok, qemuImg, qemuIo } from '../interop/qemu.js'
import { expectDisk, expectSame, writeDisk } from './both.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const { ours, theirs } = bothTools(folder)
const SIZE = 5 * 2 ** 20 + 512
let disk: Buffer

beforeAll(() => {
  disk = writeDisk(at('disk.raw'), SIZE)
})

describeWithQemu('vdi beside qemu-img', () => {
  it.each(['', ' -o static=on', ' -o static=off'])('create%s', async options => {
    await expectSame(folder, `create -f vdi${options} new.vdi 10M`)
    await expectSame(folder, 'info --output=json new.vdi')
    await expectSame(folder, 'info new.vdi')
    await expectSame(folder, 'check new.vdi')
    await expectSame(folder, 'map --output=json new.vdi')
    const { size } = statSync(at('new.vdi'))
    await ours(`create -q -f vdi${options} new.vdi 10M`)
    expect(statSync(at('new.vdi')).size).toBe(size)
  })

  it('lists the options of create', async () => {
    await expectSame(folder, 'create -f vdi -o help')
  })

  it.each(['', ' -o static=on'])('convert%s', async options => {
    await expectSame(folder, `convert -f raw -O vdi${options} disk.raw ours.vdi`)
    await ours(`convert -f raw -O vdi${options} disk.raw ours.vdi`)
    expectDisk(folder, 'ours.vdi', 'vdi', disk)
    await expectSame(folder, 'check --output=json ours.vdi')
    await expectSame(folder, 'compare ours.vdi disk.raw')
    await theirs(`convert -f raw -O vdi${options} disk.raw theirs.vdi`)
    await expectSame(folder, 'map --output=json theirs.vdi')
    await expectSame(folder, 'info --output=json theirs.vdi')
    ok(qemuIo('-f', 'vdi', '-c', 'write -P 7 3M 5000', at('theirs.vdi')))
    await ours('convert -O raw theirs.vdi back.raw')
    const expected = Buffer.from(disk).fill(7, 3 * 2 ** 20, 3 * 2 ** 20 + 5000)
    assertSameBytes(readFileSync(at('back.raw')), expected, 'the disk')
  })

  it('what a check says of damage', async () => {
    await theirs('convert -f raw -O vdi disk.raw damaged.vdi')
    const bytes = readFileSync(at('damaged.vdi'))
    bytes.writeUInt32LE(1, 0x200)
    bytes.writeUInt32LE(100, 0x204)
    writeFileSync(at('damaged.vdi'), bytes)
    await expectSame(folder, 'check damaged.vdi')
  })

  it('a disk grows where its block map has room, which QEMU does not', async () => {
    copyFileSync(at('ours.vdi'), at('grown.vdi'))
    expect(await ours('resize grown.vdi 20M')).toMatchObject({ code: 0, stdout: 'Image resized.\n' })
    expectDisk(folder, 'grown.vdi', 'vdi', disk)
    expect((await ours('resize grown.vdi 1T')).stderr).toMatch(/room for a disk of \d+ bytes/)
    ok(qemuImg('check', '-f', 'vdi', at('grown.vdi')))
  })
})

describe('vdi by the API', () => {
  it('is made, written to, grown and read', async () => {
    const path = at('api.vdi')
    {
      await using image = await create(path, { format: 'vdi', size: SIZE, static: true })
      expect([image.virtualSize, image.clusterSize]).toEqual([SIZE, 2 ** 20])
      await image.write(disk, { position: 0 })
      await image.resize(SIZE + 2 ** 20)
    }
    expect(await probe(path)).toBe('vdi')
    expect(await inspect(path)).toMatchObject({ format: 'vdi', virtualSize: SIZE + 2 ** 20, safe: true, findings: [] })
    {
      await using image = await open(path)
      expect(await image.info()).toMatchObject({ format: 'vdi', virtualSize: SIZE + 2 ** 20, clusterSize: 2 ** 20 })
    }
    expect(await check(path)).toMatchObject({ corruptions: 0, leaks: 0, checkErrors: 0 })
    await convert(path, at('api.raw'), { to: 'raw', overwrite: true })
    assertSameBytes(readFileSync(at('api.raw')).subarray(0, SIZE), disk, 'the disk')
    expect(await check(path, { repair: 'all' })).toMatchObject({ ok: true, corruptionsFixed: 0 })
    const damaged = readFileSync(path)
    damaged.copy(damaged, 512, 516, 520)
    writeFileSync(at('damaged.vdi'), damaged)
    expect(await check(at('damaged.vdi'))).toMatchObject({ corruptions: 1, findings: [{ code: 'BLOCK_SHARED' }] })
    expect(await check(at('damaged.vdi'), { repair: 'all' })).toMatchObject({ corruptions: 0, corruptionsFixed: 1 })
    expect(await check(at('damaged.vdi'))).toMatchObject({ ok: true })
  })

  it('a differencing image is not taken for a whole disk', async () => {
    const path = at('child.vdi')
    await (await create(path, { format: 'vdi', size: SIZE })).close()
    const bytes = readFileSync(path)
    bytes.writeUInt32LE(4, 0x4c)
    bytes.fill(0xab, 0x1a8, 0x1b8)
    writeFileSync(path, bytes)
    const refused = { code: 'ERR_QCOW2_REFERENCE_DENIED', field: 'backing_file', path }
    expect(await failure(() => open(path))).toMatchObject(refused)
    expect(await failure(() => convert(path, at('child.raw'), { to: 'raw' }))).toMatchObject(refused)
    const found = await inspect(path)
    expect([found.safe, found.findings.map(({ code }) => code)]).toEqual([false, ['BACKING_FILE']])
  })
})
