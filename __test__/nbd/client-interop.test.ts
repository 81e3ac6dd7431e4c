/** The command line on exports of NBD servers, beside QEMU's tools, which read what it wrote. */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, symlinkSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, expect, it } from 'vitest'
import { asQemuImg, CLI, describeWithQemu, execute, type Outcome, qcow2, workspace } from '../cli/run.js'

const folder = workspace()
// Paths of sockets must be short.
const sockets = mkdtempSync(join(tmpdir(), 'q-'))
afterAll(() => rmSync(sockets, { recursive: true, force: true }))
symlinkSync(CLI, join(folder, 'qemu-nbd'))
const asQemuNbd = (...args: readonly string[]): Promise<Outcome> =>
  execute(process.execPath, [join(folder, 'qemu-nbd'), ...args], folder)

const haveNbdkit = spawnSync('nbdkit', ['--version']).status === 0
if (!haveNbdkit) console.warn('SKIPPED tests with nbdkit, which is not installed')

const running: ChildProcess[] = []
afterAll(() => {
  for (const child of running) child.kill()
})

let last = 0

/** Starts a server on a socket, and waits until it answers. */
async function start(program: string, args: (path: string) => readonly string[]): Promise<string> {
  const path = join(sockets, `${++last}`)
  running.push(spawn(program, args(path), { cwd: folder, stdio: 'ignore' }))
  const answers = (): Promise<boolean> =>
    new Promise(resolve => {
      const socket = connect(path)
      socket.once('connect', () => resolve(true)).once('error', () => resolve(false))
      socket.once('close', () => socket.destroy()).once('data', () => socket.destroy())
    })
  await expect.poll(answers, { timeout: 20_000 }).toBe(true)
  return path
}

const qemuNbd = (image: string, ...args: readonly string[]): Promise<string> =>
  start('qemu-nbd', path => ['-t', '-e', '9', '-k', path, ...args, image])

const nbdkit = (...args: readonly string[]): Promise<string> =>
  start('nbdkit', path => ['--foreground', '--unix', path, ...args])

const uri = (path: string, name = ''): string => `nbd+unix:///${name}?socket=${path}`

/** What both tools say. */
async function both(...args: readonly string[]): Promise<readonly [ours: Outcome, theirs: Outcome]> {
  return [await asQemuImg(args, folder), await execute('qemu-img', args, folder)]
}

async function same(...args: readonly string[]): Promise<Outcome> {
  const [ours, theirs] = await both(...args)
  expect(ours, args.join(' ')).toEqual(theirs)
  return ours
}

async function ok(run: Promise<Outcome>): Promise<string> {
  const { code, stdout, stderr } = await run
  expect([code, stderr]).toEqual([0, ''])
  return stdout
}

describeWithQemu('exports of NBD servers', () => {
  it('are written so that qemu-img reads them, and read as qemu-img wrote them', async () => {
    await ok(execute('qemu-img', ['create', '-q', '-f', 'raw', 'disk', '16M'], folder))
    await ok(execute('qemu-img', ['create', '-q', '-f', 'qcow2', 'a.qcow2', '8M'], folder))
    await ok(execute('qemu-io', ['-c', 'write -P 7 1M 1M', '-c', 'write -z 3M 1M', 'a.qcow2'], folder))
    const path = await qemuNbd('disk', '-f', 'raw', '--discard=unmap', '-x', 'exp')
    const where = uri(path, 'exp')
    await ok(execute('qemu-io', ['-f', 'raw', '-c', 'write -P 9 0 16M', where], folder))

    await ok(qcow2(['convert', '-n', '-O', 'raw', 'a.qcow2', where], folder))
    await ok(execute('qemu-io', ['-f', 'raw', '-c', 'read -P 7 1M 1M', '-c', 'read -P 9 8M 8M', where], folder))
    await ok(qcow2(['convert', '-O', 'qcow2', '-c', 'a.qcow2', where], folder))
    expect(await ok(execute('qemu-img', ['compare', 'a.qcow2', where], folder))).toBe('Images are identical.\n')
    await same('info', where)
    await same('info', '--output=json', '-f', 'raw', where)
    await same('check', where)
    await same('compare', 'a.qcow2', where)
    await same('map', '--output=json', '-f', 'raw', where)

    await ok(execute('qemu-img', ['convert', '-O', 'qcow2', '-o', 'cluster_size=4k', 'a.qcow2', where], folder))
    expect(await ok(qcow2(['compare', 'a.qcow2', where], folder))).toBe('Images are identical.\n')
    await ok(qcow2(['convert', '-O', 'raw', where, 'out'], folder))
    await ok(execute('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', 'out', 'a.qcow2'], folder))
    await ok(qcow2(['dd', '-O', 'raw', 'if=a.qcow2', `of=${where}`, 'bs=1M'], folder))
    await ok(execute('qemu-io', ['-f', 'raw', '-c', 'read -P 7 1M 1M', where], folder))

    const older = `nbd:unix:${path}:exportname=exp`
    const io = ['io', '-f', 'raw', '-c', 'write -P 5 0 64k', '-c', 'discard 64k 64k', '-c', 'read -P 5 0 64k']
    const said = await ok(qcow2([...io, '-c', 'flush', older], folder))
    expect(said).toContain('read 65536/65536 bytes')
    await ok(execute('qemu-io', ['-f', 'raw', '-c', 'read -P 5 0 64k', where], folder))
  })

  it('are mapped as qemu-img maps them: data, holes, and zeroes that take space', async () => {
    await ok(
      execute('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', 'map.qcow2', '4M'], folder),
    )
    const commands = ['write -P 7 1M 1M', 'write -z 2M 128k', 'write -z -u 3M 128k'].flatMap(command => ['-c', command])
    await ok(execute('qemu-io', [...commands, 'map.qcow2'], folder))
    const served = [
      await qemuNbd('map.qcow2', '-r', '-f', 'qcow2'),
      await start(process.execPath, path => [
        join(folder, 'qemu-nbd'),
        '-t',
        '-r',
        '-f',
        'qcow2',
        '-k',
        path,
        'map.qcow2',
      ]),
    ]
    const maps: string[] = []
    for (const path of served) maps.push((await same('map', '--output=json', uri(path))).stdout)
    expect(maps[0]).toContain('"zero": true, "data": true')
    expect(maps[1]).toBe(maps[0])

    // Requests longer than 32 bits: written by QEMU to ours, and by ours to QEMU's.
    await ok(execute('qemu-img', ['create', '-q', '-f', 'qcow2', 'long.qcow2', '64G'], folder))
    const large = await start(process.execPath, path => [
      ...[join(folder, 'qemu-nbd'), '-t', '-f', 'qcow2', '--discard=unmap', '-k', path, 'long.qcow2'],
    ])
    const changes = ['write -P 5 30G 1M', 'write -P 6 50G 1M', 'write -z -u -n 20G 20G']
    const asked = [...changes, 'read -P 0 30G 1M', 'read -P 6 50G 1M'].flatMap(command => ['-c', command])
    await ok(execute('qemu-io', ['-f', 'raw', ...asked, uri(large)], folder))
    const { stdout: listed } = await same('map', '--output=json', uri(large))
    expect(listed.split('\n')).toHaveLength(4)
    await ok(execute('qemu-img', ['create', '-q', '-f', 'raw', 'long', '64G'], folder))
    const target = await qemuNbd('long', '-f', 'raw', '--discard=unmap')
    await ok(qcow2(['convert', '-n', '-O', 'raw', uri(large), uri(target)], folder))
    expect(await ok(execute('qemu-img', ['compare', uri(large), uri(target)], folder))).toBe('Images are identical.\n')
  })

  it('are described by json: and by options', async () => {
    await ok(execute('qemu-img', ['create', '-q', '-f', 'qcow2', 'd.qcow2', '8M'], folder))
    const path = await qemuNbd('d.qcow2', '-f', 'qcow2', '-x', 'x?')
    const server = `server.type=unix,server.path=${path},export=x?`
    const file = { driver: 'nbd', server: { type: 'unix', path }, export: 'x?' }
    for (const described of [
      ['-f', 'raw', uri(path, 'x%3F')],
      ['--image-opts', `driver=raw,file.driver=nbd,file.server.type=unix,file.server.path=${path},file.export=x?`],
      [`json:${JSON.stringify({ driver: 'raw', file })}`],
      ['--image-opts', `driver=nbd,${server}`],
      ['--image-opts', `driver=nbd,path=${path},export=x?,open-timeout=3`],
    ]) {
      await same('map', '--output=json', ...described)
    }
    // A file's name is one, whatever it looks like.
    const file_ = await qcow2(['info', '--image-opts', `driver=raw,file.filename=${uri(path, 'x%3F')}`], folder)
    expect(file_).toMatchObject({ code: 1, stderr: expect.stringContaining('No such file or directory') })
    // One export twice.
    await same(
      'compare',
      '--image-opts',
      `driver=raw,file.driver=nbd,file.path=${path},file.export=x?`,
      `driver=nbd,${server}`,
    )
    for (const refused of [
      'driver=nbd',
      'driver=raw,file.driver=nbd',
      `driver=nbd,path=${path},host=x`,
      `driver=nbd,server.path=${path}`,
      `driver=nbd,${server},bla=1`,
    ]) {
      const [ours, theirs] = await both('info', '--image-opts', refused)
      expect([ours.code, ours.stdout], refused).toEqual([theirs.code, theirs.stdout])
    }
    await same('info', '--image-opts', `driver=nbd,${server},tls-creds=t0`)
    const negative = await qcow2(['info', '--image-opts', `driver=nbd,${server},reconnect-delay=-1`], folder)
    expect(negative).toMatchObject({ code: 1, stderr: expect.stringContaining("Parameter 'reconnect-delay'") })
  })

  it('that are not there, in words of qemu-img', async () => {
    const none = join(sockets, 'none')
    for (const name of [uri(none), `nbd:unix:${none}`, 'nbd:127.0.0.1:1', 'nbd://127.0.0.1:1/x']) {
      await same('info', name)
    }
    for (const [name, why] of [
      ['nbds://h/x', 'TLS'],
      ['nbd://', 'the host is missing'],
      ['nbd+unix:///x', '?socket=PATH'],
      ['nbd:h', 'nbd:HOST:PORT'],
    ] as const) {
      const { code, stderr } = await qcow2(['info', name], folder)
      expect(code).toBe(1)
      expect(stderr).toContain(`Could not open '${name}': `)
      expect(stderr).toContain(why)
    }
    await ok(execute('qemu-img', ['create', '-q', '-f', 'raw', 'small', '1M'], folder))
    await ok(execute('qemu-img', ['create', '-q', '-f', 'qcow2', 'large.qcow2', '8M'], folder))
    const path = await qemuNbd('small', '-f', 'raw', '-r')
    expect((await qcow2(['info', uri(path, 'other')], folder)).stderr).toContain("no export 'other'")
    const readOnly = await qcow2(['convert', '-n', '-O', 'raw', 'large.qcow2', uri(path)], folder)
    expect(readOnly).toMatchObject({ code: 1, stderr: expect.stringContaining('ERR_QCOW2_READ_ONLY') })
    const writable = await qemuNbd('small', '-f', 'raw')
    const small = await same('convert', '-n', '-O', 'raw', 'large.qcow2', uri(writable))
    expect(small.stderr).toContain('output file is smaller than input file')
    for (const args of [
      ['create', '-f', 'qcow2', uri(path), '1M'],
      ['nbd', '-s', '-k', join(sockets, 's'), uri(path)],
    ]) {
      const { code, stderr } = await qcow2(args, folder)
      expect([code, stderr.includes('is no file, which is needed here')], args.join(' ')).toEqual([1, true])
    }
  })

  it('are listed as qemu-nbd lists them', async () => {
    await ok(execute('qemu-img', ['create', '-q', '-f', 'qcow2', 'l.qcow2', '8M'], folder))
    const path = join(sockets, 'ours')
    const args = [join(folder, 'qemu-nbd'), '-t', '-e', '9', '-A', '-x', 'e x', '-D', 'a disk', '-k', path, 'l.qcow2']
    running.push(spawn(process.execPath, args, { cwd: folder, stdio: 'ignore' }))
    await expect.poll(async () => (await asQemuNbd('-L', '-k', path)).code, { timeout: 20_000 }).toBe(0)
    const list = (...more: readonly string[]) =>
      Promise.all([asQemuNbd('-L', ...more), execute('qemu-nbd', ['-L', ...more], folder)])
    for (const more of [
      ['-k', path],
      ['-k', join(sockets, 'none')],
      ['-k', path, 'file'],
      ['-k', path, '-x', 'e x'],
      ['-p', '1'],
    ]) {
      const [ours, theirs] = await list(...more)
      expect(ours, more.join(' ')).toEqual(theirs)
    }
    if (!haveNbdkit) return
    for (const options of [['--filter=nozero'], ['--no-sr'], ['-r']]) {
      const [ours, theirs] = await list('-k', await nbdkit(...options, 'memory', '1M'))
      expect(ours, options.join(' ')).toEqual(theirs)
    }
  })

  it.skipIf(!haveNbdkit)('that fail end the command with the error of the server', async () => {
    const path = await nbdkit('--filter=error', 'memory', '8M', 'error=ENOSPC', 'error-pwrite-rate=100%')
    await ok(execute('qemu-img', ['create', '-q', '-f', 'qcow2', 'e.qcow2', '8M'], folder))
    await ok(execute('qemu-io', ['-c', 'write -P 7 1M 1M', 'e.qcow2'], folder))
    const full = await qcow2(['convert', '-n', '-O', 'raw', 'e.qcow2', uri(path)], folder)
    expect(full).toMatchObject({ code: 1, stderr: expect.stringContaining('No space left on device') })
    const bad = await nbdkit('--filter=error', 'memory', '8M', 'error-pread-rate=100%')
    const unread = await qcow2(['convert', '-f', 'raw', '-O', 'raw', uri(bad), 'x'], folder)
    expect(unread).toMatchObject({ code: 1, stderr: expect.stringContaining('Input/output error') })
    // The pattern of 8 bytes is the offset of each.
    const pattern = await nbdkit('pattern', '64M')
    await ok(qcow2(['convert', '-f', 'raw', '-O', 'qcow2', uri(pattern), 'p.qcow2'], folder))
    const compared = execute('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', uri(pattern), 'p.qcow2'], folder)
    expect(await ok(compared)).toBe('Images are identical.\n')
  })
})
