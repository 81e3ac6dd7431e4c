/** Exports of NBD servers as images: whatever opens a file opens one, and no name becomes a connection by itself. */

import { existsSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  check,
  compare,
  convert,
  create,
  type Image,
  inspect,
  listNbd,
  measure,
  nbdSource,
  open,
  probe,
  type Reference,
  rebase,
  serveNbd,
} from 'qcow2'
import { afterAll, describe, expect, it, vi } from 'vitest'
import { execute, qcow2 } from '../cli/run.js'
import { library } from '../lifecycle/child.js'
import { kill, serverProcess } from './process.js'
import { silentServer } from './silent.js'

const folder = mkdtempSync(join(tmpdir(), 'qcow2-nbd-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const MIB = 2 ** 20
let last = 0
const name = (kind: string): string => join(folder, `${++last}.${kind}`)
const uri = (path: string, exportName = ''): string => `nbd+unix:///${exportName}?socket=${path}`

/** A raw disk of a size, filled with a byte, that is served until it is disposed of. */
async function served(size: number, { readOnly = false } = {}) {
  const file = name('raw')
  writeFileSync(file, Buffer.alloc(size, 0xee))
  const image = await open(file, { format: 'raw', flags: 'r+' })
  const path = name('sock')
  const server = await serveNbd(image, { path, exportName: 'e x', readOnly })
  const source = nbdSource(uri(path, 'e%20x'))
  return { image, path, server, source, file, [Symbol.asyncDispose]: () => image.close() }
}

async function disk(size = 4 * MIB): Promise<string> {
  const file = name('qcow2')
  const image = await create(file, { size })
  await image.write(Buffer.alloc(100_000, 7), { position: MIB })
  await image.close()
  return file
}

const first = async (image: Image, position: number): Promise<number> =>
  (await image.read(Buffer.alloc(1), { position })).buffer[0] ?? -1

// Windows has no unix sockets for Node and Rust alike.
describe.skipIf(process.platform === 'win32')('nbdSource', () => {
  it('is the source and the target of every job, as a raw disk and with an image in it', async () => {
    await using server = await served(8 * MIB)
    const { source } = server
    const file = await disk()
    expect(await probe(source)).toBe('raw')
    await expect(open(source)).rejects.toMatchObject({ code: 'ERR_QCOW2_FORMAT_UNKNOWN', path: source.uri })
    await expect(convert(file, source, { to: 'raw' })).rejects.toMatchObject({ code: 'EEXIST', path: source.uri })
    await convert(file, source, { to: 'raw', existingTarget: true })
    expect(await compare(file, source, { formatB: 'raw' })).toMatchObject({ firstDifference: 4 * MIB })
    // What lies behind the disk stays.
    expect(await first(server.image, 8 * MIB - 1)).toBe(0xee)

    expect((await measure(file, { to: 'qcow2' })).required).toBeLessThan(8 * MIB)
    const converted = await convert(file, source, { to: 'qcow2', overwrite: true, compress: true })
    expect(converted.virtualSize).toBe(4 * MIB)
    expect(await probe(source)).toBe('qcow2')
    expect(await compare(file, source)).toMatchObject({ identical: true, sizesDiffer: false })
    expect(await check(source)).toMatchObject({ ok: true, leaks: 0, filename: source.uri })
    expect(await inspect(source)).toMatchObject({ format: 'qcow2', virtualSize: 4 * MIB, safe: true })
    expect((await measure(source, { to: 'raw' })).required).toBe(4 * MIB)
    const out = name('raw')
    await convert(source, out, { to: 'raw' })
    expect(await compare(file, out, { formatB: 'raw' })).toMatchObject({ identical: true })

    const image = await open(source, { flags: 'r+' })
    const info = await image.info()
    expect(info).toMatchObject({ filename: source.uri, protocol: 'nbd', fileLength: 8 * MIB, format: 'qcow2' })
    expect(info.actualSize).toBeUndefined()
    await image.write(Buffer.from('here'), { position: 3 * MIB })
    await image.writeZeroes(MIB, 65536)
    await image.discard(MIB, 65536)
    await image.datasync()
    await image.close()
    await using again = await open(source)
    expect((await again.read(Buffer.alloc(4), { position: 3 * MIB })).buffer.toString()).toBe('here')
    expect(await first(again, MIB)).toBe(0)
  })

  it('has holes where the server tells of them', async () => {
    const image = await create(name('qcow2'), { size: 8 * MIB })
    await image.write(Buffer.alloc(65536, 1), { position: 4 * MIB })
    const path = name('sock')
    await serveNbd(image, { path })
    await using raw = await open(nbdSource(uri(path)), { format: 'raw' })
    const map: object[] = []
    for await (const { start, length, zero, data } of raw.map()) map.push({ start, length, zero, data })
    expect(map).toEqual([
      { start: 0, length: 4 * MIB, zero: true, data: false },
      { start: 4 * MIB, length: 65536, zero: false, data: true },
      { start: 4 * MIB + 65536, length: 4 * MIB - 65536, zero: true, data: false },
    ])
    await image.close()
    await expect(raw.read(Buffer.alloc(1), { position: 0 })).rejects.toMatchObject({
      code: 'ERR_QCOW2_IO',
      syscall: 'NBD_CMD_READ',
      path: uri(path),
    })
  })

  it('refuses targets that cannot be', async () => {
    const file = await disk()
    await using small = await served(2 * MIB)
    const refused = { code: 'ERR_QCOW2_INVALID_ARGUMENT', path: small.source.uri }
    await expect(convert(file, small.source, { to: 'raw', overwrite: true })).rejects.toMatchObject(refused)
    expect(await first(small.image, 0)).toBe(0xee)
    await using tiny = await served(65536)
    await expect(convert(file, tiny.source, { to: 'qcow2', overwrite: true })).rejects.toMatchObject({ code: 'ENOSPC' })
    await using reading = await served(8 * MIB, { readOnly: true })
    const readOnly = { code: 'ERR_QCOW2_READ_ONLY', path: reading.source.uri }
    await expect(convert(file, reading.source, { to: 'raw', overwrite: true })).rejects.toMatchObject(readOnly)
    await expect(open(reading.source, { format: 'raw', flags: 'r+' })).rejects.toMatchObject(readOnly)
    const itself = { field: 'target', message: expect.stringContaining('also a source') }
    const onto = { from: 'raw', to: 'raw', overwrite: true } as const
    await expect(convert(small.source, small.source, onto)).rejects.toMatchObject(itself)
    const dataFile = { to: 'qcow2', overwrite: true, create: { dataFile: name('data') } } as const
    await expect(convert(file, small.source, dataFile)).rejects.toMatchObject({ field: 'dataFile' })
  })

  it('refuses names that are none, and takes nothing else for one', async () => {
    const code = 'ERR_QCOW2_INVALID_ARGUMENT'
    for (const bad of ['nbd://', 'nbd+unix:///x', 'http://h/', '/run/nbd', 'nbd:h', '']) {
      expect(() => nbdSource(bad), bad).toThrow(expect.objectContaining({ code, field: 'uri' }))
    }
    expect(() => nbdSource('nbds://h/x')).toThrow(expect.objectContaining({ code: 'ERR_QCOW2_UNSUPPORTED_FEATURE' }))
    expect(() => nbdSource(7 as never)).toThrow(expect.objectContaining({ code, field: 'uri' }))
    expect(() => nbdSource('nbd://h', { timeout: 1 } as never)).toThrow(expect.objectContaining({ field: 'timeout' }))
    expect(() => nbdSource('nbd://h', { silenceTimeout: 0 })).toThrow(expect.objectContaining({ code }))
    expect(nbdSource('NBD://[::1]/a b').uri).toBe('nbd://[::1]:10809/a%20b')
    expect(nbdSource('nbd:unix:/s:exportname=a?').uri).toBe('nbd+unix:///a%3F?socket=/s')
    // A string is the name of a file, whatever it looks like; and what looks like a source is none.
    await using server = await served(MIB)
    await expect(open(server.source.uri, { format: 'raw' })).rejects.toMatchObject({ code: 'ENOENT' })
    await expect(open({ uri: server.source.uri } as never)).rejects.toMatchObject({ code, field: 'source' })
    await expect(open({ ...server.source } as never)).rejects.toMatchObject({ code, field: 'source' })
    expect(server.server.connections).toBe(0)
  })

  it('connects to nothing that an image names', async () => {
    const path = name('sock')
    await using server = await silentServer({ path })
    const names = [
      uri(path),
      `nbd:unix:${path}`,
      `json:{"driver":"nbd","server":{"type":"unix","path":"${path}"}}`,
      `json:{"driver":"raw","file":{"driver":"nbd","path":"${path}"}}`,
    ]
    for (const [index, backing] of names.entries()) {
      const file = await disk()
      await rebase(file, backing, { unsafe: true, acknowledgeDataLoss: true, backingFormat: 'raw' })
      const denied = { code: 'ERR_QCOW2_REFERENCE_DENIED' }
      for (const references of ['deny', 'allow'] as const) {
        await expect(open(file, { references }), backing).rejects.toMatchObject(denied)
        await expect(convert(file, name('raw'), { to: 'raw', references })).rejects.toMatchObject(denied)
      }
      await expect(open(file, { references: ({ filename }: Reference) => filename })).rejects.toMatchObject({
        code: 'ERR_QCOW2_CHAIN',
      })
      expect(await check(file)).toMatchObject({ ok: true })
      const commands = [
        ['info', '--backing-chain', file],
        ['convert', '-O', 'raw', file, name('raw')],
        ['map', file],
        ['compare', file, file],
        ['commit', file],
        ['rebase', '-b', '', file],
        ['io', '-c', 'read 0 512', file],
        ['create', '-f', 'qcow2', '-b', file, '-F', 'qcow2', name('qcow2')],
      ]
      for (const args of commands.slice(0, index === 0 ? commands.length : 2)) {
        const { code, stderr } = await qcow2(args, folder)
        expect([code === 0, stderr.includes('sock')], args.join(' ')).toEqual([false, true])
      }
    }
    expect(server.connections).toBe(0)
  })

  it('is what a function for references can give, and the place of no relative name', async () => {
    await using base = await served(4 * MIB)
    const overlay = await disk()
    await rebase(overlay, 'base', { unsafe: true, acknowledgeDataLoss: true, backingFormat: 'raw' })
    await using image = await open(overlay, { references: () => base.source })
    expect([await first(image, 0), await first(image, MIB)]).toEqual([0xee, 7])
    // An overlay in an export: its backing file is nowhere.
    await using top = await served(8 * MIB)
    const made = await create(name('qcow2'), { size: 4 * MIB })
    await made.close()
    await convert(await disk(), top.source, { to: 'qcow2', overwrite: true })
    await rebase(top.source, 'base', { unsafe: true, acknowledgeDataLoss: true, backingFormat: 'raw' })
    await expect(open(top.source, { references: 'allow' })).rejects.toMatchObject({
      code: 'ERR_QCOW2_REFERENCE_DENIED',
      message: expect.stringContaining('relative'),
    })
    await using layer = await open(top.source, { references: 'layer' })
    expect(await layer.info()).toMatchObject({ backingFilename: 'base' })
    expect((await layer.info()).fullBackingFilename).toBeUndefined()
  })

  it('ends with its signal, its times, and its server', async () => {
    const mute = name('sock')
    await using _mute = await silentServer({ path: mute, mute: true })
    const begin = performance.now()
    const aborted = { name: 'AbortError', cause: { name: 'TimeoutError' } }
    const soon = () => AbortSignal.timeout(100)
    for (const open_ of [
      (signal: AbortSignal) => open(nbdSource(uri(mute)), { signal }),
      (signal: AbortSignal) => probe(nbdSource(uri(mute)), { signal }),
      (signal: AbortSignal) => inspect(nbdSource(uri(mute)), { signal }),
      (signal: AbortSignal) => listNbd(uri(mute), { signal }),
    ]) {
      await expect(open_(soon())).rejects.toMatchObject(aborted)
    }
    const impatient = nbdSource(uri(mute), { connectTimeout: 100 })
    await expect(open(impatient)).rejects.toMatchObject({ code: 'ETIMEDOUT', path: uri(mute) })
    await expect(listNbd(uri(mute), { connectTimeout: 100 })).rejects.toMatchObject({ code: 'ETIMEDOUT' })

    // In the middle: what was open is given up.
    const silent = name('sock')
    await using _silent = await silentServer({ path: silent, answers: 2, size: 64 * MIB })
    const reading = { from: 'raw', to: 'qcow2', signal: soon() } as const
    await expect(convert(nbdSource(uri(silent)), name('qcow2'), reading)).rejects.toMatchObject(aborted)
    const hush = nbdSource(uri(silent), { silenceTimeout: 200 })
    const late = { code: 'ERR_QCOW2_IO', message: expect.stringContaining('has not answered for 0.2 seconds') }
    await expect(convert(hush, name('qcow2'), { from: 'raw', to: 'qcow2' })).rejects.toMatchObject(late)
    const onto = { to: 'raw', overwrite: true, signal: soon() } as const
    await expect(convert(await disk(), nbdSource(uri(silent)), onto)).rejects.toMatchObject(aborted)
    // The signal of an opening is of that alone.
    const abort = new AbortController()
    await using server = await served(MIB)
    await using image = await open(server.source, { format: 'raw', signal: abort.signal })
    abort.abort()
    expect(await first(image, 0)).toBe(0xee)
    await server.image.close()
    await expect(first(image, 0)).rejects.toMatchObject({ code: 'ERR_QCOW2_IO', syscall: 'NBD_CMD_READ' })
    expect(performance.now() - begin).toBeLessThan(20_000)
  })

  it('has many requests under way at once, whatever the number of cores', async () => {
    const path = name('sock')
    const server = await silentServer({ path, answers: 1, size: 64 * MIB })
    const image = await open(nbdSource(uri(path)), { format: 'raw' })
    const before = server.requests
    const reads = Array.from({ length: 20 }, (_, n) => image.read(Buffer.alloc(512), { position: n * MIB }))
    const ended = Promise.allSettled(reads)
    await vi.waitFor(() => expect(server.requests).toBe(before + 12), { timeout: 20_000 })
    await server[Symbol.asyncDispose]()
    const lost = { status: 'rejected', reason: { code: 'ERR_QCOW2_IO' } }
    expect(await ended).toMatchObject(reads.map(() => lost))
    await image.close()
  })

  it('comes back to a server that does, for as long as it may', async () => {
    const [file, path] = [name('raw'), name('sock')]
    writeFileSync(file, Buffer.alloc(8 * MIB, 0xee))
    let server = await serverProcess(file, path)
    const source = (reconnect: number) => nbdSource(uri(path), { reconnect })
    const patient = await open(source(60_000), { format: 'raw', flags: 'r+' })
    await using hasty = await open(source(100), { format: 'raw' })
    await kill(server)
    const late = { code: 'ERR_QCOW2_IO', message: expect.stringContaining('and another one failed') }
    await expect(first(hasty, 0)).rejects.toMatchObject(late)
    const waits = [
      patient.write(Buffer.from('again'), { position: 3 * MIB }),
      patient.writeZeroes(MIB, 65536),
      patient.datasync(),
      first(patient, MIB + 80_000),
    ] as const
    server = await serverProcess(file, path)
    expect((await Promise.all(waits))[3]).toBe(0xee)
    await expect(first(hasty, 0)).rejects.toMatchObject({ code: 'ERR_QCOW2_IO' })
    await kill(server)
    const bytes = readFileSync(file)
    expect([bytes.toString('latin1', 3 * MIB, 3 * MIB + 5), bytes[MIB], bytes[MIB + 65536]]).toEqual(['again', 0, 0xee])
    // What comes back is another disk.
    truncateSync(file, MIB)
    server = await serverProcess(file, path)
    await expect(first(patient, 0)).rejects.toMatchObject({
      code: 'ERR_QCOW2_IO',
      message: expect.stringContaining('it had 8388608 bytes and has 1048576'),
    })
    await kill(server)
    // What was written is not known to be durable.
    await expect(patient.close()).rejects.toMatchObject({ code: 'ERR_QCOW2_IO', syscall: 'NBD_CMD_FLUSH' })
    expect(() => nbdSource(uri(path), { reconnect: -1 })).toThrow(expect.objectContaining({ field: 'reconnect' }))
  })

  it('does not keep a process that ends', async () => {
    const path = name('sock')
    await using _server = await silentServer({ path, answers: 1 })
    const program = `
      qcow2.open(qcow2.nbdSource(${JSON.stringify(uri(path))}), { format: 'raw' }).then(image => {
        image.read(Buffer.alloc(512), { position: 0 }).catch(() => {})
        setTimeout(() => process.exit(3), 100)
      })`
    const begin = performance.now()
    const { code, stderr } = await execute(
      process.execPath,
      ['-e', `const qcow2 = require(${JSON.stringify(library)})\n${program}`],
      folder,
    )
    expect([code, stderr]).toEqual([3, ''])
    expect(performance.now() - begin).toBeLessThan(15_000)
  })

  it('lists exports', async () => {
    await using server = await served(MIB)
    const [found, ...others] = await listNbd(server.source.uri)
    expect(others).toEqual([])
    expect(found).toMatchObject({
      name: 'e x',
      size: MIB,
      blockSizes: { minimum: 1, preferred: 4096, maximum: 32 * MIB },
      contexts: ['base:allocation'],
      extendedHeaders: true,
    })
    await expect(listNbd(uri(name('sock')))).rejects.toMatchObject({ code: 'ENOENT', syscall: 'connect' })
    expect(existsSync(server.path)).toBe(true)
  })
})
