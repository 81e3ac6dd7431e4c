/** `convert FILENAME -`: images on standard output. */

import { spawn, spawnSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { buffer as collect } from 'node:stream/consumers'
import { convert, createQcow2Stream, type Qcow2StreamOptions } from 'qcow2'
import { beforeAll, expect, it } from 'vitest'
import { asQemuImg, CLI, execute, workspace } from './run.js'

const folder = workspace()
const DISK = Buffer.alloc(5 * 2 ** 20 + 512)
randomBytes(2 ** 20).copy(DISK, 2 ** 20)
DISK.fill('text ', 3 * 2 ** 20, 4 * 2 ** 20)

const run = (...args: string[]) =>
  spawnSync(process.execPath, [CLI, 'convert', ...args], { cwd: folder, maxBuffer: 2 ** 26 })

beforeAll(async () => {
  writeFileSync(join(folder, 'disk.raw'), DISK)
  await convert(join(folder, 'disk.raw'), join(folder, 'disk.qcow2'), { from: 'raw', to: 'qcow2', compress: true })
})

const streamed = async (options: Qcow2StreamOptions): Promise<Buffer> =>
  collect(await createQcow2Stream(join(folder, 'disk.qcow2'), options))

it.each<[string[], Qcow2StreamOptions]>([
  [['-O', 'qcow2'], {}],
  [
    ['-c', '-O', 'qcow2', '-o', 'compression_type=zstd,cluster_size=4k'],
    { compress: true, create: { compressionType: 'zstd', clusterSize: 4096 } },
  ],
  [[], { to: 'raw' }],
  [['-O', 'vmdk', '-o', 'subformat=streamOptimized'], { to: 'vmdk' }],
  [['-O', 'vpc', '-o', 'subformat=fixed,force_size=on'], { to: 'vpc', create: { forceSize: true } }],
])('convert %j writes what the stream emits', async (args, options) => {
  const { status, stdout, stderr } = run('-f', 'qcow2', ...args, 'disk.qcow2', '-')
  expect({ status, stderr: String(stderr) }).toEqual({ status: 0, stderr: '' })
  expect(stdout.equals(await streamed(options))).toBe(true)
  expect(existsSync(join(folder, '-'))).toBe(false)
})

it('tells how far it is where it is in nobody’s way', async () => {
  const { status, stdout, stderr } = run('-p', '-O', 'qcow2', 'disk.qcow2', '-')
  expect(status).toBe(0)
  expect(stdout.equals(await streamed({}))).toBe(true)
  expect(String(stderr)).toMatch(/^ {4}\(0\.00\/100%\)\r(.*\r)* {4}\(100\.00\/100%\)\r\n$/)
})

it('goes as fast as its reader, and ends when that goes', async () => {
  const child = spawn(process.execPath, [CLI, 'convert', '-O', 'raw', 'disk.qcow2', 'disk.qcow2', '-'], { cwd: folder })
  const errors = collect(child.stderr)
  const ended = new Promise(resolve => child.once('exit', resolve))
  await new Promise(resolve => child.stdout.once('data', resolve))
  child.stdout.pause()
  await new Promise(resolve => setTimeout(resolve, 100))
  expect(child.exitCode).toBeNull()
  child.stdout.destroy()
  expect(await ended).toBe(1)
  expect(String(await errors)).toBe('')
})

it.skipIf(process.platform === 'win32')('is ended by a signal, also while its reader takes nothing', async () => {
  const child = spawn(process.execPath, [CLI, 'convert', '-O', 'raw', 'disk.qcow2', '-'], { cwd: folder })
  const ended = new Promise(resolve => child.once('exit', (...how) => resolve(how)))
  await new Promise(resolve => child.stdout.once('data', resolve))
  child.stdout.pause()
  await new Promise(resolve => setTimeout(resolve, 50))
  child.kill('SIGTERM')
  expect(await ended).toEqual([143, null])
  child.stdout.destroy()
})

it.each([
  [['-n', '-O', 'qcow2'], '-n with standard output is not supported'],
  [['-S', '0', '-O', 'qcow2'], '-S with standard output is not supported'],
  [['-O', 'vdi'], 'Writing vdi to standard output is not supported: only qcow2, raw, vpc and vmdk'],
  [['-O', 'vpc', '-o', 'subformat=dynamic'], 'convert to a file'],
  [['-O', 'qcow2', '-o', 'preallocation=metadata'], 'a stream has no room that is not used'],
  [['-O', 'qcow2', '-B', 'disk.qcow2', '-F', 'qcow2'], '-B with standard output is not supported'],
])('%j is refused', async (args, message) => {
  const { code, stdout, stderr } = await asQemuImg(['convert', ...args, 'disk.qcow2', '-'], folder)
  expect(code).toBe(1)
  expect(stdout).toBe('')
  expect(stderr).toContain(message)
})

it('says what is wrong with a source', async () => {
  const { status, stdout, stderr } = run('-O', 'qcow2', 'none.qcow2', '-')
  expect({ status, stdout: stdout.length }).toEqual({ status: 1, stdout: 0 })
  expect(String(stderr)).toContain("Could not open 'none.qcow2'")
})

it('does not take a file of that name for it', async () => {
  expect(await execute(process.execPath, [CLI, 'convert', '-O', 'raw', 'disk.qcow2', './-'], folder)).toMatchObject({
    code: 0,
    stdout: '',
  })
  expect(readFileSync(join(folder, '-')).equals(DISK)).toBe(true)
})
