/** Objects of the caller's as disks: whatever opens a file opens one, and one that fails, lies or never answers harms nobody else. */

import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import {
  check,
  compare,
  convert,
  create,
  type Image,
  inspect,
  measure,
  open,
  probe,
  Qcow2Error,
  type RandomAccessSource,
} from 'qcow2'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { qemuImg } from '../interop/qemu.js'
import { library, runNode } from '../lifecycle/child.js'
import { MemorySource, never } from './memory.js'

const folder = mkdtempSync(join(tmpdir(), 'qcow2-source-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const MIB = 2 ** 20
let last = 0
const name = (kind: string): string => join(folder, `${++last}.${kind}`)

/** A disk of 24 MiB with 12 MiB of data in two places. */
let disk: string
beforeAll(async () => {
  disk = name('qcow2')
  const image = await create(disk, { size: 24 * MIB })
  const data = Buffer.alloc(6 * MIB)
  for (let at = 0; at < data.length; at += 4) data.writeUInt32LE((at * 2654435761) % 2 ** 32, at)
  await image.write(data, { position: MIB })
  await image.write(data, { position: 15 * MIB })
  await image.close()
})

const source = (file = disk): MemorySource => new MemorySource(readFileSync(file))
const byte = async (image: Image, position: number, signal?: AbortSignal): Promise<number> =>
  (await image.read(Buffer.alloc(1), { position, ...(signal && { signal }) })).buffer[0] ?? -1

describe('a RandomAccessSource', () => {
  it('is the source of everything that takes one, and is closed each time', async () => {
    const memory = source()
    expect(await probe(memory)).toBe('qcow2')
    expect(await inspect(memory)).toMatchObject({ format: 'qcow2', virtualSize: 24 * MIB, safe: true })
    expect(await check(memory)).toMatchObject({ ok: true, filename: 'RandomAccessSource' })
    expect(await compare(memory, disk)).toMatchObject({ identical: true })
    expect((await measure(memory, { to: 'qcow2' })).required).toBe((await measure(disk, { to: 'qcow2' })).required)
    const image = await open(memory)
    const map = async (of: Image): Promise<unknown[]> => {
      const found: unknown[] = []
      for await (const { start, length, data } of of.map()) found.push({ start, length, data })
      return found
    }
    await using local = await open(disk)
    expect(await map(image)).toEqual(await map(local))
    await image.close()
    expect(memory.count('close')).toBe(6)
    const out = name('raw')
    const progress: number[] = []
    await convert(memory, out, { to: 'raw', onProgress: ({ current }) => progress.push(current) })
    expect(qemuImg('compare', '-F', 'qcow2', '-f', 'raw', out, disk).code).toBe(0)
    expect(progress.at(-1)).toBe(24 * MIB)
    // Raw, where nothing but the caller says so.
    await expect(open(new MemorySource(Buffer.alloc(MIB)))).rejects.toMatchObject({ code: 'ERR_QCOW2_FORMAT_UNKNOWN' })
    await using raw = await open(new MemorySource(readFileSync(out)), { format: 'raw' })
    expect(raw.virtualSize).toBe(24 * MIB)
    expect(await byte(raw, MIB + 4)).toBe(await byte(local, MIB + 4))
  })

  it('is asked little to begin with, and for every block once by a whole convert', async () => {
    const memory = source()
    const image = await open(memory)
    await byte(image, 20 * MIB)
    expect(memory.count('read')).toBeLessThanOrEqual(3)
    await image.close()
    const whole = source()
    await convert(whole, name('raw'), { to: 'raw' })
    const reads = whole.asked.filter(({ what }) => what === 'read').sort((a, b) => a.position - b.position)
    let end = 0
    for (const { position, length } of reads) {
      expect(position).toBeGreaterThanOrEqual(end)
      end = position + length
    }
    expect(end).toBe(statSync(disk).size)
  })

  it('is asked as much at once as it says', async () => {
    for (const concurrency of [1, 3]) {
      const memory = source()
      memory.before = () => sleep(1)
      const limited: RandomAccessSource = {
        size: memory.size,
        concurrency,
        cache: { blockSize: 65536, readAhead: MIB },
        read: (buffer, position, signal) => memory.read(buffer, position, signal),
      }
      await convert(limited, name('raw'), { to: 'raw', concurrency: 8 })
      expect(memory.most).toBe(concurrency)
    }
  })

  it('reads the same whatever is kept', async () => {
    await using local = await open(disk)
    for (const cache of [false, { blockSize: 4096, size: 8192, readAhead: 0 }, {}] as const) {
      const memory = source()
      const cached = {
        size: memory.size,
        cache,
        read: (b: Uint8Array, p: number, s: AbortSignal) => memory.read(b, p, s),
      }
      await using image = await open(cached)
      const reads = Array.from({ length: 60 }, async (_, n) => {
        const [position, length] = [(n * 7_654_321) % (23 * MIB), 1 + ((n * 48_271) % 200_000)]
        const [here, there] = await Promise.all(
          [image, local].map(each => each.read(Buffer.alloc(length), { position })),
        )
        expect(here?.buffer.equals(there?.buffer ?? Buffer.of())).toBe(true)
      })
      await Promise.all(reads)
    }
  })

  it('is a backing file, where the resolver says so', async () => {
    const overlay = name('qcow2')
    await (
      await create(overlay, { size: 24 * MIB, backingFile: disk, backingFormat: 'qcow2', references: 'allow' })
    ).close()
    const below = source()
    await using image = await open(source(overlay), { references: ({ kind }) => (kind === 'backing' ? below : null) })
    await using local = await open(disk)
    expect(await byte(image, 16 * MIB + 4)).toBe(await byte(local, 16 * MIB + 4))
    const loop = source(overlay)
    await expect(open(loop, { references: () => loop })).rejects.toMatchObject({ code: 'ERR_QCOW2_CHAIN' })
    await image.close()
    expect(below.count('close')).toBe(1)
  })

  it('says what is zero, which is not read then', async () => {
    const memory = new MemorySource(Buffer.concat([Buffer.alloc(8 * MIB, 1), Buffer.alloc(24 * MIB)]))
    const telling: RandomAccessSource = {
      size: memory.size,
      read: (buffer, position, signal) => memory.read(buffer, position, signal),
      extents: position => [
        ...(position < 8 * MIB ? [{ position, length: 8 * MIB - position, zero: false }] : []),
        { position: Math.max(position, 8 * MIB), length: memory.size - Math.max(position, 8 * MIB), zero: true },
      ],
      cache: { readAhead: 0 },
    }
    const { bytesRead } = await convert(telling, name('qcow2'), { from: 'raw', to: 'qcow2' })
    expect(bytesRead).toBe(8 * MIB)
    expect(Math.max(...memory.asked.map(({ position, length }) => position + length))).toBe(8 * MIB)
  })
})

describe('a RandomAccessSource that is wrong', () => {
  const failing = (read: RandomAccessSource['read']): RandomAccessSource => ({ size: 4 * MIB, read, name: 'my disk' })

  it('has its exception as the cause, and the code of one of ours', async () => {
    const cause = new TypeError('no such bucket')
    const thrown = failing(() => Promise.reject(cause))
    const error = await open(thrown).catch((failure: unknown) => failure)
    expect(error).toBeInstanceOf(Qcow2Error)
    expect(error).toMatchObject({ code: 'ERR_QCOW2_IO', path: 'my disk', syscall: 'read', cause })
    expect((error as Error).message).toBe('my disk: no such bucket (offset 0x0)')
    const own = new Qcow2Error('ERR_QCOW2_LOCKED', 'in use')
    await expect(open(failing(() => Promise.reject(own)))).rejects.toMatchObject({
      code: 'ERR_QCOW2_LOCKED',
      cause: own,
    })
    const sync = failing(() => {
      throw cause
    })
    await expect(convert(sync, name('raw'), { from: 'raw', to: 'raw' })).rejects.toMatchObject({ cause })
  })

  it('is told that it returned a wrong count, or runs that are none', async () => {
    for (const [count, words] of [
      [3, 'returned 3 of 1048576 bytes'],
      [-1, 'returned -1 for'],
      [2 ** 40, `returned ${2 ** 40} for`],
      [1.5, 'returned 1.5 for'],
      ['all', "returned 'all' for"],
      [undefined, 'returned undefined for'],
    ] as const) {
      const error = open(failing(() => count as number))
      await expect(error).rejects.toMatchObject({ code: 'ERR_QCOW2_IO', message: expect.stringContaining(words) })
    }
    const runs = [[], 'none', [{ position: 1, length: 1, zero: true }], [{ position: 0, length: 0, zero: true }]]
    for (const wrong of runs) {
      const memory = new MemorySource(Buffer.alloc(MIB))
      const telling = { ...failing((b, p, s) => memory.read(b, p, s)), size: MIB, extents: () => wrong as never }
      const error = convert(telling, name('raw'), { from: 'raw', to: 'raw' })
      await expect(error).rejects.toMatchObject({ code: 'ERR_QCOW2_IO', syscall: 'extents' })
    }
  })

  it('is refused where it cannot be one', async () => {
    const read = (): number => 0
    const wrong: unknown[] = [
      { size: -1, read },
      { size: 1.5, read },
      { size: '5', read },
      { size: 2n ** 60n, read },
      { size: 5, read: 'no function' },
      { size: 5, read, write: 7 },
      { size: 5, read, concurrency: 0 },
      { size: 5, read, name: '' },
      { size: 5, read, cache: { blockSize: 1 } },
      { size: 5, read, cache: { block: 1 } },
    ]
    for (const each of wrong) {
      await expect(open(each as RandomAccessSource)).rejects.toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    }
    await expect(open(source(), { flags: 'r+' })).rejects.toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
  })

  it('tells what its close threw', async () => {
    const memory = source()
    memory.before = what => (what === 'close' ? Promise.reject(new Error('still in use')) : undefined)
    const image = await open(memory)
    await expect(image.close()).rejects.toMatchObject({ code: 'ERR_QCOW2_IO', syscall: 'close' })
  })
})

describe('a RandomAccessSource that never answers', () => {
  /** Answers until it is told not to. */
  const silent = (): { memory: MemorySource; signals: AbortSignal[]; hush(): void } => {
    const memory = source()
    const signals: AbortSignal[] = []
    const hush = (): void => {
      memory.before = (what, signal) => {
        if (signal !== undefined) signals.push(signal)
        return what === 'close' ? undefined : never()
      }
    }
    return { memory, signals, hush }
  }
  const soon = (): AbortSignal => AbortSignal.timeout(50)

  it('is ended by the signal of whatever waits for it, and hears of it', async () => {
    const { memory, signals, hush } = silent()
    const { size } = memory
    const read: RandomAccessSource['read'] = (buffer, position, signal) => memory.read(buffer, position, signal)
    const image = await open({ size, cache: false, read })
    hush()
    for (const work of [
      () => byte(image, 17 * MIB, soon()),
      () => image.check({ signal: soon() }),
      () => convert(memory, name('raw'), { to: 'raw', signal: soon() }),
      () => open(memory, { signal: soon() }),
      () => compare(memory, disk, { signal: soon() }),
    ]) {
      const begin = performance.now()
      await expect(work()).rejects.toMatchObject({ name: 'AbortError' })
      expect(performance.now() - begin).toBeLessThan(2000)
    }
    expect(signals.filter(({ aborted }) => aborted).length).toBeGreaterThanOrEqual(4)
    // Those that were given up take nobody's place.
    memory.before = () => undefined
    await using local = await open(disk)
    expect(await byte(image, 17 * MIB)).toBe(await byte(local, 17 * MIB))
    await image.close()
  })

  it('is ended by close, five seconds after its last word', async () => {
    const { memory, hush } = silent()
    const image = await open(memory)
    hush()
    const reading = byte(image, 17 * MIB)
    const [read] = await Promise.allSettled([reading, image.close()])
    expect(read).toMatchObject({ status: 'rejected', reason: { code: 'ERR_QCOW2_IO' } })
    expect(memory.count('close')).toBe(1)
  })

  it('is ended by the end of its environment, and keeps no process alive', async () => {
    const program = `
      const { parentPort } = require('node:worker_threads')
      const qcow2 = require(${JSON.stringify(library)})
      const disk = require('node:fs').readFileSync(${JSON.stringify(disk)})
      let reads = 0
      const read = (b, p) => {
        if (reads++ > 0) { parentPort.postMessage('asked'); return new Promise(() => {}) }
        b.set(disk.subarray(p, p + b.length)); return b.length
      }
      qcow2.open({ size: disk.length, read }).then(image => { image.read(Buffer.alloc(1), { position: ${17 * MIB} }); image.check() })`
    const worker = new Worker(program, { eval: true })
    await once(worker, 'message')
    expect(await worker.terminate()).toBe(1)
    const ended = runNode(`
      const disk = require('node:fs').readFileSync(${JSON.stringify(disk)})
      const read = (b, p) => { b.set(disk.subarray(p, p + b.length)); return b.length }
      qcow2.open({ size: disk.length, read }).then(image => { globalThis.image = image; console.log('open') })`)
    expect(ended).toMatchObject({ code: 0, stdout: 'open\n' })
  })

  it('holds up nobody else: an image over an image over a source, read by many at once', async () => {
    const inner = await open(source())
    const over = { size: statSync(disk).size, cache: { blockSize: 65536, readAhead: 0 } as const }
    const raw = await open(source(), { format: 'raw' })
    const middle: RandomAccessSource = {
      ...over,
      concurrency: 64,
      read: async (buffer, position) => (await raw.read(buffer, { position })).bytesRead,
    }
    const outer = await open(middle)
    const read = async (_: unknown, n: number): Promise<void> => {
      const position = (n * 433_494_437) % (24 * MIB)
      expect(await byte(outer, position)).toBe(await byte(inner, position))
    }
    await Promise.all(Array.from({ length: 64 }, read))
    await Promise.all([outer, raw, inner].map(each => each.close()))
  })
})

describe('a RandomAccessSource that is written to', () => {
  it('is the target of a convert, made anew or as it is', async () => {
    const memory = new MemorySource(Buffer.of())
    const target = memory.writable()
    await convert(disk, target, { to: 'qcow2', compress: true })
    expect(memory.count('sync')).toBeGreaterThan(0)
    const file = name('qcow2')
    writeFileSync(file, memory.bytes)
    expect(qemuImg('compare', file, disk).code).toBe(0)
    expect(qemuImg('check', file).code).toBe(0)
    await expect(convert(disk, target, { to: 'raw' })).rejects.toMatchObject({ code: 'EEXIST' })
    await expect(convert(target, target, { to: 'raw', overwrite: true })).rejects.toMatchObject({ field: 'target' })
    await convert(disk, target, { to: 'raw', overwrite: true })
    expect(memory.size).toBe(24 * MIB)
    await convert(disk, target, { to: 'raw', existingTarget: true })
    expect(await compare(target, disk, { formatA: 'raw' })).toMatchObject({ identical: true })
    for (const to of ['vmdk', 'vdi', 'vpc', 'vhdx', 'parallels'] as const) {
      await convert(disk, target, { to, overwrite: true })
      expect(await compare(target, disk, { formatA: to })).toMatchObject({ identical: true })
    }
  })

  it('is the target of a live clone, which has the disk of one moment', async () => {
    const live = name('qcow2')
    await convert(disk, live, { to: 'qcow2' })
    await using image = await open(live, { flags: 'r+' })
    const memory = new MemorySource(Buffer.of())
    const target = memory.writable()
    const written = () => image.write(Buffer.alloc(MIB, 9), { position: 16 * MIB })
    await image.clone(target, { to: 'qcow2', onPointInTime: written })
    expect(await compare(target, disk)).toMatchObject({ identical: true })
    expect(await byte(image, 16 * MIB)).toBe(9)
    await expect(image.clone(target, { to: 'raw' })).rejects.toMatchObject({ code: 'EEXIST' })
    await image.clone(target, { to: 'raw', overwrite: true })
    expect([memory.size, memory.bytes[16 * MIB]]).toEqual([24 * MIB, 9])
    expect(memory.count('close')).toBe(3)
    const failing: RandomAccessSource = { ...target, size: 0, write: () => Promise.reject(new Error('gone')) }
    await expect(image.clone(failing, { to: 'qcow2' })).rejects.toMatchObject({ cause: { message: 'gone' } })
  })

  it('takes writes, snapshots and another size, and what it fails with is told', async () => {
    const memory = source()
    const image = await open(memory.writable(), { flags: 'r+' })
    await image.write(Buffer.from('hello'), { position: 10 * MIB + 5 })
    await image.snapshots.create('one')
    await image.writeZeroes(15 * MIB, 6 * MIB)
    await image.truncate(40 * MIB)
    expect((await image.read(Buffer.alloc(5), { position: 10 * MIB + 5 })).buffer.toString()).toBe('hello')
    await image.sync()
    memory.before = what => {
      if (what === 'write') throw Object.assign(new Error('the bucket is full'), { code: 'ENOSPC' })
    }
    const full = image.write(Buffer.alloc(MIB, 1), { position: 30 * MIB })
    await expect(full).rejects.toMatchObject({ code: 'ERR_QCOW2_IO', cause: { code: 'ENOSPC' } })
    memory.before = () => undefined
    await image.write(Buffer.alloc(MIB, 1), { position: 30 * MIB })
    await image.close()
    const file = name('qcow2')
    writeFileSync(file, memory.bytes)
    expect(qemuImg('check', file).code).toBe(0)
    expect(qemuImg('info', file).stdout).toContain('one')
  })
})
