/** commit and rebase of backing chains, from Node. */

import { mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync } from 'node:fs'
import { open as openFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { check, commit, compare, convert, create, type DirtyRange, open, type Progress, rebase } from 'qcow2'
import { afterAll, beforeEach, describe, expect, it } from 'vitest'

const root = mkdtempSync(join(tmpdir(), 'qcow2-chain-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))

const MIB = 2 ** 20
const allow = { references: 'allow' } as const
let folder: string
let count = 0
const at = (name: string) => join(folder, name)

/** An image with these bytes at these places, in MiB. */
async function image(name: string, size: number, backing: string | undefined, writes: readonly [number, number][]) {
  const below = backing === undefined ? {} : { backingFile: backing, backingFormat: 'qcow2' as const }
  const made = await create(at(name), { size: size * MIB, ...below, ...allow })
  for (const [position, byte] of writes) await made.write(Buffer.alloc(MIB / 2, byte), { position: position * MIB })
  await made.close()
}

/** base <- mid <- top, and a raw copy of what the top reads as. */
beforeEach(async () => {
  count += 1
  folder = join(root, String(count))
  mkdirSync(folder)
  await image('base', 8, undefined, [
    [0, 1],
    [1, 1],
    [4, 1],
  ])
  await image('mid', 6, 'base', [
    [1, 2],
    [2, 2],
  ])
  await image('top', 10, 'mid', [
    [2, 3],
    [3, 3],
    [9, 3],
  ])
  const top = await open(at('top'), { flags: 'r+', ...allow })
  await top.writeZeroes(0, 65536)
  await top.close()
  await convert(at('top'), at('want'), { to: 'raw', ...allow })
})

async function expectTop(name = 'top') {
  expect(await compare(at(name), at('want'), { formatB: 'raw', ...allow })).toMatchObject({ identical: true })
  expect(await check(at(name))).toMatchObject({ ok: true })
}

const allocated = async (name: string): Promise<number> => {
  const opened = await open(at(name), { references: 'layer' })
  try {
    let bytes = 0
    for await (const { depth, present, length } of opened.map()) if (present && depth === 0) bytes += length
    return bytes
  } finally {
    await opened.close()
  }
}

describe('commit', () => {
  it('moves all into the backing file, which grows, and empties the image', async () => {
    const seen: Progress[] = []
    await commit(at('top'), { ...allow, onProgress: progress => seen.push(progress) })
    await expectTop()
    await expectTop('mid')
    expect(await allocated('top')).toBe(0)
    expect(seen.at(-1)).toMatchObject({ phase: 'commit', current: 10 * MIB, total: 10 * MIB })
  })

  it('leaves the image with drop, and with a deeper base', async () => {
    const before = readFileSync(at('top'))
    await commit(at('top'), { ...allow, drop: true })
    await expectTop('mid')
    await commit(at('top'), { ...allow, base: at('base') })
    await expectTop('base')
    expect(readFileSync(at('top')).equals(before)).toBe(true)
  })

  it('hides what is behind the end of a layer between', async () => {
    // The base has data at 6 MiB, where mid has ended and the top has nothing.
    const base = await open(at('base'), { flags: 'r+' })
    await base.write(Buffer.alloc(MIB, 7), { position: 6 * MIB })
    await base.close()
    await expectTop()
    await commit(at('top'), { ...allow, base: at('base') })
    await expectTop('base')
  })

  it('keeps the bitmaps of the base current', async () => {
    const base = await open(at('mid'), { flags: 'r+', ...allow })
    await base.bitmaps.add('backup', { granularity: 65536 })
    await base.close()
    await commit(at('top'), allow)
    const after = await open(at('mid'), allow)
    const dirty: DirtyRange[] = []
    for await (const range of after.bitmaps.extents('backup')) dirty.push(range)
    expect(dirty).toContainEqual({ start: 9 * MIB, length: MIB / 2 })
    expect(dirty).toContainEqual({ start: 2 * MIB, length: MIB / 2 })
    await after.close()
  })

  it('respects the snapshots of the image', async () => {
    const top = await open(at('top'), { flags: 'r+', ...allow })
    const { id } = await top.snapshots.create('one')
    await top.write(Buffer.alloc(MIB, 9), { position: 2 * MIB })
    await top.close()
    await commit(at('top'), allow)
    expect(await check(at('top'))).toMatchObject({ ok: true })
    const view = await open(at('top'), { snapshot: id, ...allow })
    const bytes = Buffer.alloc(MIB / 2)
    await view.read(bytes, { position: 2 * MIB })
    expect(bytes.every(byte => byte === 3)).toBe(true)
    await view.close()
  })

  it('can be interrupted and run again', async () => {
    const abort = new AbortController()
    // A byte a second: nothing comes after the first chunk.
    const running = commit(at('top'), { ...allow, rate: 1, signal: abort.signal, progressInterval: 5, onProgress })
    function onProgress({ current }: Progress): void {
      if (current > 0) abort.abort()
    }
    await expect(running).rejects.toMatchObject({ name: 'AbortError' })
    await expectTop()
    await commit(at('top'), allow)
    await expectTop()
    await expectTop('mid')
  })

  it('can be told how fast it may go', async () => {
    const begin = performance.now()
    await commit(at('top'), { ...allow, rate: 4 * MIB, concurrency: 1 })
    // 1.5 MiB, of which the last chunk does not wait.
    expect(performance.now() - begin).toBeGreaterThan(200)
    await expectTop()
  })

  it('refuses without changing anything', async () => {
    const names = ['base', 'mid', 'top']
    const files = () => names.map(name => readFileSync(at(name)))
    const before = files()
    await image('other', 1, undefined, [])
    const refused = async (options: Parameters<typeof commit>[1], expected: object, name = 'top') => {
      await expect(commit(at(name), options)).rejects.toMatchObject(expected)
      expect(files().every((bytes, index) => before[index]?.equals(bytes))).toBe(true)
    }
    await refused(undefined, { code: 'ERR_QCOW2_REFERENCE_DENIED' })
    await refused({ references: 'layer' }, { code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'references' })
    await refused(allow, { code: 'ERR_QCOW2_CHAIN', field: 'backing_file' }, 'base')
    await refused({ ...allow, base: at('other') }, { code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'base' })
    await refused({ ...allow, base: at('top') }, { code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'base' })
    await refused({ ...allow, base: at('nowhere') }, { code: 'ENOENT' })
    await refused({ ...allow, base: at('base'), drop: false }, { code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'drop' })
    await refused({ ...allow, signal: AbortSignal.abort() }, { name: 'AbortError' })
    await refused({ ...allow, force: true } as object, { code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    for (const name of names) {
      const busy = await open(at(name), allow)
      // What is only read may be read by others, too.
      if (name !== 'base') await refused(allow, { code: 'ERR_QCOW2_LOCKED', path: at(name) })
      await busy.close()
    }
    const handle = await openFile(at('top'), 'r')
    await expect(commit(handle, { references: () => at('mid') })).rejects.toMatchObject({
      code: expect.stringMatching(/READ_ONLY|EBADF/),
    })
    await handle.close()
    expect(files().every((bytes, index) => before[index]?.equals(bytes))).toBe(true)
    renameSync(at('mid'), at('moved'))
    await expect(commit(at('top'), allow)).rejects.toMatchObject({ code: 'ERR_QCOW2_CHAIN' })
    expect(readFileSync(at('top')).equals(before[2] ?? Buffer.alloc(0))).toBe(true)
  })
})

describe('rebase', () => {
  const qcow2 = { backingFormat: 'qcow2', ...allow } as const
  const backingOf = async (name: string) => {
    const opened = await open(at(name), { references: 'layer' })
    const { backingFilename, backingFilenameFormat } = await opened.info()
    await opened.close()
    return { backingFilename, backingFilenameFormat }
  }

  it('onto nothing, a layer below, another image and a raw disk', async () => {
    await rebase(at('top'), 'base', qcow2)
    expect(await backingOf('top')).toEqual({ backingFilename: 'base', backingFilenameFormat: 'qcow2' })
    await expectTop()
    await image('other', 3, undefined, [
      [0, 1],
      [2, 4],
    ])
    await rebase(at('top'), 'other', { ...qcow2, compress: true })
    await expectTop()
    await convert(at('base'), at('raw'), { to: 'raw' })
    await rebase(at('top'), at('raw'), { ...allow, backingFormat: 'raw' })
    await expectTop()
    await rebase(at('top'), null, allow)
    expect(await backingOf('top')).toEqual({ backingFilename: undefined, backingFilenameFormat: undefined })
    await expectTop()
    expect(await compare(at('top'), at('want'), { formatB: 'raw' })).toMatchObject({ identical: true })
  })

  it('copies only what differs', async () => {
    const before = await allocated('top')
    await convert(at('mid'), at('flat'), { to: 'qcow2', ...allow })
    const seen: Progress[] = []
    await rebase(at('top'), 'flat', { ...qcow2, onProgress: progress => seen.push(progress) })
    await expectTop()
    expect(await allocated('top')).toBe(before)
    expect(seen.at(-1)).toMatchObject({ phase: 'rebase', current: 10 * MIB, total: 10 * MIB })
  })

  it('follows a relative name from the directory of the image, or asks the resolver', async () => {
    const asked: unknown[] = []
    const references = ({ filename, from }: { filename: string; from: string }) => {
      asked.push([filename, from])
      return at(filename === 'elsewhere' ? 'base' : filename)
    }
    await rebase(at('top'), 'elsewhere', { backingFormat: 'qcow2', references })
    expect(asked[0]).toEqual(['elsewhere', at('top')])
    expect(await compare(at('top'), at('want'), { formatB: 'raw', references })).toMatchObject({ identical: true })
  })

  it('only changes the name when that is acknowledged', async () => {
    renameSync(at('mid'), at('moved'))
    await expect(rebase(at('top'), 'moved', { ...qcow2, unsafe: true })).rejects.toMatchObject({
      code: 'ERR_QCOW2_DATA_LOSS',
    })
    expect(await backingOf('top')).toMatchObject({ backingFilename: 'mid' })
    await rebase(at('top'), 'moved', { ...qcow2, unsafe: true, acknowledgeDataLoss: true })
    await expectTop()
    await rebase(at('top'), 'not there', { backingFormat: 'raw', unsafe: true, acknowledgeDataLoss: true })
    expect(await backingOf('top')).toEqual({ backingFilename: 'not there', backingFilenameFormat: 'raw' })
    await rebase(at('top'), null, { unsafe: true, acknowledgeDataLoss: true })
    expect(await backingOf('top')).toMatchObject({ backingFilename: undefined })
  })

  it('can be interrupted and run again', async () => {
    await image('other', 10, undefined, [
      [0, 5],
      [5, 5],
    ])
    const abort = new AbortController()
    const references = ({ filename }: { filename: string }) => {
      if (filename === 'base') abort.abort()
      return at(filename)
    }
    const options = { backingFormat: 'qcow2', references, signal: abort.signal } as const
    await expect(rebase(at('top'), 'other', options)).rejects.toMatchObject({ name: 'AbortError' })
    await expectTop()
    await rebase(at('top'), 'other', qcow2)
    await expectTop()
  })

  it('refuses without changing anything', async () => {
    const before = readFileSync(at('top'))
    const refused = async (backing: unknown, options: object | undefined, expected: object) => {
      await expect(rebase(at('top'), backing as string, options)).rejects.toMatchObject(expected)
      expect(readFileSync(at('top')).equals(before)).toBe(true)
    }
    const invalid = (field: string) => ({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field })
    await refused('base', { backingFormat: 'qcow2' }, { code: 'ERR_QCOW2_REFERENCE_DENIED' })
    await refused('base', allow, invalid('backingFormat'))
    await refused('', qcow2, invalid('backing'))
    await refused(7, qcow2, invalid('backing'))
    await refused(null, qcow2, invalid('backingFormat'))
    await refused('base', { ...qcow2, references: 'layer' }, invalid('references'))
    await refused('base', { ...qcow2, compress: true, unsafe: true, acknowledgeDataLoss: true }, invalid('compress'))
    await refused('nowhere', qcow2, { code: 'ENOENT' })
    await refused('json:{}', qcow2, { code: 'ERR_QCOW2_REFERENCE_DENIED' })
    await refused('want', qcow2, { code: 'ERR_QCOW2_INVALID_HEADER' })
    const unsafe = { ...qcow2, unsafe: true, acknowledgeDataLoss: true }
    await refused('n'.repeat(1024), unsafe, invalid('backing'))
    await image('above', 10, 'top', [])
    for (const options of [qcow2, unsafe]) {
      await refused('top', options, { code: 'ERR_QCOW2_CHAIN', message: expect.stringContaining('contain itself') })
      await refused('above', options, { code: 'ERR_QCOW2_CHAIN', message: expect.stringContaining('contain itself') })
    }
    await refused('base', { ...qcow2, signal: AbortSignal.abort() }, { name: 'AbortError' })
    const busy = await open(at('top'), allow)
    await refused('base', qcow2, { code: 'ERR_QCOW2_LOCKED' })
    await refused('base', unsafe, { code: 'ERR_QCOW2_LOCKED' })
    await busy.close()
    await expect(rebase(at('want'), null, allow)).rejects.toMatchObject({ code: 'ERR_QCOW2_INVALID_HEADER' })
  })
})
