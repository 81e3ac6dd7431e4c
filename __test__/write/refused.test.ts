/** What is refused before anything changes: by error code, with the file as it was. */

import { createHash } from 'node:crypto'
import { copyFileSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import { create, type Image, type OpenOptions, open, type Qcow2Error } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { failure, pattern, temporaryFolder, writeRaw } from '../api/fixtures.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const SIZE = 2 ** 20
let sound = ''

beforeAll(async () => {
  sound = at('sound.qcow2')
  await using image = await create(sound, { size: SIZE })
  await image.write(pattern(0, 200_000), { position: 0 })
})

const digest = (path: string): string => createHash('sha256').update(readFileSync(path)).digest('hex')

let copies = 0
/** A copy of the sound image, changed. */
function changed(change: (header: Buffer) => void): string {
  const path = at(`changed-${copies++}.qcow2`)
  copyFileSync(sound, path)
  const bytes = readFileSync(path)
  change(bytes)
  writeFileSync(path, bytes)
  return path
}

const INCOMPATIBLE = 72
const AUTOCLEAR = 88

describe('opening for writing', () => {
  const cases: [string, (header: Buffer) => void, string][] = [
    ['the corrupt bit', h => h.writeBigUInt64BE(2n, INCOMPATIBLE), 'ERR_QCOW2_CORRUPT'],
    ['an unknown incompatible bit', h => h.writeBigUInt64BE(1n << 40n, INCOMPATIBLE), 'ERR_QCOW2_UNSUPPORTED_FEATURE'],
    ['no refcount table', h => h.writeUInt32BE(0, 56), 'ERR_QCOW2_CORRUPT'],
    ['a refcount table outside the file', h => h.writeBigUInt64BE(1n << 40n, 48), 'ERR_QCOW2_CORRUPT'],
  ]
  it.each(cases)('%s', async (_, change, code) => {
    const path = changed(change)
    const before = digest(path)
    const error = await failure(() => open(path, { flags: 'r+' }))
    expect([error.code, error.path]).toEqual([code, path])
    expect(digest(path)).toBe(before)
    // Nothing stays open, and nothing locked.
    expect((await failure(() => open(path, { flags: 'r+' }))).code).toBe(code)
  })

  it('an image that was not closed cleanly is repaired, as QEMU does it', async () => {
    const path = changed(h => {
      h.writeBigUInt64BE(1n, INCOMPATIBLE)
      // The first refcount block is behind the table: what it says about the last cluster is wrong now.
      const block = Number(h.readBigUInt64BE(Number(h.readBigUInt64BE(48))))
      h.writeUInt16BE(7, block + 2 * (Math.floor(h.length / 65536) - 1))
    })
    {
      await using reading = await open(path)
      expect((await reading.check()).ok).toBe(false)
    }
    await using image = await open(path, { flags: 'r+' })
    expect((await image.check()).ok).toBe(true)
    expect(readFileSync(path).readBigUInt64BE(INCOMPATIBLE)).toBe(0n)
    const { buffer } = await image.read(Buffer.alloc(100), { position: 0 })
    expect(buffer).toEqual(pattern(0, 100))
  })

  it('one that was not closed cleanly is not touched before all of it is accepted', async () => {
    const raw = writeRaw(at('unclean.raw'), SIZE, [])
    const path = at('unclean.qcow2')
    await (await create(path, { backingFile: raw, backingFormat: 'raw' })).close()
    const bytes = readFileSync(path)
    bytes.writeBigUInt64BE(1n, INCOMPATIBLE)
    writeFileSync(path, bytes)
    for (const references of [undefined, 'layer'] as const) {
      expect((await failure(() => open(path, { flags: 'r+', references }))).code).toBe('ERR_QCOW2_REFERENCE_DENIED')
      expect(readFileSync(path).equals(bytes)).toBe(true)
    }
    await (await open(path, { flags: 'r+', references: 'allow' })).close()
    expect(readFileSync(path).readBigUInt64BE(INCOMPATIBLE)).toBe(0n)
  })

  it('an image that is damaged so can be read', async () => {
    await using image = await open(changed(h => h.writeBigUInt64BE(3n, INCOMPATIBLE)))
    const { buffer } = await image.read(Buffer.alloc(100), { position: 0 })
    expect(buffer).toEqual(pattern(0, 100))
  })

  it('an unknown autoclear bit is cleared by the first change, not by opening', async () => {
    const path = changed(h => h.writeBigUInt64BE(1n << 50n, AUTOCLEAR))
    const before = digest(path)
    const image = await open(path, { flags: 'r+' })
    await image.read(Buffer.alloc(10), { position: 0 })
    await image.datasync()
    await image.close()
    expect(digest(path)).toBe(before)
    await using again = await open(path, { flags: 'r+' })
    await again.write(Buffer.alloc(1), { position: 0 })
    expect(readFileSync(path).readBigUInt64BE(AUTOCLEAR)).toBe(0n)
  })

  const combinations: [string, OpenOptions, string][] = [
    ['a snapshot', { snapshot: '1' }, 'ERR_QCOW2_INVALID_ARGUMENT'],
    ['forceShare', { forceShare: true }, 'ERR_QCOW2_INVALID_ARGUMENT'],
  ]
  it.each(combinations)('with %s', async (_, options, code) => {
    expect((await failure(() => open(sound, { flags: 'r+', ...options }))).code).toBe(code)
  })

  it.each(['discard', 'detectZeroes'] as const)('%s is for writing only', async name => {
    const error = await failure(() => open(sound, { [name]: 'unmap' }))
    expect([error.code, error.message]).toEqual(['ERR_QCOW2_INVALID_ARGUMENT', expect.stringContaining("'r+'")])
  })

  it.each([
    ['flags', 'w+'],
    ['cache', 'writeBack'],
    ['locking', true],
    ['discard', 'on'],
    ['detectZeroes', true],
    ['lazyRefcounts', 'on'],
  ])('%s: %j', async (name, value) => {
    const error = await failure(() => open(sound, { flags: 'r+', [name]: value } as OpenOptions))
    expect([error.code, error.field]).toEqual(['ERR_QCOW2_INVALID_ARGUMENT', expect.stringContaining(name)])
  })

  it('a layer without its backing file, or without its data file', async () => {
    const raw = writeRaw(at('base.raw'), SIZE, [])
    const overlay = at('overlay.qcow2')
    await (await create(overlay, { backingFile: raw, backingFormat: 'raw' })).close()
    const withData = at('with-data.qcow2')
    await (await create(withData, { size: SIZE, dataFile: at('data') })).close()
    for (const path of [overlay, withData]) {
      const error = await failure(() => open(path, { flags: 'r+', references: 'layer' }))
      expect([error.code, error.path]).toEqual(['ERR_QCOW2_REFERENCE_DENIED', path])
      await using layer = await open(path, { references: 'layer' })
      expect(layer.readOnly).toBe(true)
    }
    await using recorded = await create(at('recorded.qcow2'), {
      ...{ size: SIZE, backingFile: 'absent', backingFormat: 'raw', references: 'layer' },
    })
    expect(recorded.readOnly).toBe(true)
  })

  it.skipIf(process.getuid?.() === 0)('a file that may not be written', async () => {
    const path = changed(() => {})
    const { chmodSync } = await import('node:fs')
    chmodSync(path, 0o444)
    expect((await failure(() => open(path, { flags: 'r+' }))).code).toBe('EACCES')
  })
})

/** Every method that changes an image. */
const writers: Record<string, (image: Image) => Promise<unknown>> = {
  write: image => image.write(Buffer.alloc(10, 1), { position: 512 }),
  'compressed write': image => image.write(Buffer.alloc(65536, 1), { position: 65536, compressed: true }),
  writev: image => image.writev([Buffer.alloc(3, 1), Buffer.alloc(5, 2)], 512),
  writeZeroes: image => image.writeZeroes(0, 65536),
  discard: image => image.discard(0, 65536),
  truncate: image => image.truncate(2 * SIZE),
  createWriteStream: image =>
    new Promise((resolve, reject) => {
      const stream = image.createWriteStream({ start: 512 })
      stream.on('error', reject).on('finish', resolve).end(Buffer.alloc(100, 3))
    }),
}

/** A request that is under way: its promise is made, and cannot have settled yet. */
const busy = (image: Image): Promise<unknown> => image.write(Buffer.alloc(SIZE / 2, 8), { position: SIZE / 2 })

describe.each(Object.entries(writers))('%s', (_, call) => {
  const copy = (): string => changed(() => {})

  it('works on an image that is open for writing, also while others are under way', async () => {
    await using image = await open(copy(), { flags: 'r+' })
    await call(image)
    await Promise.all([busy(image), call(image), busy(image)])
    expect((await image.check()).corruptions).toBe(0)
  })

  it('is refused on one that is open for reading', async () => {
    const path = copy()
    const before = digest(path)
    await using image = await open(path)
    const error = await failure(() => call(image))
    expect([error.code, error.path]).toEqual(['ERR_QCOW2_READ_ONLY', path])
    expect(error.stack).toContain('refused.test.ts')
    expect(digest(path)).toBe(before)
  })

  it('is refused while the image closes, and what was under way is in the file', async () => {
    const path = copy()
    const image = await open(path, { flags: 'r+' })
    const other = busy(image)
    const closing = image.close()
    expect((await failure(() => call(image))).code).toBe('ERR_QCOW2_CLOSED')
    await Promise.all([other, closing])
    expect((await failure(() => call(image))).code).toBe('ERR_QCOW2_CLOSED')
    await using again = await open(path)
    const { buffer } = await again.read(Buffer.alloc(1), { position: SIZE - 1 })
    expect(buffer[0]).toBe(8)
    expect((await again.check()).ok).toBe(true)
  })

  it('is refused where an earlier abort says so, before anything changes', async () => {
    if (_ === 'createWriteStream') return
    const path = copy()
    const before = digest(path)
    await using image = await open(path, { flags: 'r+' })
    const signal = AbortSignal.abort(new Error('enough'))
    const abortable: Record<string, () => Promise<unknown>> = {
      write: () => image.write(Buffer.alloc(10), { position: 0, signal }),
      'compressed write': () => image.write(Buffer.alloc(65536), { position: 0, compressed: true, signal }),
      writev: () => image.writev([Buffer.alloc(3)], 512, { signal }),
      writeZeroes: () => image.writeZeroes(0, 65536, { signal }),
      discard: () => image.discard(0, 65536, { signal }),
      truncate: () => image.truncate(2 * SIZE, { signal }),
    }
    const error = await failure(() => abortable[_]?.() ?? Promise.resolve())
    expect([error.name, error.cause]).toEqual(['AbortError', signal.reason])
    expect(digest(path)).toBe(before)
  })
})

describe('arguments', () => {
  const invalid = 'ERR_QCOW2_INVALID_ARGUMENT'
  const detached = (): Uint8Array => {
    const bytes = new Uint8Array(100)
    structuredClone(bytes.buffer, { transfer: [bytes.buffer] })
    return bytes
  }
  const resizable = (): Uint8Array => new Uint8Array(Reflect.construct(ArrayBuffer, [100, { maxByteLength: 200 }]))
  const loose = (image: Image): Record<string, (...args: unknown[]) => Promise<unknown>> => image as never
  type Case = [what: string, call: (image: Image) => Promise<unknown>, field: RegExp]
  const cases: Case[] = [
    ['a write past the end', i => i.write(Buffer.alloc(2), { position: SIZE - 1 }), /length/],
    ['a write behind the end', i => i.write(Buffer.alloc(2), { position: SIZE + 1 }), /position/],
    ['zeroes past the end', i => i.writeZeroes(0, SIZE + 1), /length/],
    ['a discard past the end', i => i.discard(SIZE, 1), /length/],
    ['buffers past the end', i => i.writev([Buffer.alloc(1), Buffer.alloc(1)], SIZE - 1), /length/],
    ['a detached buffer', i => i.write(detached(), { position: 0 }), /buffer/],
    ['a resizable buffer', i => i.write(resizable(), { position: 0 }), /buffer/],
    ['a detached buffer among others', i => i.writev([Buffer.alloc(1), detached()], 0), /buffers\[1\]/],
    ['a string', i => loose(i)['write']?.('text', { position: 0 }) ?? Promise.resolve(), /buffer/],
    ['no position', i => loose(i)['write']?.(Buffer.alloc(1)) ?? Promise.resolve(), /position/],
    ['a negative position', i => i.write(Buffer.alloc(1), { position: -1 }), /position/],
    ['half a byte', i => i.writeZeroes(0.5, 1), /position/],
    ['beyond 2^53', i => i.discard(0, 2n ** 53n), /length/],
    ['outside the buffer', i => i.write(Buffer.alloc(10), { position: 0, offset: 5, length: 6 }), /length/],
    ['a misspelt option', i => i.write(Buffer.alloc(1), { position: 0, compress: true } as never), /compress/],
    ['a compressed part of a cluster', i => i.write(Buffer.alloc(100), { position: 0, compressed: true }), /length/],
    ['compressed, off its cluster', i => i.write(Buffer.alloc(65536), { position: 1, compressed: true }), /position/],
    ['an odd size', i => i.truncate(SIZE + 1), /^size$/],
  ]
  it.each(cases)('%s', async (_, call, field) => {
    const path = changed(h => h.writeBigUInt64BE(1n << 50n, AUTOCLEAR))
    const before = digest(path)
    await using image = await open(path, { flags: 'r+' })
    const error = await failure(() => call(image))
    expect(error.code).toBe(invalid)
    expect(error.field).toMatch(field)
    expect(digest(path)).toBe(before)
  })

  it('compressed clusters where there are none', async () => {
    const raw = writeRaw(at('plain.raw'), SIZE, [])
    await using disk = await open(raw, { format: 'raw', flags: 'r+' })
    await using image = await create(at('other.qcow2'), { size: SIZE, dataFile: at('other.data') })
    for (const target of [disk, image]) {
      const error = await failure(() => target.write(Buffer.alloc(65536), { position: 0, compressed: true }))
      expect(error.code).toBe('ERR_QCOW2_UNSUPPORTED_FEATURE')
    }
  })

  it('a stream with wrong options throws at once', async () => {
    await using image = await open(
      changed(() => {}),
      { flags: 'r+' },
    )
    expect(() => image.createWriteStream({ start: -1 })).toThrow(expect.objectContaining({ code: invalid }))
    expect(() => image.createWriteStream({ end: 5 } as never)).toThrow(expect.objectContaining({ code: invalid }))
  })
})

it('a handle cannot be used by two workers: each opens the image itself, and one is refused', async () => {
  const path = changed(() => {})
  await using _image = await open(path, { flags: 'r+' })
  const library = new URL('../../dist/index.js', import.meta.url).pathname
  const program = `
    const { parentPort } = require('node:worker_threads')
    require(${JSON.stringify(library)}).open(${JSON.stringify(path)}, { flags: 'r+' })
      .then(() => parentPort.postMessage('opened'), error => parentPort.postMessage(error.code))`
  const worker = new Worker(program, { eval: true })
  const answer = await new Promise<Qcow2Error['code']>(resolve => worker.once('message', resolve))
  await worker.terminate()
  expect(answer).toBe('ERR_QCOW2_LOCKED')
})
