/** Commands for those who use this program in place of QEMU's: `bench`, `shims`, `completion`. */

import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { asQemuImgProcess, CLI, describeWithQemu, execute, qcow2, workspace } from './run.js'

const folder = workspace()
const run = (...args: string[]) => qcow2(args, folder)

describe('bench', () => {
  it('writes its pattern where it says, and wraps around at the end of the disk', async () => {
    expect(await run('create', '-q', '-f', 'qcow2', 'w.qcow2', '64k')).toMatchObject({ code: 0 })
    const line = 'bench -c 6 -d 2 -w --pattern 7 -s 4k -S 8k -o 40k --flush-interval 2 w.qcow2'
    const { code, stdout } = await run(...line.split(' '))
    expect(code).toBe(0)
    expect(stdout).toMatch(
      /^Sending 6 write requests, 4096 bytes each, 2 in parallel \(starting at offset 40960, step size 8192\)\nSending flush every 2 requests\nRun completed in \d+\.\d{3} seconds\.\n$/,
    )
    expect(await run('convert', '-O', 'raw', 'w.qcow2', 'w.raw')).toMatchObject({ code: 0 })
    const disk = readFileSync(join(folder, 'w.raw'))
    const written = Array.from({ length: 16 }, (_, block) => block).filter(block => disk[block * 4096] === 7)
    // 40 KiB, 48 KiB, 56 KiB, and then 4 KiB and so on: 64 KiB less the room of one request, 60 KiB.
    expect(written).toEqual([1, 3, 5, 10, 12, 14])
  })
})

describeWithQemu('bench beside qemu-img', () => {
  it.each([
    '-c 10',
    '-c 10 -w -d 2 --flush-interval 4',
    '-c 10 -w -d 2 --flush-interval 4 --no-drain -q',
    '-c 10 -S 8k -o 1M -s 512 -n -i threads -t none',
    '-c x',
    '-c 0',
    '-d x',
    '-s 0',
    '--pattern 256',
    '--flush-interval 3',
    '-w --flush-interval 3',
    '-i foo',
    '-t foo',
    '-w -U',
    '-c 10 -s 8M',
  ])('%s', async line => {
    if (!existsSync(join(folder, 'a.qcow2'))) await run('create', '-q', '-f', 'qcow2', 'a.qcow2', '4M')
    const args = ['bench', ...line.split(' '), 'a.qcow2']
    const said = ({ code, stdout, stderr }: Awaited<ReturnType<typeof run>>) => ({
      code,
      stdout: stdout.replace(/in [\d.]+ seconds/, 'in time'),
      stderr,
    })
    expect(said(await asQemuImgProcess(args, folder))).toEqual(said(await execute('qemu-img', args, folder)))
  })
})

describe('shims', () => {
  it('run this program under QEMU’s names, and replace nothing unasked', async () => {
    const at = join(folder, "it's here")
    expect(await run('shims', at)).toMatchObject({ code: 0, stderr: '' })
    const version = await execute(join(at, 'qemu-img'), ['--version'], folder)
    expect(version.stdout).toMatch(/^qemu-img version \d/)
    expect(existsSync(join(at, 'qemu-io')) && existsSync(join(at, 'qemu-nbd'))).toBe(true)
    writeFileSync(join(at, 'qemu-img'), 'mine')
    const { code, stderr } = await run('shims', at)
    expect([code, stderr]).toEqual([1, `qcow2: '${join(at, 'qemu-img')}' exists already: --force replaces it\n`])
    expect(readFileSync(join(at, 'qemu-img'), 'utf8')).toBe('mine')
    expect(await run('shims', '--force', at)).toMatchObject({ code: 0 })
    expect(await execute(join(at, 'qemu-img'), ['--version'], folder)).toEqual(version)
  })

  it.skipIf(process.platform !== 'linux')('say what cannot be made, also where the system makes no folders', () => {
    writeFileSync(join(folder, 'a file'), '')
    for (const [at, said] of [
      ['/proc/none/below', "Could not create '/proc/none': No such file or directory"],
      [join(folder, 'a file'), `Could not create '${join(folder, 'a file/qemu-img')}': Not a directory`],
    ] as const) {
      const { status, stderr } = spawnSync(process.execPath, [CLI, 'shims', at], { encoding: 'utf8', timeout: 20_000 })
      expect({ status, stderr }).toEqual({ status: 1, stderr: `qcow2: ${said}\n` })
    }
  })
})

describe('completion', () => {
  it('of bash completes commands, their options, and formats', async () => {
    const { stdout } = await run('completion', 'bash')
    writeFileSync(join(folder, 'complete.bash'), stdout)
    const complete = async (...words: string[]): Promise<string> => {
      const list = words.map(word => `'${word}'`).join(' ')
      const script = `source ./complete.bash; COMP_WORDS=(${list}); COMP_CWORD=${words.length - 1}; _qcow2; echo "\${COMPREPLY[@]}"`
      return (await execute('bash', ['-c', script], folder)).stdout.trim()
    }
    expect(await complete('qcow2', 'conv')).toBe('convert')
    expect(await complete('qcow2', 'info', '--ba')).toBe('--backing-chain')
    expect(await complete('qcow2', 'convert', '-O', 'ra')).toBe('raw')
    expect(await complete('qcow2', 'resize', '--zzz')).toBe('')
  })

  it('knows every command in each shell, and no other shell', async () => {
    for (const shell of ['bash', 'zsh', 'fish']) {
      const { code, stdout } = await run('completion', shell)
      expect(code).toBe(0)
      for (const name of ['create', 'convert', 'bench', 'completion']) expect(stdout).toContain(name)
    }
    expect(await run('completion', 'csh')).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('bash, zsh or fish'),
    })
  })
})

it.each(['create', 'amend', 'bench', 'completion', 'io', 'nbd'])('%s --help ends with examples', async command => {
  const { stdout } = await run(command, '--help')
  expect(stdout).toMatch(new RegExp(`\\nExamples:\\n  qcow2 ${command} .*\\n  qcow2 ${command} .*\\n$`))
})

it.each(['qemu-io', 'qemu-nbd'])('%s --help ends with examples of that program', async program => {
  symlinkSync(CLI, join(folder, program))
  const { stdout } = await execute(process.execPath, [join(folder, program), '--help'], folder)
  expect(stdout).toMatch(new RegExp(`\\nExamples:\\n  ${program} -.*\\n  ${program} -.*\\n$`))
})
