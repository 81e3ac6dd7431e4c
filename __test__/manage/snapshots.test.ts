/** Snapshots and bitmaps through the npm API, managed in turn by this library and by QEMU. */

import { join } from 'node:path'
import { create, type DirtyRange, type Image, open, Qcow2Error } from 'qcow2'
import { expect, it } from 'vitest'
import { failure, temporaryFolder } from '../api/fixtures.js'
import { describeWithQemu, ok, qemuImg } from '../interop/qemu.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20

const fill = async (image: Image, byte: number, position: number, length: number): Promise<void> => {
  await image.write(Buffer.alloc(length, byte), { position })
}

const content = async (image: Image): Promise<Buffer> => {
  const buffer = Buffer.alloc(image.virtualSize)
  await image.read(buffer, { position: 0 })
  return buffer
}

const clean = (path: string): void => {
  ok(qemuImg('check', path))
}

describeWithQemu('snapshots', () => {
  it('live through create, rename, apply and delete', async () => {
    const path = at('life.qcow2')
    await (await create(path, { size: 4 * MIB })).close()
    const image = await open(path, { flags: 'r+' })
    await fill(image, 1, 0, 300_000)
    const one = await image.snapshots.create('one')
    expect(one).toMatchObject({ id: '1', name: 'one', vmStateSize: 0 })
    expect(Math.abs(one.dateSec - Date.now() / 1000)).toBeLessThan(60)
    const first = await content(image)
    await fill(image, 2, 100_000, 2 * MIB)
    await image.snapshots.create('two')
    const second = await content(image)
    await fill(image, 3, 0, 4 * MIB)
    await image.snapshots.rename('2', 'zwei')
    expect((await image.snapshots.list()).map(({ id, name }) => [id, name])).toEqual([
      ['1', 'one'],
      ['2', 'zwei'],
    ])
    await image.snapshots.apply('one')
    expect((await content(image)).equals(first)).toBe(true)
    await image.snapshots.delete('1')
    expect((await image.snapshots.create('three')).id).toBe('3')
    await image.close()
    clean(path)
    const view = await open(path, { snapshot: 'zwei' })
    expect((await content(view)).equals(second)).toBe(true)
    await view.close()
    expect(ok(qemuImg('snapshot', '-l', path))).toMatch(/zwei[\s\S]*three/)
    ok(qemuImg('snapshot', '-a', 'zwei', path))
    ok(qemuImg('snapshot', '-d', 'three', path))
    const again = await open(path, { flags: 'r+' })
    expect((await content(again)).equals(second)).toBe(true)
    await again.snapshots.delete('zwei')
    expect(await again.snapshots.list()).toEqual([])
    await again.close()
    clean(path)
  })

  it('are made while writes are in flight, of one moment', async () => {
    const path = at('live.qcow2')
    await (await create(path, { size: 64 * MIB })).close()
    const image = await open(path, { flags: 'r+' })
    const writes = Array.from({ length: 200 }, (_, i) => fill(image, (i % 250) + 1, i * 300_000, 150_000))
    await image.snapshots.create('in flight')
    await Promise.all(writes)
    const now = await content(image)
    await image.close()
    clean(path)
    const view = await open(path, { snapshot: 'in flight' })
    const then = await content(view)
    await view.close()
    for (let i = 0; i < 200; i++) {
      const place = i * 300_000
      expect([0, (i % 250) + 1]).toContain(then[place])
      expect(now[place]).toBe((i % 250) + 1)
    }
  })

  it('take no memory for the clusters that they share', async () => {
    const path = at('many.qcow2')
    await (await create(path, { size: 32 * MIB, clusterSize: 512, preallocation: 'metadata' })).close()
    await using image = await open(path, { flags: 'r+', limits: { maxMemory: MIB } })
    for (const name of ['one', 'two', 'three']) await image.snapshots.create(name)
    expect(await image.snapshots.list()).toHaveLength(3)
    await image.close()
    clean(path)
  })

  it('change nothing when they are refused', async () => {
    const path = at('refused.qcow2')
    await (await create(path, { size: MIB, refcountBits: 1 })).close()
    const image = await open(path, { flags: 'r+' })
    await fill(image, 1, 0, MIB)
    expect(await failure(() => image.snapshots.create('one'))).toMatchObject({ code: 'ERR_QCOW2_LIMIT' })
    expect(await failure(() => image.snapshots.create(''))).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    const { snapshots } = image
    for (const call of [
      () => snapshots.apply('none'),
      () => snapshots.delete('none'),
      () => snapshots.rename('none', 'x'),
    ]) {
      expect(await failure(call)).toMatchObject({ code: 'ERR_QCOW2_NO_SNAPSHOT' })
    }
    await fill(image, 2, 0, MIB)
    await image.close()
    expect(await failure(() => image.snapshots.list())).toMatchObject({ code: 'ERR_QCOW2_CLOSED' })
    clean(path)
    const reader = await open(path)
    expect(await failure(() => reader.snapshots.create('one'))).toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
    expect(await reader.snapshots.list()).toEqual([])
    await reader.close()
  })
})

describeWithQemu('bitmaps', () => {
  const extents = async (image: Image, name: string): Promise<DirtyRange[]> => {
    const found: DirtyRange[] = []
    for await (const range of image.bitmaps.extents(name)) found.push(range)
    return found
  }

  it('make an incremental backup: full, then deltas, then restored', async () => {
    const path = at('disk.qcow2')
    await (await create(path, { size: 32 * MIB })).close()
    const disk = await open(path, { flags: 'r+' })
    await fill(disk, 1, 0, 10 * MIB)
    // The full backup, and from then on what changes.
    await disk.bitmaps.add('backup', { granularity: 65536 })
    const restored = await content(disk)
    const states: Buffer[] = []
    const deltas: { start: number; data: Buffer }[][] = []
    for (let round = 0; round < 3; round++) {
      await fill(disk, 50 + round, (round * 7 + 1) * MIB + 1234, 200_000)
      await disk.writeZeroes((round * 9 + 3) * MIB, MIB)
      const delta: { start: number; data: Buffer }[] = []
      for (const { start, length } of await extents(disk, 'backup')) {
        const data = Buffer.alloc(length)
        await disk.read(data, { position: start })
        delta.push({ start, data })
      }
      await disk.bitmaps.clear('backup')
      deltas.push(delta)
      states.push(await content(disk))
    }
    await disk.close()
    clean(path)
    for (const [round, delta] of deltas.entries()) {
      expect(delta.reduce((sum, { data }) => sum + data.length, 0)).toBeLessThan(4 * MIB)
      for (const { start, data } of delta) data.copy(restored, start)
      expect(restored.equals(states[round] as Buffer)).toBe(true)
    }
  })

  it('are managed by both tools', async () => {
    const path = at('bitmaps.qcow2')
    await (await create(path, { size: 16 * MIB })).close()
    ok(qemuImg('bitmap', '--add', '-g', '32k', path, 'theirs'))
    const image = await open(path, { flags: 'r+' })
    await image.bitmaps.add('ours', { enabled: false })
    expect(await image.bitmaps.list()).toEqual([
      { name: 'theirs', granularity: 32768, flags: ['auto'] },
      { name: 'ours', granularity: 65536, flags: [] },
    ])
    await fill(image, 1, 5 * MIB, 10)
    expect(await extents(image, 'theirs')).toEqual([{ start: 5 * MIB, length: 32768 }])
    expect(await extents(image, 'ours')).toEqual([])
    await image.bitmaps.merge('ours', ['theirs'])
    await image.bitmaps.enable('ours')
    await fill(image, 1, 7 * MIB, 10)
    await image.bitmaps.disable('ours')
    await fill(image, 1, 9 * MIB, 10)
    expect(await extents(image, 'ours')).toEqual([
      { start: 5 * MIB, length: 65536 },
      { start: 7 * MIB, length: 65536 },
    ])
    await (await create(at('other.qcow2'), { size: 16 * MIB })).close()
    const other = await open(at('other.qcow2'), { flags: 'r+' })
    await other.bitmaps.add('sum')
    await other.bitmaps.merge('sum', [{ bitmaps: image.bitmaps, name: 'theirs' }])
    expect((await extents(other, 'sum')).length).toBe(3)
    await other.close()
    await image.bitmaps.remove('theirs')
    expect(await failure(() => image.bitmaps.remove('theirs'))).toMatchObject({ code: 'ERR_QCOW2_NO_BITMAP' })
    await image.close()
    clean(path)
    ok(qemuImg('bitmap', '--clear', path, 'ours'))
    ok(qemuImg('bitmap', '--remove', path, 'ours'))
    clean(path)
  })

  it('refuse bad requests', async () => {
    const path = at('bad.qcow2')
    await (await create(path, { size: MIB })).close()
    const image = await open(path, { flags: 'r+' })
    await image.bitmaps.add('a')
    for (const call of [
      () => image.bitmaps.add('a'),
      () => image.bitmaps.add(''),
      () => image.bitmaps.add('b', { granularity: 1000 }),
      () => image.bitmaps.add('b', { granularity: 256 }),
      () => image.bitmaps.merge('a', 'a' as unknown as string[]),
      () => image.bitmaps.merge('a', [{} as never]),
    ]) {
      const error = await failure(call)
      expect(error).toBeInstanceOf(Qcow2Error)
      expect(error).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    }
    await image.close()
    const reader = await open(path)
    expect(await failure(() => reader.bitmaps.add('b'))).toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
    await reader.close()
  })
})
