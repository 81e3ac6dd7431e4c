/** Names that are not UTF-8, as hosts with Latin-1 or GBK names have them: every call, and what it says of them. */

import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { pathToFileURL } from 'node:url'
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
  measure,
  open,
  probe,
  type Reference,
  rebase,
} from 'qcow2'
import { describe, expect, it } from 'vitest'
import { describeWithQemu, ok } from '../interop/qemu.js'
import { failure, temporaryFolder } from './fixtures.js'
import { LIBRARY, shell } from './shell.js'

const MIB = 2 ** 20
const latin = (text: string): Buffer => Buffer.from(text, 'latin1')
const root = temporaryFolder()
/** The folder's own name is Latin-1, too. */
const folder = Buffer.concat([Buffer.from(`${root}/`), latin('b\xfccher')])
mkdirSync(folder)
const at = (name: string): Buffer => Buffer.concat([folder, Buffer.from('/'), latin(name)])
const all = { references: 'allow' } as const

async function image(name: string, work: (image: Image) => Promise<void> = async () => undefined): Promise<Buffer> {
  const made = await create(at(name), { size: MIB, overwrite: true })
  await work(made).finally(() => made.close())
  return at(name)
}

const byte = async (path: Buffer | string | URL, options = {}): Promise<number | undefined> => {
  const opened = await open(path, { ...all, ...options })
  const buffer = Buffer.alloc(1)
  await opened.read(buffer, { position: 0 }).finally(() => opened.close())
  return buffer[0]
}

async function collect<T>(items: AsyncIterable<T>): Promise<T[]> {
  const found: T[] = []
  for await (const item of items) found.push(item)
  return found
}

const put = (image: Image, value: number): Promise<unknown> => image.write(Buffer.alloc(65536, value), { position: 0 })

// Other systems refuse such names.
describe.skipIf(process.platform !== 'linux')('names that are not UTF-8', () => {
  it('of snapshots: each is its own, by id and by bytes', async () => {
    const [one, two] = [latin('caf\xe9'), latin('caf\xe8')]
    const path = await image('sn\xe0pshots.qcow2', async made => {
      await put(made, 1)
      expect((await made.snapshots.create(one)).nameBytes).toEqual(one)
      await put(made, 2)
      await made.snapshots.create(two)
      await put(made, 3)
      const listed = await made.snapshots.list()
      expect(listed.map(({ name, nameBytes }) => [name, nameBytes])).toEqual([
        ['caf\uFFFD', one],
        ['caf\uFFFD', two],
      ])
      expect((await made.snapshots.find(two))?.id).toBe('2')
      for (const refused of [
        () => made.snapshots.apply('caf\uFFFD'),
        () => made.snapshots.delete('caf\uFFFD'),
        () => made.snapshots.rename('caf\uFFFD', 'x'),
        () => made.snapshots.find('caf\uFFFD'),
      ]) {
        const error = await failure(refused)
        expect([error.code, error.message]).toEqual([
          'ERR_QCOW2_INVALID_ARGUMENT',
          expect.stringContaining('nameBytes'),
        ])
      }
      await made.snapshots.apply(two)
    })
    expect(await byte(path)).toBe(2)
    expect(await byte(path, { snapshot: one })).toBe(1)
    expect(await byte(path, { snapshot: two })).toBe(2)
    expect((await failure(() => open(path, { snapshot: 'caf\uFFFD' }))).code).toBe('ERR_QCOW2_INVALID_ARGUMENT')
    await convert(path, at('\xe9.raw'), { snapshot: one, to: 'raw' })
    expect(readFileSync(at('\xe9.raw'))[0]).toBe(1)
    expect((await measure(path, { snapshot: one, to: 'raw' })).required).toBe(MIB)
    const again = await open(path, { flags: 'r+' })
    await again.snapshots.delete(one)
    // One is left that is shown so: now the text means it.
    expect((await again.snapshots.find('caf\uFFFD'))?.nameBytes).toEqual(two)
    await again.snapshots.rename('caf\uFFFD', latin('\xfc'))
    expect((await again.snapshots.list()).map(each => each.nameBytes)).toEqual([latin('\xfc')])
    await again.close()
    expect(await byte(path, { snapshot: '\uFFFD' })).toBe(2)
    expect((await failure(() => open(path, { snapshot: 'x\uFFFD' }))).code).toBe('ERR_QCOW2_NO_SNAPSHOT')
  })

  it('of bitmaps: each is its own, by bytes', async () => {
    const [one, two] = [latin('t\xe4glich'), latin('t\xe5glich')]
    const path = await image('bitm\xe4ps.qcow2', async made => {
      const { bitmaps } = made
      await bitmaps.add(one)
      await put(made, 1)
      await bitmaps.add(two)
      expect((await bitmaps.list()).map(each => each.nameBytes)).toEqual([one, two])
      const dirty = async (name: Buffer) => (await collect(bitmaps.extents(name))).length
      expect([await dirty(one), await dirty(two)]).toEqual([1, 0])
      for (const refused of [
        () => bitmaps.remove('t\uFFFDglich'),
        () => bitmaps.clear('t\uFFFDglich'),
        () => bitmaps.merge('t\uFFFDglich', [one]),
        () => bitmaps.merge(one, ['t\uFFFDglich']),
        () => bitmaps.extents('t\uFFFDglich').next(),
      ]) {
        expect((await failure(refused)).code).toBe('ERR_QCOW2_INVALID_ARGUMENT')
      }
      await bitmaps.merge(two, [one])
      await bitmaps.clear(one)
      expect([await dirty(one), await dirty(two)]).toEqual([0, 1])
      await bitmaps.disable(one)
      await bitmaps.enable(one)
      await bitmaps.remove(two)
      expect((await bitmaps.list()).map(each => each.nameBytes)).toEqual([one])
      await bitmaps.clear('t\uFFFDglich')
    })
    await convert(path, at('k\xf6pie.qcow2'), { to: 'qcow2', bitmaps: true })
    const copy = await open(at('k\xf6pie.qcow2'))
    expect((await copy.bitmaps.list()).map(each => each.nameBytes)).toEqual([one])
    await copy.close()
  })

  it('of inconsistent bitmaps that a convert leaves out', async () => {
    const path = await image('kaputt.qcow2', made => made.bitmaps.add(latin('\xe9')))
    // As a crash leaves it: marked in use.
    const bytes = readFileSync(path)
    const entry = bytes.lastIndexOf(latin('\xe9'))
    bytes[entry - 24 + 15] = (bytes[entry - 24 + 15] ?? 0) | 1
    writeFileSync(path, bytes)
    const { skippedBitmaps, skippedBitmapsBytes } = await convert(path, at('ganz.qcow2'), {
      to: 'qcow2',
      bitmaps: { skipBroken: true },
    })
    expect([skippedBitmaps, skippedBitmapsBytes]).toEqual([['\uFFFD'], [latin('\xe9')]])
  })

  it('of backing files and data files', async () => {
    const base = await image('b\xe4se.qcow2', made => put(made, 7).then(() => undefined))
    const top = at('t\xf6p.qcow2')
    const made = await create(top, { backingFile: latin('b\xe4se.qcow2'), backingFormat: 'qcow2', references: 'allow' })
    const [info, below] = await made.chain()
    expect(info).toMatchObject({
      filenameBytes: top,
      backingFilename: 'b\uFFFDse.qcow2',
      backingFilenameBytes: latin('b\xe4se.qcow2'),
      fullBackingFilenameBytes: base,
    })
    expect(below?.filenameBytes).toEqual(base)
    expect((await collect(made.map()))[0]?.filenameBytes).toEqual(base)
    await made.close()
    expect(await byte(top)).toBe(7)

    const asked: Reference[] = []
    const resolver = (reference: Reference) => {
      asked.push(reference)
      return base
    }
    expect(await byte(top, { references: resolver })).toBe(7)
    expect(asked).toEqual([
      {
        kind: 'backing',
        filename: 'b\uFFFDse.qcow2',
        filenameBytes: latin('b\xe4se.qcow2'),
        format: 'qcow2',
        from: top.toString(),
        fromBytes: top,
      },
    ])
    const denied = await failure(() => open(top))
    expect([denied.code, denied.pathBytes]).toEqual(['ERR_QCOW2_REFERENCE_DENIED', top])
    expect(await inspect(pathOf(top))).toMatchObject({ backingFilenameBytes: latin('b\xe4se.qcow2') })

    const data = { size: MIB, dataFile: at('d\xe4ta.raw'), references: 'allow' } as const
    const split = await create(at('spl\xeft.qcow2'), data)
    await put(split, 9)
    expect((await split.info()).formatSpecific?.dataFileBytes).toEqual(at('d\xe4ta.raw'))
    await split.close()
    expect([await byte(at('spl\xeft.qcow2')), readFileSync(at('d\xe4ta.raw'))[0]]).toEqual([9, 9])
    await amend(at('spl\xeft.qcow2'), { dataFile: latin('n\xebu.raw') })
    expect(await inspect(pathOf(at('spl\xeft.qcow2')))).toMatchObject({ dataFileBytes: latin('n\xebu.raw') })
  })

  it('of paths in every job', async () => {
    const one = await image('\xe9ins.qcow2', made => put(made, 5).then(() => undefined))
    expect(await probe(one)).toBe('qcow2')
    expect(await byte(pathOf(one))).toBe(5)
    await convert(one, at('zw\xebi.qcow2'), { to: 'qcow2' })
    expect((await compare(one, at('zw\xebi.qcow2'))).identical).toBe(true)
    expect((await check(one)).filenameBytes).toEqual(one)
    await compact(one)
    const over = await create(at('\xfcber.qcow2'), {
      backingFile: latin('\xe9ins.qcow2'),
      backingFormat: 'qcow2',
      references: 'allow',
    })
    await put(over, 6)
    await over.createOverlay(at('h\xf6her.qcow2'))
    expect((await over.info()).backingFilenameBytes).toEqual(at('\xfcber.qcow2'))
    await over.clone(at('kl\xf6n.raw'), { to: 'raw' })
    await over.close()
    expect(readFileSync(at('kl\xf6n.raw'))[0]).toBe(6)
    expect(await byte(at('h\xf6her.qcow2'))).toBe(6)
    await rebase(at('h\xf6her.qcow2'), latin('\xe9ins.qcow2'), { backingFormat: 'qcow2', ...all })
    expect(await byte(at('h\xf6her.qcow2'))).toBe(6)
    await commit(at('h\xf6her.qcow2'), { ...all, base: one })
    expect(await byte(one)).toBe(6)
  })

  it('of files that errors are about', async () => {
    const missing = at('f\xe9hlt.qcow2')
    const error = await failure(() => open(missing))
    expect(error).toMatchObject({ code: 'ENOENT', path: missing.toString(), pathBytes: missing })
    expect(error.message).not.toMatch(/\p{Surrogate}/u)
    writeFileSync(at('n\xefchts'), 'nothing')
    expect((await failure(() => open(at('n\xefchts')))).pathBytes).toEqual(at('n\xefchts'))
    const exists = await failure(() => create(at('n\xefchts'), { size: MIB }))
    expect([exists.code, exists.pathBytes]).toEqual(['EEXIST', at('n\xefchts')])
    expect('pathBytes' in (await failure(() => open(`${root}/caf\u00e9`)))).toBe(false)
  })

  it('of targets that are sources', async () => {
    const one = await image('qu\xe9lle.qcow2')
    const same = at('./qu\xe9lle.qcow2')
    expect((await failure(() => convert(one, same, { to: 'raw', overwrite: true }))).code).toBe(
      'ERR_QCOW2_INVALID_ARGUMENT',
    )
    const shape = { backingFile: latin('qu\xe9lle.qcow2'), backingFormat: 'qcow2', overwrite: true } as const
    for (const references of ['allow', 'layer'] as const) {
      const error = await failure(() => create(same, { ...shape, size: MIB, references }))
      expect([error.code, error.pathBytes]).toEqual(['ERR_QCOW2_INVALID_ARGUMENT', same])
    }
  })

  it('of a working directory', async () => {
    const script = `
      const q = require(process.env.LIBRARY)
      const run = async () => {
        const image = await q.create('unten.qcow2', { size: 65536 })
        await image.createOverlay('oben.qcow2')
        const { backingFilenameBytes } = await image.info()
        await image.close()
        await (await q.open('oben.qcow2', { references: 'allow' })).close()
        process.stdout.write(backingFilenameBytes)
      }
      run()`
    const { stdout } = shell(folder, 'exec "$QCOW2_NODE" -e "$SCRIPT"', { SCRIPT: script, LIBRARY })
    expect(stdout).toEqual(at('unten.qcow2'))
  })
})

/** The same file as a URL, which escapes bytes. */
function pathOf(path: Buffer): URL {
  const url = pathToFileURL('/')
  url.pathname = path.toString('latin1').replace(/[^ -~]|%/g, c => `%${c.charCodeAt(0).toString(16).padStart(2, '0')}`)
  return url
}

describeWithQemu('names that are not UTF-8, by QEMU', () => {
  it.skipIf(process.platform !== 'linux')('are what this library stores', async () => {
    const path = await image('qemu.qcow2', async made => {
      await made.snapshots.create(latin('caf\xe9'))
      await made.bitmaps.add(latin('t\xe4glich'))
    })
    await (
      await create(at('dar\xfcber.qcow2'), { backingFile: path, backingFormat: 'qcow2', references: 'allow' })
    ).close()
    const info = shell(folder, 'qemu-img info -U qemu.qcow2; qemu-img info dar\xfcber.qcow2').stdout.toString('latin1')
    expect(info).toContain('caf\xe9')
    expect(info).toContain('t\xe4glich')
    expect(info).toContain(`backing file: ${path.toString('latin1')}`)
    ok({
      ...shell(folder, 'qemu-img check -q dar\xfcber.qcow2 && qemu-img check -q qemu.qcow2'),
      stdout: '',
      stderr: '',
    })
  })
})
