import { spawn } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { noise } from './noise.js'
import { CLI, qcow2, workspace } from './run.js'

const folder = workspace()
const run = (...args: string[]) => qcow2(args, folder)

describe('short options', () => {
  it('may be joined, and may follow the file names', async () => {
    expect(await run('create', '-qf', 'qcow2', 'joined.qcow2', '1M')).toEqual({
      code: 0,
      signal: null,
      stdout: '',
      stderr: '',
    })
    expect(await run('convert', 'joined.qcow2', '-qcOqcow2', 'again.qcow2')).toMatchObject({ code: 0, stderr: '' })
    expect(JSON.parse((await run('info', 'again.qcow2', '--output', 'json')).stdout)).toMatchObject({
      format: 'qcow2',
      'virtual-size': 1 << 20,
    })
    expect(await run('compare', '--', 'joined.qcow2', 'again.qcow2')).toMatchObject({
      code: 0,
      stdout: 'Images are identical.\n',
    })
  })
})

describe('a conversion', () => {
  it('reports how far it is, in the form that programs look for', async () => {
    writeFileSync(join(folder, 'noise.raw'), noise(48 << 20))
    const { code, stdout, stderr } = await run('convert', '-pcO', 'qcow2', '-m2', 'noise.raw', 'noise.qcow2')
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
    expect(stdout).toMatch(/^ {4}\(0\.00\/100%\)\r( {4}\(\d+\.\d\d\/100%\)\r)* {4}\(100\.00\/100%\)\r\n$/)
    const percents = [...stdout.matchAll(/\((\d+\.\d\d)\/100%\)/g)].map(([, percent]) => Number(percent))
    expect(percents).toEqual(percents.toSorted((a, b) => a - b))
    expect(await run('compare', '-p', 'noise.raw', 'noise.qcow2')).toMatchObject({
      code: 0,
      stdout: expect.stringMatching(/\(100\.00\/100%\)\r\nImages are identical\.\n$/),
    })
    expect(await run('convert', '-pqO', 'qcow2', 'noise.raw', 'noise.qcow2')).toMatchObject({ code: 0, stdout: '' })
  })

  it('replaces a file, but never its own source', async () => {
    writeFileSync(join(folder, 'small.raw'), noise(1 << 20))
    writeFileSync(join(folder, 'old.qcow2'), 'something else')
    expect(await run('convert', '-O', 'qcow2', 'small.raw', 'old.qcow2')).toMatchObject({ code: 0, stderr: '' })
    const { code, stderr } = await run('convert', '-O', 'qcow2', 'small.raw', './small.raw')
    expect(code).toBe(1)
    expect(stderr).toContain('small.raw')
    expect(readFileSync(join(folder, 'small.raw')).equals(noise(1 << 20))).toBe(true)
  })

  it.each([
    ['SIGINT', 130],
    ['SIGTERM', 143],
    ['SIGHUP', 129],
  ] as const)('that %s ends leaves nothing behind', async (signal, code) => {
    writeFileSync(join(folder, 'long.raw'), noise(192 << 20))
    const before = readdirSync(folder).sort()
    const args = ['convert', '-p', '-c', '-O', 'qcow2', '-o', 'compression_type=zstd', '--level', '19', '-m', '1']
    const child = spawn(process.execPath, [CLI, ...args, 'long.raw', 'long.qcow2'], { cwd: folder })
    let stdout = ''
    const ended = new Promise<number | null>(resolve => child.on('exit', resolve))
    child.stdout.on('data', chunk => {
      stdout += chunk
      // Well into the work: past the first line that is not "nothing yet". Once: the second signal does not wait.
      if (!child.killed && /\((?!0\.00)/.test(stdout)) child.kill(signal)
    })
    expect(await ended).toBe(code)
    expect(readdirSync(folder).sort()).toEqual(before)
    expect(existsSync(join(folder, 'long.qcow2'))).toBe(false)
  })

  it.each([
    [['-n', '-O', 'qcow2'], "Could not open 'refused.img': No such file or directory"],
    [['-n', '-c'], 'Compression not supported for this file format'],
    [
      ['-c', '-O', 'qcow2', '--level', '22'],
      "Invalid compression level specified: '22'. Must be between 1 and 12 for zlib.",
    ],
    [['-c', '-O', 'qcow2', '--window', 'tiny'], 'Allowed choices are full, small.'],
    [['--window', 'small'], '--window requires use of -c flag'],
  ])('with %j is refused', async (args, message) => {
    const before = readdirSync(folder)
    const { code, stdout, stderr } = await run('convert', ...args, 'small.raw', 'refused.img')
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' })
    expect(stderr).toContain(message)
    expect(readdirSync(folder)).toEqual(before)
  })

  it('into what cannot be written says so and leaves nothing', async () => {
    const { code, stderr } = await run('convert', '-O', 'qcow2', 'small.raw', 'no-such-folder/x.qcow2')
    expect(code).toBe(1)
    expect(stderr).toMatch(
      /^qcow2: no-such-folder\/x\.qcow2: error while converting qcow2: .*No such file or directory\n$/,
    )
  })
})
