/** VMDK: what it is made of is opened by the caller's leave, QEMU reads what is written, and the command line says what qemu-img says. */

import { copyFileSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { convert, create, type Image, inspect, open, probe, type Reference, type VmdkShape } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { failure, pattern, writeRaw } from '../api/fixtures.js'
import { asQemuImg, bothTools, describeWithQemu, workspace } from '../cli/run.js'
import { ok, qemuImg } from '../interop/qemu.js'

const folder = workspace()
const SIZE = 3 * 2 ** 20 + 512
const source = writeRaw(join(folder, 'source.raw'), SIZE, [
  [0, 70_000],
  [2 ** 20, 4096],
  [SIZE - 700, 700],
])
const SUBFORMATS = [
  'monolithicSparse',
  'monolithicFlat',
  'twoGbMaxExtentSparse',
  'twoGbMaxExtentFlat',
  'streamOptimized',
] as const
const at = (name: string): string => join(folder, name)

/** A new image with the disk of the source. */
async function made(name: string, shape: VmdkShape = {}): Promise<string> {
  await convert(source, at(name), { from: 'raw', to: 'vmdk', create: shape, overwrite: true })
  return at(name)
}

async function readFrom(image: Image, position: number, length: number): Promise<Buffer> {
  const buffer = Buffer.alloc(length, 0xff)
  await image.read(buffer, { position })
  return buffer
}

async function bytesOf(path: string, references: 'allow' | 'deny' = 'allow'): Promise<Buffer> {
  await using image = await open(path, { references })
  return readFrom(image, 0, SIZE)
}

describe.each(SUBFORMATS)('%s', subformat => {
  it('is made, read and known', async () => {
    const path = await made(`${subformat}.vmdk`, { subformat })
    expect(await probe(path)).toBe('vmdk')
    expect((await bytesOf(path)).equals(readFileSync(source))).toBe(true)
    await using image = await open(path, { references: 'allow' })
    const info = await image.info()
    expect(info).toMatchObject({
      format: 'vmdk',
      virtualSize: SIZE,
      vmdk: { createType: subformat, parentCid: 0xffff_ffff },
    })
    const { safe, findings } = await inspect(path)
    const named = subformat !== 'monolithicSparse' && subformat !== 'streamOptimized'
    expect([safe, findings.map(({ code }) => code)]).toEqual([!named, named ? ['DATA_FILE'] : []])
  })

  it('is written to, unless it is written once', async () => {
    const path = at(`new-${subformat}.vmdk`)
    const image = await create(path, { format: 'vmdk', size: SIZE, subformat, references: 'allow' })
    const cid = (await image.info()).vmdk?.cid
    if (subformat === 'streamOptimized') {
      expect(await failure(() => image.write(Buffer.alloc(512), { position: 0 }))).toMatchObject({
        code: 'ERR_QCOW2_READ_ONLY',
      })
      await image.close()
      return
    }
    await image.write(pattern(0, 70_000), { position: 1000 })
    await image.close()
    await using again = await open(path, { references: 'allow' })
    expect((await readFrom(again, 1000, 70_000)).equals(pattern(0, 70_000))).toBe(true)
    expect((await again.info()).vmdk?.cid).not.toBe(cid)
  })
})

describe('the files of a disk', () => {
  it('are not opened unless the caller allows it', async () => {
    const path = await made('flat.vmdk', { subformat: 'monolithicFlat' })
    const denied = await failure(() => open(path))
    expect(denied).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED', field: 'extent', path })
    expect(denied.message).toContain("the extent 'flat-flat.vmdk' was not opened")
    await using alone = await open(path, { references: 'layer' })
    expect(await failure(() => readFrom(alone, 0, 512))).toMatchObject({
      code: 'ERR_QCOW2_REFERENCE_DENIED',
      field: 'extent',
    })
    const asked: Reference[] = []
    await using image = await open(path, {
      references: reference => {
        asked.push(reference)
        return at('flat-flat.vmdk')
      },
    })
    expect(asked).toEqual([{ kind: 'extent', filename: 'flat-flat.vmdk', from: path }])
    expect(image.virtualSize).toBe(SIZE)
    expect(await failure(() => open(path, { references: () => null }))).toMatchObject({
      code: 'ERR_QCOW2_REFERENCE_DENIED',
    })
  })

  it('lie in the folder of the image, and are none but its own', async () => {
    mkdirSync(at('inner'))
    const text = readFileSync(await made('plain.vmdk', { subformat: 'monolithicFlat' }), 'utf8')
    const named = (name: string): string => {
      const path = at('inner/named.vmdk')
      writeFileSync(path, text.replace('"plain-flat.vmdk"', `"${name}"`))
      return path
    }
    writeRaw(at('inner/there.raw'), SIZE, [])
    expect((await bytesOf(named('there.raw'))).every(byte => byte === 0)).toBe(true)
    for (const name of [
      '../source.raw',
      '/etc/passwd',
      '/dev/zero',
      'x/../../source.raw',
      'a\\b',
      'file:there.raw',
      '..',
    ]) {
      const error = await failure(() => open(named(name), { references: 'allow' }))
      expect(error, name).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED', field: 'extent' })
    }
    expect(await failure(() => open(named('missing.raw'), { references: 'allow' }))).toMatchObject({
      code: 'ERR_QCOW2_CHAIN',
      message: expect.stringContaining("the extent 'missing.raw' of"),
    })
    // The image itself, also under another name.
    symlinkSync('named.vmdk', at('inner/alias.vmdk'))
    for (const name of ['named.vmdk', 'alias.vmdk']) {
      expect(await failure(() => open(named(name), { references: 'allow' })), name).toMatchObject({
        code: 'ERR_QCOW2_CHAIN',
      })
    }
    // And a file twice.
    const twice = named('there.raw')
    const line = `RW ${SIZE / 512} FLAT "there.raw" 0\n`
    writeFileSync(twice, readFileSync(twice, 'utf8').replace(line, line + line))
    expect(await failure(() => open(twice, { references: 'allow' }))).toMatchObject({ code: 'ERR_QCOW2_CHAIN' })
  })

  it('are all there, or none', async () => {
    await made('whole.vmdk', { subformat: 'twoGbMaxExtentSparse' })
    expect(readdirSync(folder).filter(name => name.startsWith('whole'))).toEqual(['whole-s001.vmdk', 'whole.vmdk'])
    writeFileSync(at('in-the-way-flat.vmdk'), 'mine')
    const options = { from: 'raw', to: 'vmdk', create: { subformat: 'monolithicFlat' } } as const
    expect(await failure(() => convert(source, at('in-the-way.vmdk'), options))).toMatchObject({ code: 'EEXIST' })
    expect(readFileSync(at('in-the-way-flat.vmdk'), 'utf8')).toBe('mine')
    expect(readdirSync(folder)).not.toContain('in-the-way.vmdk')
  })
})

describe('a backing file', () => {
  it('is the one that the image was made on, or none', async () => {
    const base = await made('base.vmdk')
    const top = at('top.vmdk')
    const shape = { format: 'vmdk', backingFile: 'base.vmdk', backingFormat: 'vmdk', references: 'allow' } as const
    const image = await create(top, shape)
    expect(image.virtualSize).toBe(SIZE)
    // What is around a write in its grain stays the backing file's.
    await image.write(Buffer.alloc(1000, 9), { position: 3000 })
    await image.close()
    expect((await bytesOf(top)).equals(Buffer.from(readFileSync(source)).fill(9, 3000, 4000))).toBe(true)
    {
      await using below = await open(base, { flags: 'r+' })
      await below.write(Buffer.alloc(512, 1), { position: 0 })
    }
    const changed = await failure(() => open(top, { references: 'allow' }))
    expect(changed).toMatchObject({ code: 'ERR_QCOW2_CHAIN', field: 'parentCID', path: top })
    const raw = { ...shape, backingFile: 'source.raw', backingFormat: 'raw' } as never
    expect(await failure(() => create(at('no.vmdk'), raw))).toMatchObject({ field: 'backingFormat' })
  })
})

describe('options', () => {
  it('of a preset are what the product takes', async () => {
    for (const preset of ['esxi', 'ovf'] as const) {
      const path = await made(`${preset}.vmdk`, { preset })
      const text = readFileSync(path).subarray(0, 2048)
      expect(text.readUInt32LE(4)).toBe(3)
      expect(text.readBigUInt64LE(56)).toBe(2n ** 64n - 1n)
      expect(text.toString('latin1')).toContain('ddb.virtualHWVersion = "10"')
      expect(text.toString('latin1')).toContain('createType="streamOptimized"')
      expect(text.toString('latin1')).toContain('ddb.adapterType = "lsilogic"')
    }
    await made('other.vmdk', { preset: 'ovf', hardwareVersion: '13' })
    expect(readFileSync(at('other.vmdk'), 'latin1')).toContain('ddb.virtualHWVersion = "13"')
  })

  it.each([
    [{ subformat: 'fixed' }, 'subformat'],
    [{ preset: 'azure' }, 'preset'],
    [{ adapterType: 'nvme' }, 'adapterType'],
    [{ subformat: 'monolithicFlat', zeroedGrain: true }, 'zeroedGrain'],
    [{ compat6: true, hardwareVersion: '7' }, 'compat6'],
    [{ clusterSize: 65536 }, 'clusterSize'],
  ])('%j is refused', async (shape, field) => {
    const error = await failure(() => made('refused.vmdk', shape as never))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field })
  })

  it('compress is for streams alone', async () => {
    const options = { from: 'raw', to: 'vmdk', overwrite: true } as const
    await convert(source, at('c.vmdk'), {
      ...options,
      compress: { level: 9 },
      create: { subformat: 'streamOptimized' },
    })
    expect((await bytesOf(at('c.vmdk'))).equals(readFileSync(source))).toBe(true)
    expect(await failure(() => convert(source, at('c.vmdk'), { ...options, compress: true }))).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
      field: 'compress',
    })
  })
})

describeWithQemu('the command line', () => {
  const { ours, inTurn } = bothTools(folder)
  const withoutCids = (text: string): string => text.replaceAll(/cid"?: \d+/g, 'cid')

  it.each(SUBFORMATS)('%s: info, check and map say what qemu-img says', async subformat => {
    ok(qemuImg('convert', '-f', 'raw', '-O', 'vmdk', '-o', `subformat=${subformat}`, source, at('theirs.vmdk')))
    for (const line of [
      'info theirs.vmdk',
      'info --output=json theirs.vmdk',
      'check theirs.vmdk',
      'check --output=json theirs.vmdk',
      'map --output=json theirs.vmdk',
      'compare -f raw -F vmdk source.raw theirs.vmdk',
    ]) {
      const [mine, theirs] = await inTurn(line)
      expect(mine, line).toEqual(theirs)
    }
  })

  it.each(SUBFORMATS)('%s: create and convert make what qemu-img reads', async subformat => {
    const option = `-o subformat=${subformat}`
    const [mine, theirs] = await inTurn(`create -f vmdk ${option} same.vmdk 5M`)
    expect(mine).toEqual(theirs)
    expect(await ours(`convert -f raw -O vmdk ${option} source.raw mine.vmdk`)).toMatchObject({ code: 0, stderr: '' })
    ok(qemuImg('compare', '-f', 'raw', '-F', 'vmdk', source, at('mine.vmdk')))
    const [info, other] = await inTurn('info mine.vmdk')
    expect(info).toEqual(other)
    ok(qemuImg('check', '-q', '-f', 'vmdk', at('mine.vmdk')))
  })

  it.each([
    'create -f vmdk -o help',
    'create -f vmdk -o subformat=foo x.vmdk 1M',
    'create -f vmdk -o adapter_type=foo x.vmdk 1M',
    'create -f vmdk -o compat6=on,hwversion=5 x.vmdk 1M',
    'create -f vmdk -o zeroed_grain=on,subformat=monolithicFlat x.vmdk 1M',
    'create -f vmdk -b source.raw -F raw x.vmdk',
  ])('%s', async line => {
    const [mine, theirs] = await inTurn(line)
    expect(mine).toEqual(theirs)
  })

  it('overlays: qemu-img reads ours, and we read its own', async () => {
    await made('parent.vmdk')
    const [mine, theirs] = await inTurn('create -f vmdk -b parent.vmdk -F vmdk child.vmdk')
    expect(mine).toEqual(theirs)
    copyFileSync(source, at('changed.raw'))
    expect((await ours('create -q -f vmdk -b parent.vmdk -F vmdk child.vmdk')).code).toBe(0)
    ok(qemuImg('compare', '-f', 'raw', '-F', 'vmdk', source, at('child.vmdk')))
    for (const line of ['info child.vmdk', 'info --backing-chain child.vmdk', 'map --output=json child.vmdk']) {
      const [info, other] = await inTurn(line)
      expect([info.code, withoutCids(info.stdout)], line).toEqual([other.code, withoutCids(other.stdout)])
    }
    const copy = 'convert -f vmdk -O vmdk -B parent.vmdk -F vmdk child.vmdk copy.vmdk'
    expect(await asQemuImg(copy.split(' '), folder)).toMatchObject({ code: 0, stderr: '' })
    ok(qemuImg('compare', '-f', 'raw', '-F', 'vmdk', source, at('copy.vmdk')))
  })

  it('another size, and damage', async () => {
    await made('grows.vmdk')
    expect(await ours('resize -f vmdk grows.vmdk 40M')).toMatchObject({ code: 0 })
    expect(JSON.parse(ok(qemuImg('info', '--output=json', at('grows.vmdk'))))['virtual-size']).toBe(40 * 2 ** 20)
    ok(qemuImg('check', '-q', '-f', 'vmdk', at('grows.vmdk')))
    const bytes = readFileSync(await made('damaged.vmdk'))
    // The first entry of the only table.
    bytes.writeUInt32LE(0xfffffff, 27 * 512)
    writeFileSync(at('damaged.vmdk'), bytes)
    const { code, stderr } = await ours('check damaged.vmdk')
    expect(code).toBe(2)
    expect(stderr).toContain('lies outside the file')
  })
})
