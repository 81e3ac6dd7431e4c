/** Overlays put on top of an image that is in use. */

import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, commit, create, type Image, open } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { describeWithQemu, ok, qemuImg, temporaryFolder } from '../interop/qemu.js'

const root = temporaryFolder()
const MIB = 2 ** 20
const allow = { references: 'allow' } as const
const writing = { flags: 'r+', ...allow } as const

let count = 0
const folder = (): ((name: string) => string) => {
  count += 1
  const path = join(root, String(count))
  mkdirSync(path)
  return name => join(path, name)
}

const fill = (image: Image, byte: number, position: number, length: number) =>
  image.write(Buffer.alloc(length, byte), { position })

const content = async (image: Image): Promise<Buffer> => {
  const bytes = Buffer.alloc(image.virtualSize)
  await image.read(bytes, { position: 0 })
  return bytes
}

const contentOf = async (path: string, format: 'qcow2' | 'raw' = 'qcow2'): Promise<Buffer> => {
  const image = await open(path, { format, ...allow })
  try {
    return await content(image)
  } finally {
    await image.close()
  }
}

const digest = (path: string): string => createHash('sha256').update(readFileSync(path)).digest('hex')

describe('an overlay under an open image', () => {
  it('names the image that was opened, wherever the process works by then', async () => {
    const at = folder()
    const before = process.cwd()
    try {
      process.chdir(at(''))
      mkdirSync('elsewhere')
      const image = await create('base', { size: MIB })
      await fill(image, 1, 0, 512)
      process.chdir('elsewhere')
      await image.createOverlay('one')
      process.chdir('..')
      await image.createOverlay('two')
      await image.close()
    } finally {
      process.chdir(before)
    }
    const image = await open(at('two'), allow)
    expect((await image.chain()).map(info => info.fullBackingFilename)).toEqual([
      at('elsewhere/one'),
      at('base'),
      undefined,
    ])
    await image.close()
    expect((await contentOf(at('two')))[0]).toBe(1)
  })

  it('is refused where its name of the image would lead elsewhere', async () => {
    const at = folder()
    const image = await create(at('base'), { size: MIB })
    await fill(image, 1, 0, 512)
    renameSync(at('base'), at('moved'))
    await expect(image.createOverlay(at('one'))).rejects.toMatchObject({ code: 'ENOENT', path: at('base') })
    writeFileSync(at('base'), 'another file')
    await expect(image.createOverlay(at('one'))).rejects.toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    await image.createOverlay(at('one'), { backingFile: 'moved' })
    await image.close()
    expect((await contentOf(at('one')))[0]).toBe(1)
  })

  it.skipIf(process.platform !== 'linux')('names an image whose name is not UTF-8', async () => {
    const at = folder()
    const path = Buffer.concat([Buffer.from(at('')), Buffer.from([0x66, 0xff])])
    const image = await create(path, { size: MIB })
    await fill(image, 1, 0, 512)
    await image.createOverlay(at('one'))
    expect((await image.info()).backingFilenameBytes).toEqual(path)
    await image.close()
    const again = await open(at('one'), { references: 'allow' })
    expect((await content(again)).subarray(0, 512).every(byte => byte === 1)).toBe(true)
    await again.close()
  })

  it('takes the writes, and leaves the image as it was', async () => {
    const at = folder()
    const image = await create(at('base'), { size: 4 * MIB })
    await fill(image, 1, 0, MIB)
    const first = await content(image)
    await image.createOverlay(at('one'), { create: { clusterSize: 4096 } })
    expect(image).toMatchObject({ depth: 2, clusterSize: 4096, virtualSize: 4 * MIB })
    const sum = digest(at('base'))
    await fill(image, 2, MIB / 2, MIB)
    await image.writeZeroes(0, 65536)
    const second = await content(image)
    expect(second.subarray(65536, MIB / 2).every(byte => byte === 1)).toBe(true)
    await image.createOverlay(at('two'), { backingFile: 'one' })
    await fill(image, 3, 3 * MIB, 100)
    const third = await content(image)
    const infos = await image.chain()
    expect(infos.map(info => [info.filename, info.backingFilename])).toEqual([
      [at('two'), 'one'],
      [at('one'), at('base')],
      [at('base'), undefined],
    ])
    // What is below is for everybody to read, and for nobody to write.
    expect((await contentOf(at('base'))).equals(first)).toBe(true)
    expect((await contentOf(at('one'))).equals(second)).toBe(true)
    for (const name of ['base', 'one', 'two']) {
      await expect(open(at(name), writing)).rejects.toMatchObject({ code: 'ERR_QCOW2_LOCKED' })
    }
    await expect(open(at('two'), allow)).rejects.toMatchObject({ code: 'ERR_QCOW2_LOCKED' })
    await image.truncate(8 * MIB)
    await image.close()
    expect(digest(at('base'))).toBe(sum)
    expect((await contentOf(at('two'))).subarray(0, 4 * MIB).equals(third)).toBe(true)
    for (const name of ['base', 'one', 'two']) expect(await check(at(name))).toMatchObject({ ok: true, leaks: 0 })
    await commit(at('two'), allow)
    expect((await contentOf(at('one'))).subarray(0, 4 * MIB).equals(third)).toBe(true)
  })

  it('of a raw disk', async () => {
    const at = folder()
    writeFileSync(at('raw'), Buffer.alloc(2 * MIB, 7))
    const image = await open(at('raw'), { ...writing, format: 'raw' })
    await fill(image, 1, 100, 1000)
    await image.createOverlay(at('top'))
    const sum = digest(at('raw'))
    await fill(image, 2, 500, 1000)
    const want = await content(image)
    expect(want[100]).toBe(1)
    expect(want[1499]).toBe(2)
    expect(want[1500]).toBe(7)
    await image.close()
    expect(digest(at('raw'))).toBe(sum)
    expect((await contentOf(at('top'))).equals(want)).toBe(true)
  })

  it('leaves snapshots and bitmaps where they are, and can have its own', async () => {
    const at = folder()
    const image = await create(at('base'), { size: MIB })
    await image.bitmaps.add('changes')
    await fill(image, 1, 0, 1000)
    await image.snapshots.create('before')
    await image.createOverlay(at('top'))
    expect(await image.snapshots.list()).toEqual([])
    expect(await image.bitmaps.list()).toEqual([])
    await image.bitmaps.add('more')
    await fill(image, 2, 0, 1000)
    await image.snapshots.create('after')
    await image.close()
    const below = await open(at('base'))
    expect((await below.snapshots.list()).map(({ name }) => name)).toEqual(['before'])
    expect(await below.bitmaps.list()).toMatchObject([{ name: 'changes', flags: ['auto'] }])
    await below.close()
    for (const name of ['base', 'top']) expect(await check(at(name))).toMatchObject({ ok: true })
  })

  it('while requests are in flight: none is lost, and what is below stands still', async () => {
    const at = folder()
    const SECTORS = 2048
    const image = await create(at('layer0'), { size: SECTORS * 512 })
    const last = new Uint16Array(SECTORS)
    const sums: string[] = []
    let turn = 0
    const rounds = Array.from({ length: 8 }, async (_, worker) => {
      // Each worker has its own sectors, so that the last write of each is known.
      for (let round = 1; round <= 60; round++) {
        const writes = Array.from({ length: 16 }, (_, n) => {
          const sector = worker + 8 * ((round * 16 + n * 7) % (SECTORS / 8))
          turn += 1
          const stamp = turn
          last[sector] = stamp
          const bytes = Buffer.alloc(512)
          bytes.writeUInt16LE(stamp, 0)
          bytes.writeUInt16LE(sector, 510)
          return image.write(bytes, { position: sector * 512 })
        })
        await Promise.all(writes)
        if (round % 20 === 0) await image.datasync()
      }
    })
    const overlays = (async () => {
      for (let n = 1; n <= 5; n++) {
        await image.createOverlay(at(`layer${n}`), n % 2 === 0 ? { create: { clusterSize: 512 } } : {})
        sums.push(digest(at(`layer${n - 1}`)))
        const bytes = await content(image)
        for (let sector = 0; sector < SECTORS; sector++) {
          const own = bytes.readUInt16LE(sector * 512 + 510)
          if (own !== 0 && own !== sector) throw new Error(`sector ${sector} has what is sector ${own}'s`)
        }
      }
    })()
    await Promise.all([...rounds, overlays])
    const bytes = await content(image)
    for (const [sector, stamp] of last.entries()) expect(bytes.readUInt16LE(sector * 512)).toBe(stamp)
    await image.close()
    expect((await contentOf(at('layer5'))).equals(bytes)).toBe(true)
    for (const [n, sum] of sums.entries()) expect(digest(at(`layer${n}`))).toBe(sum)
    for (let n = 0; n <= 5; n++) expect(await check(at(`layer${n}`))).toMatchObject({ ok: true, leaks: 0 })
  })

  it('goes along with a clone that is under way', async () => {
    const at = folder()
    const image = await create(at('base'), { size: 16 * MIB })
    await fill(image, 1, 0, 16 * MIB)
    const want = await content(image)
    let later: Promise<unknown> | undefined
    const overwrite = async () => {
      for (let n = 0; n < 16; n++) await fill(image, 2, n * MIB, MIB)
    }
    await image.clone(at('clone'), {
      to: 'raw',
      concurrency: 1,
      onPointInTime: () => {
        later = Promise.all([image.createOverlay(at('top')), overwrite()])
      },
    })
    await later
    await image.close()
    expect(readFileSync(at('clone')).equals(want)).toBe(true)
    expect((await contentOf(at('top'))).every(byte => byte === 2)).toBe(true)
  })

  it('is refused without any harm', async () => {
    const at = folder()
    const image = await create(at('base'), { size: MIB })
    await fill(image, 1, 0, 1000)
    writeFileSync(at('there'), 'something')
    const refused = (name: string, options: object | undefined, expected: object) =>
      expect(image.createOverlay(at(name), options)).rejects.toMatchObject(expected)
    const invalid = (field: string) => ({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field })
    await refused('there', undefined, { code: 'EEXIST' })
    await refused('base', undefined, { code: expect.stringMatching(/EEXIST|INVALID_ARGUMENT/) })
    await refused('no/where', undefined, { code: 'ENOENT' })
    await refused('top', { backingFile: 'there' }, invalid('backingFile'))
    await refused('top', { backingFile: 'nowhere' }, { code: 'ENOENT' })
    await refused('top', { backingFile: 'nbd:x' }, invalid('backingFile'))
    await refused('top', { create: { backingFile: 'base' } }, invalid('backingFile'))
    await refused('top', { create: { dataFile: 'data' } }, invalid('dataFile'))
    await refused('top', { create: { clusterSize: 1000 } }, { code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    await refused('top', { size: MIB }, { code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    await refused('top', { signal: AbortSignal.abort() }, { name: 'AbortError' })
    expect(existsSync(at('top'))).toBe(false)
    await fill(image, 2, 2000, 1000)
    expect(image.depth).toBe(1)
    await image.close()
    await refused('top', undefined, { code: 'ERR_QCOW2_CLOSED' })
    const reading = await open(at('base'))
    await expect(reading.createOverlay(at('top'))).rejects.toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
    const bytes = await content(reading)
    expect([bytes[0], bytes[2500]]).toEqual([1, 2])
    await reading.close()
    expect(existsSync(at('top'))).toBe(false)
    expect(await check(at('base'))).toMatchObject({ ok: true })
  })
})

describeWithQemu('QEMU', () => {
  it('reads what is below while the overlay is written, and all of it afterwards', async () => {
    const at = folder()
    const image = await create(at('base'), { size: 4 * MIB, extendedL2: true })
    await fill(image, 1, 1000, MIB)
    await image.createOverlay(at('top'), { create: { compressionType: 'zstd' } })
    await fill(image, 2, 5000, 70_000)
    ok(qemuImg('check', at('base')))
    expect(JSON.parse(ok(qemuImg('info', '--output=json', at('base'))))['virtual-size']).toBe(4 * MIB)
    expect(qemuImg('info', at('top')).code).toBe(1)
    expect(qemuImg('resize', at('base'), '8M').code).toBe(1)
    const want = await content(image)
    await image.close()
    ok(qemuImg('check', at('top')))
    ok(qemuImg('convert', '-O', 'raw', at('top'), at('raw')))
    expect(readFileSync(at('raw')).equals(want)).toBe(true)
    expect(JSON.parse(ok(qemuImg('info', '--output=json', at('top'))))).toMatchObject({
      'backing-filename': at('base'),
      'backing-filename-format': 'qcow2',
    })
  })
})
