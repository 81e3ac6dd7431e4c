/** Version 1 of the format, `qcow`: a source and a backing file everywhere, made, and never changed. QEMU makes and reads the images. */

import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  amend,
  check,
  commit,
  compact,
  compare,
  convert,
  create,
  type Image,
  inspect,
  type MapEntry,
  measure,
  open,
  probe,
  rebase,
} from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { qcow2 } from '../cli/run.js'
import { assertSameBytes, describeWithQemu, ok, qemuImg, qemuIo } from '../interop/qemu.js'
import { failure, pattern, temporaryFolder, writeRaw } from './fixtures.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const SIZE = 5 * 2 ** 20 + 512
const RUNS = [
  [0, 70_000],
  [300_032, 8192],
  [2 ** 21, 100_000],
  [SIZE - 5000, 5000],
] as const

const qemuIoOn = (name: string, ...commands: string[]): string =>
  ok(qemuIo('-f', 'qcow', ...commands.flatMap(command => ['-c', command]), at(name)))

/** The disk as QEMU reads it. */
function qemuBytes(name: string, format: string): Buffer {
  ok(qemuImg('convert', '-f', format, '-O', 'raw', at(name), at('qemu.raw')))
  return readFileSync(at('qemu.raw'))
}

async function bytesOf(image: Image): Promise<Buffer> {
  return (await image.read(Buffer.alloc(image.virtualSize), { position: 0 })).buffer
}

const entries = async (image: Image): Promise<MapEntry[]> => {
  const found: MapEntry[] = []
  for await (const entry of image.map()) found.push(entry)
  return found
}

/** The fields of QEMU's map, whose entries stop at every L2 table: neighbours are merged. */
type Known = Pick<MapEntry, 'start' | 'length' | 'depth' | 'present' | 'zero' | 'data' | 'compressed' | 'offset'>
function qemuMap(name: string, format: string): Known[] {
  const listed = JSON.parse(ok(qemuImg('map', '--output=json', '-f', format, at(name)))) as Known[]
  return listed
}

describeWithQemu('an image of version 1', () => {
  beforeAll(() => {
    writeRaw(at('disk.raw'), SIZE, RUNS)
    ok(qemuImg('convert', '-f', 'raw', '-O', 'qcow', at('disk.raw'), at('plain.qcow')))
    ok(qemuImg('create', '-q', '-f', 'qcow', at('compressed.qcow'), String(SIZE)))
    // One cluster each: QEMU compresses no more at once.
    const clusters = [0, 4096, 8192, 65536, 2 ** 21, 2 ** 21 + 4096]
    qemuIoOn(
      'compressed.qcow',
      ...clusters.map((start, i) => `write -c -P ${i + 1} ${start} 4096`),
      'write -P 9 12288 5000',
    )
    ok(qemuImg('create', '-q', '-f', 'qcow', at('written.qcow'), String(SIZE)))
    qemuIoOn('written.qcow', 'write -P 7 1000 3000', 'write -P 9 2097152 66000', 'write -P 1 0 1')
    ok(qemuImg('convert', '-f', 'raw', '-O', 'qcow2', at('disk.raw'), at('base.qcow2')))
    ok(qemuImg('create', '-q', '-f', 'qcow', '-b', 'base.qcow2', '-F', 'qcow2', at('on-qcow2.qcow')))
    ok(qemuImg('create', '-q', '-f', 'qcow', '-b', 'disk.raw', '-F', 'raw', at('on-raw.qcow')))
    ok(qemuImg('create', '-q', '-f', 'qcow', '-b', 'plain.qcow', '-F', 'qcow', at('on-qcow.qcow')))
    for (const name of ['on-qcow2.qcow', 'on-raw.qcow', 'on-qcow.qcow']) {
      qemuIoOn(name, 'write -P 5 4096 5000', 'write -P 6 3145728 513')
    }
    ok(qemuImg('create', '-q', '-f', 'qcow2', '-b', 'on-qcow.qcow', '-F', 'qcow', at('three.qcow2')))
    ok(qemuIo('-f', 'qcow2', '-c', 'write -P 4 8000 9000', at('three.qcow2')))
  })

  const images = [
    ['plain.qcow', 1],
    ['compressed.qcow', 1],
    ['written.qcow', 1],
    ['on-qcow2.qcow', 2],
    ['on-raw.qcow', 2],
    ['on-qcow.qcow', 2],
  ] as const

  it.each(images)('%s reads as QEMU reads it', async (name, depth) => {
    const expected = qemuBytes(name, 'qcow')
    for (const format of [undefined, 'qcow'] as const) {
      await using image = await open(at(name), { format, references: 'allow' })
      expect([image.virtualSize, image.depth, image.readOnly]).toEqual([SIZE, depth, true])
      assertSameBytes(expected, await bytesOf(image), name)
      const middle = await image.read(Buffer.alloc(70_001), { position: 2 ** 21 - 333 })
      assertSameBytes(expected.subarray(2 ** 21 - 333, 2 ** 21 - 333 + 70_001), middle.buffer, name)
    }
  })

  it.each(images)('%s is a source', async name => {
    const expected = qemuBytes(name, 'qcow')
    const target = at(`${name}.qcow2`)
    const { virtualSize } = await convert(at(name), target, { to: 'qcow2', references: 'allow' })
    expect(virtualSize).toBe(SIZE)
    ok(qemuImg('check', '-q', target))
    ok(qemuImg('compare', '-q', '-f', 'qcow', '-F', 'qcow2', at(name), target))
    await convert(at(name), at(`${name}.raw`), { from: 'qcow', to: 'raw', references: 'allow' })
    assertSameBytes(expected, readFileSync(at(`${name}.raw`)), name)
    expect(await compare(at(name), target, { references: 'allow' })).toMatchObject({ identical: true })
    const theirs = JSON.parse(ok(qemuImg('measure', '--output=json', '-O', 'qcow2', '-f', 'qcow', at(name))))
    const ours = await measure(at(name), { to: 'qcow2', references: 'allow' })
    expect([ours.required, ours.fullyAllocated]).toEqual([theirs.required, theirs['fully-allocated']])
  })

  it.each(images)('%s has the map that QEMU shows', async name => {
    await using image = await open(at(name), { references: 'allow' })
    const ours = (await entries(image)).map(({ filename: _, ...entry }) => entry)
    expect(ours).toEqual(qemuMap(name, 'qcow'))
  })

  it('is known by its magic, and says what it is', async () => {
    expect(await probe(at('plain.qcow'))).toBe('qcow')
    await using image = await open(at('on-qcow2.qcow'), { references: 'allow' })
    const [top, below] = await image.chain()
    const theirs = JSON.parse(ok(qemuImg('info', '--output=json', '-f', 'qcow', at('on-qcow2.qcow'))))
    expect(top).toMatchObject({
      format: 'qcow',
      virtualSize: theirs['virtual-size'],
      clusterSize: theirs['cluster-size'],
      actualSize: theirs['actual-size'],
      backingFilename: 'base.qcow2',
      fullBackingFilename: theirs['full-backing-filename'],
      encrypted: false,
      dirtyFlag: false,
      snapshots: [],
    })
    expect(top).not.toHaveProperty('formatSpecific')
    expect(top).not.toHaveProperty('backingFilenameFormat')
    expect(top?.limits.disk.requestAlignment).toBe(512)
    expect(below?.format).toBe('qcow2')
    expect([image.clusterSize, await image.snapshots.list(), await image.bitmaps.list()]).toEqual([512, [], []])
    await image.datasync()
  })

  it('is inspected', async () => {
    const { size } = { size: SIZE }
    const common = { format: 'qcow', virtualSize: size - (size % 512) }
    const bytes = readFileSync(at('plain.qcow'))
    for (const found of [await inspect(at('plain.qcow')), await inspect(new Uint8Array(bytes.subarray(0, 512)))]) {
      expect(found).toMatchObject({ ...common, clusterSize: 4096, safe: true, findings: [] })
      for (const absent of ['detected', 'version', 'compressionType', 'extendedL2', 'encryption']) {
        expect(found).not.toHaveProperty(absent)
      }
    }
    const named = await inspect(at('on-qcow2.qcow'))
    expect(named).toMatchObject({ ...common, backingFilename: 'base.qcow2', safe: false })
    expect(named.findings.map(({ code }) => code)).toEqual(['BACKING_FILE'])
    const tight = await inspect(at('plain.qcow'), { limits: { maxVirtualSize: 512 } })
    expect(tight.findings.map(({ code }) => code)).toEqual(['LIMIT'])
    bytes[32] = 40
    const broken = await inspect(new Uint8Array(bytes))
    expect(broken).toMatchObject({ format: 'qcow', virtualSize: 0, safe: false })
    expect(broken.findings.map(({ code }) => code)).toEqual(['HEADER_INVALID'])
  })

  it('pulls in nothing unless that is allowed', async () => {
    expect(await failure(() => open(at('on-qcow2.qcow')))).toMatchObject({
      code: 'ERR_QCOW2_REFERENCE_DENIED',
      field: 'backing_file',
    })
    await using alone = await open(at('on-qcow2.qcow'), { references: 'layer' })
    expect((await alone.read(Buffer.alloc(512), { position: 0 })).buffer).toEqual(Buffer.alloc(512))
    const names: string[] = []
    const resolve = ({ filename, format }: { filename: string; format?: string }): string => {
      names.push(`${filename} ${format}`)
      return at('base.qcow2')
    }
    await using image = await open(at('on-qcow2.qcow'), { references: resolve })
    expect([image.depth, names]).toEqual([2, ['base.qcow2 undefined']])
  })

  it('keeps to the limits of the caller', async () => {
    for (const limits of [{ maxVirtualSize: SIZE - 512 }, { maxMetadataBytes: 8 }]) {
      expect(await failure(() => open(at('plain.qcow'), { limits }))).toMatchObject({ code: 'ERR_QCOW2_LIMIT' })
    }
  })

  it('is a backing file, by name and by magic', async () => {
    const expected = qemuBytes('three.qcow2', 'qcow2')
    await using three = await open(at('three.qcow2'), { references: 'allow' })
    expect(three.depth).toBe(3)
    assertSameBytes(expected, await bytesOf(three), 'three.qcow2')
    await using overlay = await create(at('overlay.qcow2'), {
      backingFile: 'plain.qcow',
      backingFormat: 'qcow',
      references: 'allow',
    })
    expect(overlay.virtualSize).toBe(SIZE)
    await overlay.write(pattern(12345, 6789), { position: 12345 })
    await overlay.close()
    expect(JSON.parse(ok(qemuImg('info', '--output=json', at('overlay.qcow2'))))).toMatchObject({
      'backing-filename-format': 'qcow',
    })
    const bytes = readFileSync(at('overlay.qcow2'))
    bytes.writeUInt32BE(0x1234abcd, bytes.indexOf(Buffer.from([0xe2, 0x79, 0x2a, 0xca])))
    writeFileSync(at('unnamed.qcow2'), bytes)
    await using unnamed = await open(at('unnamed.qcow2'), { references: 'allow' })
    expect((await unnamed.chain()).map(({ format }) => format)).toEqual(['qcow2', 'qcow'])
    assertSameBytes(qemuBytes('overlay.qcow2', 'qcow2'), await bytesOf(unnamed), 'unnamed.qcow2')
  })

  it('comes under an image by a rebase, and is the base of a difference', async () => {
    await convert(at('disk.raw'), at('rebased.qcow2'), { from: 'raw', to: 'qcow2' })
    const before = qemuBytes('rebased.qcow2', 'qcow2')
    await rebase(at('rebased.qcow2'), 'written.qcow', { backingFormat: 'qcow', references: 'allow' })
    assertSameBytes(before, qemuBytes('rebased.qcow2', 'qcow2'), 'rebased.qcow2')
    await convert(at('on-qcow.qcow'), at('delta.qcow2'), {
      to: 'qcow2',
      references: 'allow',
      base: at('plain.qcow'),
      create: { backingFile: 'plain.qcow', backingFormat: 'qcow' },
    })
    assertSameBytes(qemuBytes('on-qcow.qcow', 'qcow'), qemuBytes('delta.qcow2', 'qcow2'), 'delta.qcow2')
  })

  it('is cloned while it is open', async () => {
    await using image = await open(at('written.qcow'))
    await image.clone(at('clone.qcow2'), { to: 'qcow2' })
    ok(qemuImg('compare', '-q', '-f', 'qcow', '-F', 'qcow2', at('written.qcow'), at('clone.qcow2')))
  })

  it('is made on a backing file, of another format than its own', async () => {
    const backing = { backingFile: 'base.qcow2', backingFormat: 'qcow2' } as const
    await using made = await create(at('made.qcow'), { format: 'qcow', ...backing })
    expect(await made.info()).toMatchObject({ format: 'qcow', backingFilename: 'base.qcow2', virtualSize: SIZE })
    const how = { to: 'qcow', references: 'allow', base: at('base.qcow2'), create: backing, compress: true } as const
    await convert(at('three.qcow2'), at('delta.qcow'), how)
    assertSameBytes(qemuBytes('three.qcow2', 'qcow2'), qemuBytes('delta.qcow', 'qcow'), 'delta.qcow')
    expect((await measure(at('disk.raw'), { from: 'raw', to: 'qcow' })).required).toBeGreaterThan(186_000)
  })

  const target = at('target')
  const loose = (options: object): never => options as never
  const refused: readonly (readonly [what: string, code: string, message: RegExp, run: () => Promise<unknown>])[] = [
    ['open to write', 'UNSUPPORTED_FEATURE', /writing qcow images/, () => open(at('plain.qcow'), { flags: 'r+' })],
    [
      'open a snapshot',
      'INVALID_ARGUMENT',
      /a qcow image has no snap/,
      () => open(at('plain.qcow'), { snapshot: 'x' }),
    ],
    [
      'measure a snapshot',
      'INVALID_ARGUMENT',
      /measure: a qcow image has no/,
      () => measure(at('plain.qcow'), { from: 'qcow', to: 'raw', snapshot: 'x' }),
    ],
    [
      'encrypt it',
      'INVALID_ARGUMENT',
      /a qcow image has no encrypt/,
      () => create(target, loose({ format: 'qcow', size: 512, encrypt: { format: 'aes', secret: 'x' } })),
    ],
    ['create it of nothing', 'INVALID_ARGUMENT', /too small/, () => create(target, { format: 'qcow', size: 0 })],
    [
      'copy its bitmaps',
      'UNSUPPORTED_FEATURE',
      /a qcow source has no bitmaps/,
      () => convert(at('plain.qcow'), target, { to: 'qcow2', bitmaps: true }),
    ],
    ['check', 'UNSUPPORTED_FEATURE', /checking qcow images/, () => check(at('plain.qcow'))],
    ['repair', 'UNSUPPORTED_FEATURE', /checking qcow images/, () => check(at('plain.qcow'), { repair: 'all' })],
    ['amend', 'UNSUPPORTED_FEATURE', /amending qcow images/, () => amend(at('plain.qcow'), { version: 3 })],
    ['compact', 'UNSUPPORTED_FEATURE', /compacting qcow images/, () => compact(at('plain.qcow'))],
    [
      'commit it',
      'UNSUPPORTED_FEATURE',
      /committing qcow images/,
      () => commit(at('on-qcow.qcow'), { references: 'allow' }),
    ],
    [
      'commit into it',
      'UNSUPPORTED_FEATURE',
      /writing qcow images/,
      () => commit(at('three.qcow2'), { references: 'allow' }),
    ],
    [
      'rebase it',
      'UNSUPPORTED_FEATURE',
      /rebasing qcow images/,
      () => rebase(at('on-qcow.qcow'), null, { references: 'allow' }),
    ],
  ]

  it.each(refused)('does not let itself: %s', async (_, code, message, run) => {
    const before = readFileSync(at('plain.qcow'))
    const error = await failure(run)
    expect(error).toMatchObject({ code: `ERR_QCOW2_${code}` })
    expect(error.message).toMatch(message)
    expect(existsSync(target)).toBe(false)
    expect(readFileSync(at('plain.qcow')).equals(before)).toBe(true)
  })

  it('does not let its handle: check, compact, write', async () => {
    await using image = await open(at('plain.qcow'))
    for (const [run, code, message] of [
      [() => image.check(), 'UNSUPPORTED_FEATURE', /checking qcow images/],
      [() => image.compact({ dryRun: true }), 'UNSUPPORTED_FEATURE', /compacting qcow images/],
      [() => image.bitmaps.clear('x'), 'READ_ONLY', /open for reading only/],
      [() => image.write(Buffer.alloc(512), { position: 0 }), 'READ_ONLY', /open for reading only/],
    ] as const) {
      const error = await failure(run)
      expect(error).toMatchObject({ code: `ERR_QCOW2_${code}` })
      expect(error.message).toMatch(message)
    }
  })

  describe('with legacy AES', () => {
    const SECRET = 'the first sixteen bytes count'
    const object = ['--object', `secret,id=s,data=${SECRET}`]
    const described = (name: string): string => `driver=qcow,encrypt.key-secret=s,file.filename=${at(name)}`

    beforeAll(() => {
      const options = 'encrypt.format=aes,encrypt.key-secret=s'
      ok(qemuImg('convert', ...object, '-f', 'raw', '-O', 'qcow', '-o', options, at('disk.raw'), at('aes.qcow')))
      // Compressed clusters are stored in clear.
      const writes = ['write -c -P 6 8192 4096', 'write -P 3 12290 700', 'write -c -P 8 3145728 4096']
      ok(qemuIo(...object, ...writes.flatMap(each => ['-c', each]), '--image-opts', described('aes.qcow')))
      const top = 'backing_file=aes.qcow,backing_fmt=qcow'
      ok(qemuImg('create', '-q', '-u', '-f', 'qcow2', '-o', top, at('on-aes.qcow2'), String(SIZE)))
    })

    it('opens without its secret, and gives no guest data', async () => {
      expect(await inspect(at('aes.qcow'))).toMatchObject({ format: 'qcow', encryption: 'aes' })
      await using image = await open(at('aes.qcow'))
      expect(await image.info()).toMatchObject({ encrypted: true })
      const locked = { code: 'ERR_QCOW2_BAD_SECRET', field: 'secret', path: at('aes.qcow') }
      expect(await failure(() => image.read(Buffer.alloc(512), { position: 0 }))).toMatchObject(locked)
      expect(await failure(() => image.read(Buffer.alloc(512), { position: 8192 }))).toMatchObject(locked)
      for (const to of ['raw', 'qcow2'] as const) {
        expect(await failure(() => convert(at('aes.qcow'), target, { to }))).toMatchObject(locked)
        expect(existsSync(target)).toBe(false)
      }
      const both = () => compare(at('aes.qcow'), at('disk.raw'), { formatB: 'raw' })
      expect(await failure(both)).toMatchObject(locked)
    })

    it('reads with it, and is converted away from', async () => {
      ok(qemuImg('convert', ...object, '--image-opts', described('aes.qcow'), '-O', 'raw', at('qemu.raw')))
      const expected = readFileSync(at('qemu.raw'))
      await using image = await open(at('aes.qcow'), { secret: SECRET })
      assertSameBytes(expected, await bytesOf(image), 'aes.qcow')
      const middle = await image.read(Buffer.alloc(5001), { position: 11_111 })
      assertSameBytes(expected.subarray(11_111, 16_112), middle.buffer, 'in the middle')
      await using chain = await open(at('on-aes.qcow2'), { references: 'allow', secret: SECRET })
      assertSameBytes(expected, await bytesOf(chain), 'on-aes.qcow2')
      await convert(at('aes.qcow'), target, { to: 'qcow2', secret: SECRET, overwrite: true })
      assertSameBytes(expected, qemuBytes('target', 'qcow2'), 'converted')
      const line = ['convert', ...object, '--image-opts', described('aes.qcow'), '-O', 'raw', at('cli.raw')]
      expect(await qcow2(line, folder)).toMatchObject({ code: 0, stderr: '' })
      assertSameBytes(expected, readFileSync(at('cli.raw')), 'by the command line')
      const encrypt = { secret: 'another', iterTime: 5 }
      await convert(at('aes.qcow'), at('luks.qcow2'), { to: 'qcow2', secret: SECRET, create: { encrypt } })
      const compared = await compare(at('aes.qcow'), at('luks.qcow2'), { secretA: SECRET, secretB: 'another' })
      expect(compared.identical).toBe(true)
    })
  })
})
