/** `convert - TARGET`: images from standard input. */

import { spawn } from 'node:child_process'
import { createReadStream, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { compare, convert, create, inspect } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { shell } from '../api/shell.js'
import { CLI, workspace } from './run.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const SIZE = 1 << 20
const DISK = Buffer.concat([Buffer.from('a disk '.repeat(50_000)), Buffer.alloc(SIZE)]).subarray(0, SIZE)

beforeAll(async () => {
  writeFileSync(at('disk.raw'), DISK)
  await convert(at('disk.raw'), at('disk.qcow2'), { from: 'raw', to: 'qcow2', compress: true })
  await convert(at('disk.raw'), at('disk.vmdk'), { from: 'raw', to: 'vmdk', create: { subformat: 'streamOptimized' } })
  await (await create(at('over.qcow2'), { backingFile: 'disk.qcow2', backingFormat: 'qcow2' })).close()
})

/** What a script prints, and that nothing is left where it fails. */
function run(script: string): { code: number | null; stdout: string; stderr: string } {
  const before = readdirSync(folder)
  const { code, stdout, stderr } = shell(folder, script)
  if (code !== 0) expect(readdirSync(folder)).toEqual(before)
  return { code, stdout: stdout.toString(), stderr: stderr.toString() }
}

const isDisk = async (name: string, format: 'qcow2' | 'raw'): Promise<boolean> =>
  (await compare(at('disk.raw'), at(name), { formatA: 'raw', formatB: format })).identical

describe('convert -', () => {
  it.each([
    ['disk.qcow2', '', 'raw'],
    ['disk.qcow2', '-f qcow2 -O qcow2 -c -m 4', 'qcow2'],
    ['disk.vmdk', '-O qcow2', 'qcow2'],
    ['disk.raw', '-f raw -O qcow2 -o cluster_size=4k', 'qcow2'],
  ] as const)('takes %s from a pipe and a file: %s', async (source, options, format) => {
    for (const script of [
      `cat ${source} | qcow2 convert ${options} - out`,
      `qcow2 convert ${options} - out < ${source}`,
    ]) {
      expect(run(script)).toEqual({ code: 0, stdout: '', stderr: '' })
      expect(await isDisk('out', format)).toBe(true)
      if (options.includes('4k')) expect(await inspect(at('out'))).toMatchObject({ clusterSize: 4096 })
      // An existing target is replaced, as that of any other convert.
      expect(run(script).code).toBe(0)
      rmSync(at('out'))
    }
  })

  it('takes compressed raw disks, and writes into a target that exists', async () => {
    expect(run('gzip -c disk.raw | qcow2 convert - -O qcow2 out').stderr).toBe('')
    expect(await isDisk('out', 'qcow2')).toBe(true)
    expect(run('qcow2 convert -n -O qcow2 - out < disk.qcow2')).toMatchObject({ code: 0, stderr: '' })
    expect(await isDisk('out', 'qcow2')).toBe(true)
    rmSync(at('out'))
  })

  it('shows its progress', () => {
    const { code, stdout } = run('qcow2 convert -p - out < disk.qcow2')
    expect(code).toBe(0)
    expect(stdout).toMatch(/\(100\.00\/100%\)/)
    rmSync(at('out'))
  })

  it.each([
    ['qcow2 convert - out < disk.raw', /^qcow2: Could not open standard input: its first bytes .*\n.*-f raw/],
    ['head -c 5000 disk.qcow2 | qcow2 convert - out', /^qcow2: .*outside the file \(5000 bytes\).*ERR_QCOW2_CORRUPT/],
    ['qcow2 convert - out < over.qcow2', /disk\.qcow2.*ERR_QCOW2_REFERENCE_DENIED/],
    [
      'qcow2 convert -B disk.qcow2 -F qcow2 -O qcow2 - out < disk.qcow2',
      /^qcow2: -B is not possible with standard input/,
    ],
    ['qcow2 convert -r 1M - out < disk.qcow2', /^qcow2: -r is not possible/],
    ['qcow2 convert --salvage - out < disk.qcow2', /^qcow2: --salvage is not possible/],
    ['qcow2 convert -f nonsense - out < disk.qcow2', /Unknown driver 'nonsense'/],
    ['qcow2 convert - no/out < disk.qcow2', /No such file or directory/],
  ])('says what is wrong: %s', (script, message) => {
    const { code, stderr } = run(script)
    expect(stderr).toMatch(message)
    expect(code).toBe(1)
  })

  it('ends with a signal while it waits, and leaves nothing', async () => {
    const before = readdirSync(folder)
    const child = spawn(process.execPath, [CLI, 'convert', '-O', 'qcow2', '-f', 'raw', '-', 'out'], { cwd: folder })
    createReadStream(at('disk.raw')).pipe(child.stdin, { end: false })
    await new Promise(resolve => setTimeout(resolve, 500))
    child.kill('SIGINT')
    const code = await new Promise(resolve => child.on('exit', (status, signal) => resolve(status ?? signal)))
    expect([130, 'SIGINT']).toContain(code)
    expect(readdirSync(folder)).toEqual(before)
    expect(readFileSync(at('disk.raw')).length).toBe(SIZE)
  })
})
