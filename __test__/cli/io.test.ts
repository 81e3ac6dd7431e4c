/** `qcow2 io`: qemu-io's commands, what they print, and what they leave in the image. */

import { spawn } from 'node:child_process'
import { existsSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { check, create, open } from '../../dist/index.mjs'
import { CLI, execute, type Outcome, qcow2, workspace } from './run.js'

const folder = workspace()
symlinkSync(CLI, join(folder, 'qemu-io'))

const asQemuIo = (...args: string[]): Promise<Outcome> =>
  execute(process.execPath, [join(folder, 'qemu-io'), ...args], folder)

/** Runs commands on an image. */
const io = (image: string, ...commands: string[]): Promise<Outcome> =>
  asQemuIo('-f', 'qcow2', ...commands.flatMap(each => ['-c', each]), image)

async function make(name: string, options = {}): Promise<string> {
  const image = await create(join(folder, name), { size: 2 ** 26, ...options })
  await image.close()
  return name
}

/** The program with commands on its input. */
function withInput(args: readonly string[], input: string): Promise<Outcome> {
  const child = spawn(process.execPath, [join(folder, 'qemu-io'), ...args], { cwd: folder })
  let [stdout, stderr] = ['', '']
  child.stdout.on('data', (bytes: Buffer) => (stdout += bytes.toString()))
  child.stderr.on('data', (bytes: Buffer) => (stderr += bytes.toString()))
  child.stdin.end(input)
  return new Promise(resolve => {
    child.on('close', (code, signal) => resolve({ code, signal, stdout, stderr }))
  })
}

const RESULT = / 1 ops; \d\d\.\d\d sec \([\d.]+ (bytes|[KMGTPE]iB)\/sec and \d+\.\d{4} ops\/sec\)$/

test('what is written is read, and durable when the program ends', async () => {
  const name = await make('written.qcow2')
  const wrote = await io(name, 'write -P 0x5a 4k 4608', 'read -P 90 4k 4608')
  expect(wrote).toMatchObject({ code: 0, stderr: '' })
  const lines = wrote.stdout.split('\n')
  expect(lines[0]).toBe('wrote 4608/4608 bytes at offset 4096')
  expect(lines[1]).toMatch(/^4\.500 KiB,/)
  expect(lines[1]).toMatch(RESULT)
  expect(lines[2]).toBe('read 4608/4608 bytes at offset 4096')
  await using image = await open(join(folder, name))
  const { buffer } = await image.read(Buffer.alloc(4610), { position: 4095 })
  expect(buffer[0]).toBe(0)
  expect(buffer.subarray(1, 4609).every(byte => byte === 0x5a)).toBe(true)
  expect(buffer[4609]).toBe(0)
})

test('commands of the input are asked for one by one, also the one without an end', async () => {
  const name = await make('input.qcow2')
  const { code, stdout, stderr } = await withInput(['-f', 'qcow2', name], 'length\n\nfoo\nlength')
  expect(stdout).toBe('qemu-io> 64 MiB\nqemu-io> qemu-io> qemu-io> 64 MiB\nqemu-io> ')
  expect(stderr).toBe('command "foo" not found\n')
  expect(code).toBe(1)
  const ended = await withInput(['-f', 'qcow2', name], 'quit\nlength\n')
  expect(ended).toMatchObject({ code: 0, stdout: 'qemu-io> ' })
})

test('a command of the input is executed when its line is there, not when the input ends', async () => {
  const name = await make('live.qcow2')
  const child = spawn(process.execPath, [join(folder, 'qemu-io'), '-f', 'qcow2', name], { cwd: folder })
  try {
    const answer = new Promise<string>(resolve => {
      let text = ''
      child.stdout.on('data', (bytes: Buffer) => {
        text += bytes.toString()
        if (text.includes('MiB')) resolve(text)
      })
    })
    child.stdin.write('length\n')
    expect(await answer).toContain('64 MiB')
  } finally {
    child.stdin.end()
    await new Promise(resolve => child.on('close', resolve))
  }
})

test('a signal ends the process at once, and what was printed is there', async () => {
  const name = await make('killed.qcow2', { lazyRefcounts: true })
  const killed = await io(name, 'write -P 1 0 64k', 'sigraise 9', 'write 1M 64k')
  expect(killed.signal).toBe('SIGKILL')
  expect(killed.stdout).toMatch(/^wrote 65536\/65536 bytes at offset 0\n/)
  // The incompatible feature bits: the image was not closed.
  expect(readFileSync(join(folder, name)).readBigUInt64BE(72)).toBe(1n)
  expect((await io(name, 'sigraise 15')).signal).toBe('SIGTERM')
  expect((await io(name, 'abort')).signal).toBe('SIGABRT')
})

test('requests go on together, and all are done when the program ends', async () => {
  const name = await make('aio.qcow2')
  const writes = Array.from({ length: 20 }, (_, at) => `aio_write -q -P ${at + 1} ${at}M 64k`)
  const reads = Array.from({ length: 20 }, (_, at) => `aio_read -q -P ${at + 1} ${at}M 64k`)
  const done = await io(name, ...writes, 'aio_flush', ...reads, 'aio_write -P 9 63M 1M')
  expect(done).toMatchObject({ code: 0, stderr: '' })
  expect(done.stdout).toMatch(/^wrote 1048576\/1048576 bytes at offset 66060288\n/)
  expect((await check(join(folder, name))).corruptions).toBe(0)
  // What comes of them is no failure of the command.
  expect(await io(name, 'aio_read -P 7 0 512', 'aio_flush')).toMatchObject({ code: 0 })
})

test('what the command line has below an image is below it with -s, too', async () => {
  const base = await create(join(folder, 'moved.qcow2'), { size: 1 << 20 })
  await base.write(Buffer.alloc(512, 7), { position: 0 })
  await base.close()
  // What it names is not there.
  const named = 'create -q -f qcow2 -u -b gone.qcow2 -F qcow2 child.qcow2 1M'
  expect(await qcow2(named.split(' '), folder)).toMatchObject({ code: 0 })
  const described = 'driver=qcow2,file.filename=child.qcow2,backing.driver=qcow2,backing.file.filename=moved.qcow2'
  for (const way of [['-r'], ['-s'], ['-s', '-c', 'write -q -P 8 4k 512']]) {
    const { code, stdout, stderr } = await asQemuIo(...way, '-c', 'read -q -P 7 0 512', '--image-opts', described)
    expect({ way, code, stdout, stderr }).toEqual({ way, code: 0, stdout: '', stderr: '' })
  }
})

test('-s leaves the image as it is, and nothing behind', async () => {
  const name = await make('snapshot.qcow2')
  const before = readFileSync(join(folder, name))
  const outcome = await asQemuIo(
    '-s',
    '-f',
    'qcow2',
    '-c',
    'write -P 3 0 1M',
    '-c',
    'read -P 3 0 1M',
    '-c',
    'map',
    name,
  )
  expect(outcome).toMatchObject({ code: 0, stderr: '' })
  expect(outcome.stdout).toContain('1 MiB (0x100000) bytes     allocated at offset 0 bytes (0x0)')
  expect(readFileSync(join(folder, name)).equals(before)).toBe(true)
})

test('-r refuses what writes, reopen -w allows it, and reopen -r refuses it again', async () => {
  const name = await make('reopen.qcow2')
  const commands = ['write 0 512', 'reopen -w', 'write -q 0 512', 'reopen -r', 'write 0 512', 'read -q -P 205 0 512']
  const outcome = await asQemuIo('-r', '-f', 'qcow2', ...commands.flatMap(each => ['-c', each]), name)
  const refusal = 'qemu-io: Block node is read-only\n'
  expect(outcome).toMatchObject({ code: 1, stdout: '', stderr: refusal + refusal })
})

test('a reopening that fails leaves the image open as it was', async () => {
  const name = await make('kept.qcow2')
  const outcome = await io(
    name,
    'reopen -o lazy-refcounts=on,overlap-check=blubb',
    'write -q 0 512',
    'read -q -P 205 0 512',
  )
  expect(outcome.code).toBe(1)
  expect(outcome.stderr).toContain("Unsupported value 'blubb'")
  expect(outcome.stdout).toBe('')
})

test('what is not supported is refused by name', async () => {
  const name = await make('refused.qcow2')
  const outcome = await asQemuIo('-C', '-c', 'length', name)
  expect(outcome).toMatchObject({ code: 1, stdout: '' })
  expect(outcome.stderr).toBe("qemu-io: Option '-C' is not supported: reading does not write to the image\n")
  const remote = await asQemuIo('-c', 'length', 'nbd+unix:///?socket=/none')
  expect(remote.code).toBe(1)
  expect(remote.stderr).toBe(
    "qemu-io: can't open device nbd+unix:///?socket=/none: Failed to connect to '/none': No such file or directory\n",
  )
})

test('under our own name a failed request says what is wrong, too', async () => {
  const name = await make('own.qcow2')
  const outcome = await qcow2(['io', '-c', 'write -c 512 512', '-c', 'read 64M 1', name], folder)
  expect(outcome.code).toBe(1)
  expect(outcome.stdout).toBe('write failed: Invalid argument\nread failed: Input/output error\n')
  expect(outcome.stderr).toMatch(/^qcow2: a compressed write takes whole clusters .* \(ERR_QCOW2_INVALID_ARGUMENT\)\n$/)
  expect((await qcow2(['io', '--help'], folder)).stdout).toMatch(/^Usage: qcow2 io /)
  expect((await asQemuIo('--help')).stdout).toMatch(/^Usage: qemu-io \[options\]/)
  expect((await asQemuIo('-V')).stdout).toMatch(/^qemu-io version /)
})

test('a pattern file is written over and over', async () => {
  const name = await make('file.qcow2')
  writeFileSync(join(folder, 'pattern'), 'abc')
  expect((await io(name, 'write -q -s pattern 0 10')).code).toBe(0)
  const shown = await io(name, 'read -v 0 12')
  expect(shown.stdout).toContain('00000000:  61 62 63 61 62 63 61 62 63 61 00 00  abcabcabca..\n')
  const absent = await io(name, 'write -s nothing 0 10')
  expect(absent).toMatchObject({ code: 1, stderr: 'nothing: No such file or directory\n' })
  expect(existsSync(join(folder, 'nothing'))).toBe(false)
})

test('encrypted images are opened by --image-opts, and by open -o', async () => {
  const name = await make('locked.qcow2', { encrypt: { secret: 'hush', iterTime: 10 } })
  const secret = ['--object', 'secret,id=s,data=hush']
  const described = `driver=qcow2,encrypt.key-secret=s,file.filename=${name}`
  const wrote = await asQemuIo(...secret, '--image-opts', '-c', 'write -q -P 4 0 64k', described)
  expect(wrote).toMatchObject({ code: 0, stderr: '' })
  const read = await asQemuIo(...secret, '-c', `open -o ${described}`, '-c', 'read -q -P 4 0 64k')
  expect(read).toMatchObject({ code: 0, stdout: '', stderr: '' })
})
