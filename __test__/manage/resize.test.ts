/** Resizing through the npm API: shrinking on request only, bitmaps and snapshots, and what is refused. */

import { readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, create, type DirtyRange, open, Qcow2Error } from 'qcow2'
import { expect, it } from 'vitest'
import { failure, temporaryFolder } from '../api/fixtures.js'
import { describeWithQemu, ok, qemuImg, qemuIo } from '../interop/qemu.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20

describeWithQemu('resize', () => {
  it('shrinks only when asked, and says what would be lost', async () => {
    const path = at('shrink.qcow2')
    await (await create(path, { size: 16 * MIB })).close()
    const image = await open(path, { flags: 'r+' })
    await image.write(Buffer.alloc(3 * MIB, 5), { position: 0 })
    await image.write(Buffer.alloc(65536, 6), { position: 10 * MIB })
    const error = await failure(() => image.truncate(2 * MIB))
    expect(error).toBeInstanceOf(Qcow2Error)
    expect(error).toMatchObject({ code: 'ERR_QCOW2_DATA_LOSS' })
    expect(error).toMatchObject({ message: expect.stringContaining(`lose ${MIB + 65536} bytes of data`) })
    expect(image.virtualSize).toBe(16 * MIB)
    await image.truncate(2 * MIB, { shrink: true })
    expect(image.virtualSize).toBe(2 * MIB)
    await image.resize(4 * MIB, { preallocation: 'falloc' })
    const buffer = Buffer.alloc(4 * MIB, 9)
    await image.read(buffer, { position: 0 })
    expect(buffer.equals(Buffer.concat([Buffer.alloc(2 * MIB, 5), Buffer.alloc(2 * MIB)]))).toBe(true)
    await image.close()
    ok(qemuImg('check', path))
    expect(statSync(path).blocks * 512).toBeGreaterThanOrEqual(4 * MIB)
  })

  it('that is cancelled while it preallocates leaves the disk and the file as they were', async () => {
    const path = at('cancelled')
    for (const format of ['qcow2', 'raw'] as const) {
      const made = await create(path, { format, size: 4 * MIB, overwrite: true })
      await made.write(Buffer.alloc(MIB, 5), { position: 3 * MIB })
      await made.close()
      const before = statSync(path).blocks
      await using image = await open(path, { format, flags: 'r+' })
      const controller = new AbortController()
      setTimeout(() => controller.abort('enough'), 20)
      const { signal } = controller
      const error = await failure(() => image.truncate(4096 * MIB, { preallocation: 'full', signal }))
      expect(error).toMatchObject({ name: 'AbortError', cause: 'enough' })
      expect(image.virtualSize).toBe(4 * MIB)
      await image.truncate(5 * MIB)
      const bytes = Buffer.alloc(2 * MIB, 9)
      await image.read(bytes, { position: 3 * MIB })
      expect(bytes.equals(Buffer.concat([Buffer.alloc(MIB, 5), Buffer.alloc(MIB)]))).toBe(true)
      await image.close()
      expect(statSync(path).blocks).toBeLessThan(before + (2 * MIB) / 512)
      if (format === 'qcow2') ok(qemuImg('check', path))
    }
  })

  it('gives an empty disk its first table, and leaves nothing behind', async () => {
    for (const clusterSize of [512, 65536]) {
      const path = at(`empty-${clusterSize}.qcow2`)
      const image = await create(path, { size: 0, clusterSize })
      await image.truncate(MIB)
      await image.write(Buffer.alloc(512, 3), { position: MIB - 512 })
      await image.close()
      expect((await check(path)).messages).toEqual([])
      ok(qemuImg('check', path))
    }
  })

  it("keeps snapshots at their size, and bitmaps at the disk's", async () => {
    const path = at('kept.qcow2')
    await (await create(path, { size: 8 * MIB })).close()
    const image = await open(path, { flags: 'r+' })
    await image.bitmaps.add('dirty', { granularity: 65536 })
    await image.write(Buffer.alloc(8 * MIB, 1), { position: 0 })
    await image.snapshots.create('large')
    await image.truncate(MIB, { shrink: true })
    const dirty: DirtyRange[] = []
    for await (const range of image.bitmaps.extents('dirty')) dirty.push(range)
    expect(dirty).toEqual([{ start: 0, length: MIB }])
    await image.snapshots.create('small')
    await image.snapshots.apply('large')
    expect(image.virtualSize).toBe(8 * MIB)
    await image.close()
    ok(qemuImg('check', path))
    expect(ok(qemuIo('-r', '-c', 'read -P 1 0 8M', path))).toContain('read 8388608/8388608')
    // QEMU applies no snapshot while there are bitmaps.
    ok(qemuImg('bitmap', '--remove', path, 'dirty'))
    ok(qemuImg('snapshot', '-a', 'small', path))
    expect(JSON.parse(ok(qemuImg('info', '--output=json', path)))).toMatchObject({ 'virtual-size': MIB })
    ok(qemuImg('check', path))
  })

  it('cuts raw disks and external data files', async () => {
    const raw = at('disk.raw')
    await (await create(raw, { size: 2 * MIB, format: 'raw' })).close()
    const disk = await open(raw, { flags: 'r+', format: 'raw' })
    expect(await failure(() => disk.truncate(MIB))).toMatchObject({ code: 'ERR_QCOW2_DATA_LOSS' })
    expect(await failure(() => disk.truncate(4 * MIB, { preallocation: 'metadata' }))).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
    })
    await disk.truncate(MIB, { shrink: true })
    await disk.truncate(3 * MIB, { preallocation: 'full' })
    await disk.close()
    expect(statSync(raw).size).toBe(3 * MIB)
    const path = at('external.qcow2')
    await (await create(path, { size: 4 * MIB, dataFile: at('external.raw'), dataFileRaw: true })).close()
    const image = await open(path, { flags: 'r+', references: 'allow' })
    await image.write(Buffer.alloc(4 * MIB, 3), { position: 0 })
    await image.truncate(MIB, { shrink: true })
    await image.truncate(2 * MIB)
    await image.close()
    ok(qemuImg('check', path))
    expect(readFileSync(at('external.raw')).equals(Buffer.concat([Buffer.alloc(MIB, 3), Buffer.alloc(MIB)]))).toBe(true)
  })

  it('changes nothing when it is refused', async () => {
    const old = at('old.qcow2')
    ok(qemuImg('create', '-q', '-f', 'qcow2', '-o', 'compat=0.10', old, '8M'))
    ok(qemuImg('snapshot', '-c', 'one', old))
    const broken = at('broken.qcow2')
    ok(qemuImg('create', '-q', '-f', 'qcow2', broken, '8M'))
    ok(qemuImg('bitmap', '--add', broken, 'b'))
    // In use: as a crash leaves it.
    const bytes = readFileSync(broken)
    const live = await open(broken, { flags: 'r+' })
    await live.write(Buffer.alloc(512, 1), { position: 0 })
    await live.datasync()
    const crashed = readFileSync(broken)
    await live.close()
    expect(crashed.equals(bytes)).toBe(false)
    writeFileSync(broken, crashed)
    for (const [path, code] of [
      [old, 'ERR_QCOW2_UNSUPPORTED_FEATURE'],
      [broken, 'ERR_QCOW2_CORRUPT'],
    ] as const) {
      const before = readFileSync(path)
      const image = await open(path, { flags: 'r+' })
      for (const size of [MIB, 16 * MIB]) {
        expect(await failure(() => image.truncate(size, { shrink: true }))).toMatchObject({ code })
      }
      expect(await failure(() => image.truncate(1000))).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
      expect(await failure(() => image.truncate(MIB, { shrink: 1 as never }))).toMatchObject({
        code: 'ERR_QCOW2_INVALID_ARGUMENT',
      })
      await image.close()
      expect(readFileSync(path).equals(before)).toBe(true)
      expect(qemuImg('resize', '--shrink', path, '1M').code).toBe(1)
    }
    const reader = await open(old)
    expect(await failure(() => reader.truncate(16 * MIB))).toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
    await reader.close()
  })
})
