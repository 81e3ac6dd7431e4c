/** Images served over NBD: by the API, by the command line, to this library's own bytes and to the clients that there are. */

import { spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { create, type Image, listNbd, nbdSource, open, serveNbd } from 'qcow2'
import { afterAll, describe, expect, it } from 'vitest'
import { CLI, execute, haveQemu } from '../cli/run.js'
import { library } from '../lifecycle/child.js'

const folder = mkdtempSync(join(tmpdir(), 'qcow2-nbd-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const MIB = 2 ** 20
let last = 0
const name = (kind: string): string => join(folder, `${++last}.${kind}`)

/** A client that is not installed here: its tests are skipped, and say so. */
const has = (program: string): boolean => spawnSync(program, ['--version']).status === 0
const missing = ['nbdinfo', 'nbdcopy', 'fio'].filter(program => !has(program))
if (missing.length > 0) console.warn(`SKIPPED tests of clients that are not installed: ${missing.join(', ')}`)

async function disk(bitmaps: readonly string[] = [], file = name('qcow2')): Promise<Image> {
  const image = await create(file, { size: 8 * MIB })
  for (const each of bitmaps) await image.bitmaps.add(each)
  await image.write(Buffer.alloc(100_000, 7), { position: MIB })
  return image
}

const uri = (path: string, exportName = ''): string => `nbd+unix:///${exportName}?socket=${path}`

/** What a program printed, which must succeed. */
async function out(program: string, ...args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await execute(program, args, folder)
  expect(stderr + String(code)).toBe('0')
  return stdout
}

/** Waits for the greeting of a server. */
const greeted = (path: string): Promise<Socket> =>
  new Promise((resolve, reject) => {
    const socket = connect(path)
    socket.once('data', () => resolve(socket)).once('error', reject)
  })

const ended = (socket: Socket): Promise<unknown> => new Promise(resolve => socket.resume().once('close', resolve))

// Windows serves TCP alone.
describe.skipIf(process.platform === 'win32')('serveNbd', () => {
  it('ends with close(), and leaves no socket', async () => {
    const path = name('sock')
    await using image = await disk()
    const server = await serveNbd(image, { path })
    expect(server.address).toEqual({ path })
    const socket = await greeted(path)
    expect(server.connections).toBe(1)
    await Promise.all([server.close(), server.close(), ended(socket)])
    expect(server.connections).toBe(0)
    expect(existsSync(path)).toBe(false)
    await server.closed
    expect(server.unref().ref()).toBe(server)
  })

  it('ends with its image, with its signal, and with its last client where it is not persistent', async () => {
    const image = await disk()
    const abort = new AbortController()
    const bySignal = await serveNbd(image, { path: name('sock'), signal: abort.signal })
    abort.abort()
    await bySignal.closed
    const path = name('sock')
    const byImage = await serveNbd(image, { path })
    const socket = await greeted(path)
    await Promise.all([image.close(), ended(socket)])
    await byImage.closed
    expect(existsSync(path)).toBe(false)
    await expect(serveNbd(image, { path })).rejects.toMatchObject({ code: 'ERR_QCOW2_CLOSED' })
  })

  it('refuses what makes no sense', async () => {
    await using image = await disk()
    const path = name('sock')
    const refused = (options: object, field: string) =>
      expect(serveNbd(image, options as never)).rejects.toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field })
    await refused({}, 'path')
    await refused({ path, port: 0 }, 'path')
    await refused({ path, host: 'localhost' }, 'host')
    await refused({ path, maxConnections: 0 }, 'maxConnections')
    await refused({ path, exportName: 'x'.repeat(4097) }, 'exportName')
    await refused({ path, description: 'ä'.repeat(2049) }, 'description')
    await refused({ path, offset: 9 * MIB }, 'offset')
    await refused({ path, bitmaps: 'all' }, 'bitmaps')
    await refused({ path, nmae: 1 }, 'nmae')
    await refused({ path: '/x'.repeat(200) }, 'path')
    await refused({ port: 0, host: 'no.such.host.invalid' }, 'host')
    await expect(serveNbd({} as never, { path })).rejects.toMatchObject({ field: 'image' })
    await expect(serveNbd(image, { path, bitmaps: ['no'] })).rejects.toMatchObject({ code: 'ERR_QCOW2_NO_BITMAP' })
    await expect(serveNbd(image, { path: '/nonexistent/sock' })).rejects.toMatchObject({ code: 'ENOENT' })
    await expect(serveNbd(image, { path, signal: AbortSignal.abort() })).rejects.toMatchObject({ name: 'AbortError' })
    const server = await serveNbd(image, { path })
    await expect(serveNbd(image, { path })).rejects.toMatchObject({ code: 'EADDRINUSE', syscall: 'bind' })
    await server.close()
    await image.datasync()
    const read = name('qcow2')
    await (await create(read, { size: MIB })).close()
    await using reading = await open(read)
    await expect(serveNbd(reading, { path, readOnly: false })).rejects.toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
  })

  it('has several images by name, until one of them is closed', async () => {
    const [a, b] = [await disk(['b']), await disk()]
    await b.write(Buffer.from('the other one'), { position: 0 })
    const path = name('sock')
    const exports = [
      { name: 'a', image: a, bitmaps: ['b'], description: 'the first' },
      { name: 'b', image: b, readOnly: true },
      { image: b, offset: MIB },
    ]
    const server = await serveNbd(exports, { path })
    const listed = (await listNbd(uri(path))).map(({ name, description, size, contexts }) => [
      name,
      description,
      size,
      contexts.length,
    ])
    expect(listed).toEqual([
      ['a', 'the first', 8 * MIB, 2],
      ['b', '', 8 * MIB, 1],
      ['', '', 7 * MIB, 1],
    ])
    const opened = (of: string, flags: 'r' | 'r+' = 'r') => open(nbdSource(uri(path, of)), { format: 'raw', flags })
    await expect(opened('c')).rejects.toMatchObject({ message: expect.stringContaining("no export 'c'") })
    await expect(opened('b', 'r+')).rejects.toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
    const first = await opened('a', 'r+')
    await first.write(Buffer.from('over there'), { position: 0 })
    await first.close()
    expect((await a.read(Buffer.alloc(10), { position: 0 })).buffer.toString()).toBe('over there')
    const second = await opened('b')
    expect((await second.read(Buffer.alloc(13), { position: 0 })).buffer.toString()).toBe('the other one')
    await b.close()
    await server.closed
    await second.close()
    await expect(serveNbd(exports, { path })).rejects.toMatchObject({ code: 'ERR_QCOW2_CLOSED' })
    const refused = (list: unknown, options: object, field: string) =>
      expect(serveNbd(list as never, options), JSON.stringify(options)).rejects.toMatchObject({
        code: 'ERR_QCOW2_INVALID_ARGUMENT',
        field,
      })
    await refused([], { path }, 'exports')
    await refused([{ image: a }, { image: a }], { path }, 'name')
    await refused([{ image: a }], { path, exportName: 'x' }, 'exportName')
    await refused([{ image: a, exportName: 'x' }], { path }, 'exportName')
    await refused([{ name: 'x' }], { path }, 'image')
    await refused([{ image: {} }], { path }, 'image')
    await refused([{ image: a, offset: 9 * MIB }], { path }, 'offset')
    await a.close()
  })

  it('keeps the process alive, or does not after unref(), and an exit closes the image', async () => {
    const file = name('qcow2')
    await (await create(file, { size: MIB })).close()
    const program = (then: string): string => `
      const { open, serveNbd } = require(${JSON.stringify(library)})
      open(${JSON.stringify(file)}, { flags: 'r+' }).then(async image => {
        const server = await serveNbd(image, { path: ${JSON.stringify(name('sock'))} })
        ${then}
      })`
    const run = (then: string) => execute(process.execPath, ['-e', program(then)], folder)
    // Without unref() the timer, which does not hold the process, would never come.
    const held = await run(
      `setTimeout(() => { console.log('held'); server.close().then(() => image.close()) }, 300).unref()`,
    )
    expect(held).toMatchObject({ code: 0, stdout: 'held\n' })
    const free = await run(`server.unref(); setTimeout(() => console.log('held'), 5000).unref()`)
    expect(free).toMatchObject({ code: 0, stdout: '' })
    const exit = await run(`process.exit(3)`)
    expect(exit).toMatchObject({ code: 3, stderr: '' })
    await (await open(file, { flags: 'r+' })).close()
  })

  it.skipIf(!haveQemu)("lets QEMU's tools read and write, and sees what they do at once", async () => {
    const [path, file] = [name('sock'), name('qcow2')]
    const image = await disk(['b'], file)
    const server = await serveNbd(image, { path, exportName: 'a b', allocationDepth: true, bitmaps: ['b'] })
    const where = uri(path, 'a%20b')
    const commands = ['write -P 9 4M 64k', 'write -z -u 1M 64k', 'discard 6M 1M', 'read -P 7 1114112 1000', 'flush']
    const io = await out('qemu-io', '-f', 'raw', ...commands.flatMap(each => ['-c', each]), where)
    expect(io).not.toContain('failed')
    const { buffer } = await image.read(Buffer.alloc(4), { position: 4 * MIB })
    expect(buffer).toEqual(Buffer.alloc(4, 9))
    await image.write(Buffer.from('here'), { position: 5 * MIB })
    const raw = name('raw')
    await out('qemu-img', 'convert', '-O', 'raw', '-f', 'raw', where, raw)
    expect(
      readFileSync(raw)
        .subarray(5 * MIB, 5 * MIB + 4)
        .toString(),
    ).toBe('here')
    expect(await out('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', where, raw)).toContain('identical')
    const map = JSON.parse(await out('qemu-img', 'map', '--output=json', '-f', 'raw', where)) as { data: boolean }[]
    expect(map.length).toBeGreaterThan(4)
    await image.close()
    await server.closed
    expect(await out('qemu-img', 'check', file)).toContain('No errors')
  })

  it.skipIf(missing.includes('nbdinfo') || missing.includes('nbdcopy'))('tells libnbd what there is', async () => {
    const path = name('sock')
    await using image = await disk(['b'])
    await using server = await serveNbd(image, { path, description: 'a disk', allocationDepth: true, bitmaps: ['b'] })
    const info = JSON.parse(await out('nbdinfo', '--json', uri(path))) as { exports: Record<string, unknown>[] }
    expect(info.exports[0]).toMatchObject({
      'export-size': 8 * MIB,
      description: 'a disk',
      contexts: ['base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:b'],
      is_read_only: false,
      can_multi_conn: true,
      can_df: true,
      can_fua: true,
      can_trim: true,
      can_zero: true,
    })
    const map = async (context: string) =>
      (
        JSON.parse(await out('nbdinfo', '--json', `--map=${context}`, uri(path))) as { offset: number; type: number }[]
      ).map(({ offset, type }) => [offset, type])
    expect(await map('qemu:dirty-bitmap:b')).toEqual([
      [0, 0],
      [MIB, 1],
      [MIB + 131072, 0],
    ])
    expect(await map('qemu:allocation-depth')).toEqual([
      [0, 0],
      [MIB, 1],
      [MIB + 131072, 0],
    ])
    expect((await map('base:allocation')).slice(0, 2)).toEqual([
      [0, 3],
      [MIB, 0],
    ])
    const [from, to] = [name('raw'), name('raw')]
    writeFileSync(from, Buffer.alloc(8 * MIB, 'pattern of a disk'))
    await out('nbdcopy', '--flush', from, uri(path))
    await out('nbdcopy', uri(path), to)
    expect(readFileSync(to).equals(readFileSync(from))).toBe(true)
    expect(server.connections).toBe(0)
  })

  it.skipIf(missing.includes('fio'))('takes many requests at once from several connections', async () => {
    const path = name('sock')
    await using image = await disk()
    await using server = await serveNbd(image, { path })
    const job = [
      '--name=t',
      '--ioengine=nbd',
      `--uri=${uri(path)}`,
      '--rw=randrw',
      '--bs=4k',
      '--size=4M',
      '--iodepth=32',
    ]
    const { code, stderr, stdout } = await execute('fio', [...job, '--verify=crc32c', '--numjobs=1'], folder)
    if (/engine nbd not loadable|failed to load engine/i.test(stderr + stdout))
      return console.warn('SKIPPED fio: no nbd engine')
    expect(`${code} ${stderr}`).toBe('0 ')
    expect(server.address).toEqual({ path })
  })
})

describe.skipIf(process.platform === 'win32')('the command line', () => {
  const tool = join(folder, 'qemu-nbd')
  symlinkSync(CLI, tool)
  const asQemuNbd = (...args: readonly string[]) => execute(process.execPath, [tool, ...args], folder)

  it('speaks as qemu-nbd does', async () => {
    const file = name('qcow2')
    await (await create(file, { size: MIB })).close()
    const said = async (...args: readonly string[]) => {
      const { code, stderr } = await asQemuNbd(...args)
      expect(code).toBe(1)
      return stderr.split('\n')[0]
    }
    expect(await said()).toBe('qemu-nbd: Invalid number of arguments')
    expect(await said('-k', 'relative', file)).toBe('qemu-nbd: socket path must be absolute')
    expect(await said('-e', 'x', file)).toBe("qemu-nbd: Invalid shared device number 'x'")
    expect(await said('-l', 'no', file)).toBe("qemu-nbd: Failed to load snapshot: Can't find snapshot")
    expect(await said('-B', 'no', '-k', name('sock'), file)).toBe("qemu-nbd: Bitmap 'no' is not found")
    expect(await said('/nonexistent')).toBe(
      "qemu-nbd: Failed to blk_new_open '/nonexistent': Could not open '/nonexistent': No such file or directory",
    )
    const raw = name('raw')
    writeFileSync(raw, Buffer.alloc(512))
    expect(await said('-k', name('sock'), raw)).toContain('probing guessed raw')
    expect((await execute(process.execPath, [CLI, 'nbd', '-c', '/dev/nbd0'], folder)).stderr).toContain(
      "Option '-c' is not supported",
    )
  })

  it('forks off a server that ends with its last client, and one that a signal ends', async () => {
    const file = name('qcow2')
    await (await create(file, { size: MIB })).close()
    const [path, pid] = [name('sock'), name('pid')]
    expect(await asQemuNbd('--fork', '--pid-file', pid, '-k', path, file)).toMatchObject({ code: 0, stderr: '' })
    expect(Number(readFileSync(pid, 'utf8'))).toBeGreaterThan(1)
    if (haveQemu) await out('qemu-io', '-f', 'raw', '-c', 'write -P 3 0 512', uri(path))
    else process.kill(Number(readFileSync(pid, 'utf8')), 'SIGTERM')
    await expect.poll(() => existsSync(pid), { timeout: 10_000 }).toBe(false)
    expect(existsSync(path)).toBe(false)
    const child = spawn(process.execPath, [tool, '-t', '-s', '-k', path, file], { stdio: 'ignore' })
    const exit = new Promise(resolve => child.once('exit', resolve))
    await expect.poll(() => existsSync(path), { timeout: 10_000 }).toBe(true)
    if (haveQemu) await out('qemu-io', '-f', 'raw', '-c', 'write -P 4 0 512', '-c', 'read -P 4 0 512', uri(path))
    child.kill('SIGTERM')
    expect(await exit).toBe(0)
    // What was written went into the temporary overlay.
    await using image = await open(file)
    const { buffer } = await image.read(Buffer.alloc(1), { position: 0 })
    expect(buffer[0]).toBe(haveQemu ? 3 : 0)
  })
})
