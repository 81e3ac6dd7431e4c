import { spawnSync } from 'node:child_process'
import { closeSync, existsSync, openSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { noise } from './noise.js'
import { asQemuImgProcess, CLI, execute, qcow2, workspace } from './run.js'

const folder = workspace()
const run = (...args: string[]) => qcow2(args, folder)

describe('a wrong command line', () => {
  it.concurrent.each([
    [[], 'Not enough arguments', '--help'],
    [['frobnicate'], 'Command not found: frobnicate', '--help'],
    [['--frobnicate'], "unrecognized option '--frobnicate'", '--help'],
    [['create'], 'Expecting image file name', 'create --help'],
    [['create', 'a', '1', '2'], 'Unexpected argument: 2', 'create --help'],
    [['info'], 'Expecting one image file name', 'info --help'],
    [['info', 'a', 'b'], 'Expecting one image file name', 'info --help'],
    [['compare', 'a'], 'Expecting two image file names', 'compare --help'],
    [['measure', 'a', 'b'], 'At most one filename argument is allowed.', 'measure --help'],
    [['check', '-r', 'some', 'a'], "--repair (-r) expects 'leaks' or 'all', not 'some'", 'check --help'],
    [['info', '--output=xml', 'a'], "--output expects 'human' or 'json', not 'xml'", 'info --help'],
    [['map', '--output=xml', 'a'], "--output expects 'human', 'json' or 'svg', not 'xml'", 'map --help'],
  ])('%j', async (args, message, help) => {
    expect(await run(...args)).toEqual({
      code: 1,
      signal: null,
      stdout: '',
      stderr: `qcow2: ${message}\nTry 'qcow2 ${help}' for more information\n`,
    })
  })

  // In the name of the command, as getopt does.
  it.concurrent.each([
    [['create', '-Q', 'a'], "invalid option -- 'Q'"],
    [['create', '-qZ', 'a'], "invalid option -- 'Z'"],
    [['convert', '-6', 'a', 'b'], "invalid option -- '6'"],
    [['create', 'a', '-1'], "invalid option -- '1'"],
    [['resize', '-1', 'a'], "invalid option -- '1'"],
    [['create', '-f'], "option requires an argument -- 'f'"],
    [['create', '--form'], "option '--format' requires an argument"],
    [['info', '--frobnicate', 'a'], "unrecognized option '--frobnicate'"],
    [['info', '--force=on', 'a'], "option '--force-share' doesn't allow an argument"],
    [['info', '--f=x', 'a'], "option '--f=x' is ambiguous; possibilities: '--format' '--force-share'"],
  ])('%j has a wrong option', async (args, message) => {
    const [command] = args
    expect(await run(...args)).toEqual({
      code: 1,
      signal: null,
      stdout: '',
      stderr: `qcow2 ${command}: ${message}\nTry 'qcow2 ${command} --help' for more information\n`,
    })
  })

  it.concurrent.each([
    [['bench', '--flush-interval', '3', 'a'], '--flush-interval is only available in write tests'],
    [['info', '--image-opts', 'driver=qcow2'], 'A block device must be specified for "file"'],
    [['info', '--object', 'secret,id=s', 'a'], "Must provide 'file' or 'data' property"],
    [['convert', '--target-image-opts', 'a', 'b'], '--target-image-opts requires use of -n flag'],
    [['convert', '-m', '17', 'a', 'b'], "specified: '17'. Must be between 1 and 16."],
    [['convert', '-O', 'qcow2', '-c', '--level', '50', 'a', 'b'], "specified: '50'. Must be between 1 and 22."],
    [['convert', '-S', '1000', 'a', 'b'], 'Valid sizes are multiples of 512 up to 16777216.'],
    [['convert', '-t', 'wrong', 'a', 'b'], 'Invalid cache option: wrong'],
    [['convert', '--level', '5', 'a', 'b'], '--level requires use of -c flag'],
    [['create', '-o', ',', 'a', '1M'], 'Invalid option list: ,'],
    [['create', 'a', '1Z'], "Invalid image size specified: '1Z'.\nOptional suffix k, M, G, T, P or E"],
    [['create', 'a', '8E'], 'Invalid image size specified. Must be between 0 and 9223372036854775807.'],
    [['create', '-f', 'qcow2', '-o', 'encryption=on', 'a', '1M'], "Option 'encryption' is not supported"],
    [['create', '-f', 'qed', 'a', '1M'], "Format driver 'qed' is not supported"],
    [['map', '--picture', '--output=json', 'a'], '--picture cannot be used together with --output=json.'],
    [['map', '-o', 'x', 'a'], '-o requires --output=svg.'],
    [['info', 'ssh://localhost/x'], "Could not open 'ssh://localhost/x': Unknown protocol 'ssh'"],
    [['create', 'json:{"driver":"qcow2"}', '1M'], 'json: descriptions are not followed'],
    [['map', '-f', 'qed', 'a'], "Could not open 'a': Unknown driver 'qed'"],
  ])('%j is refused', async (args, message) => {
    const { code, stdout, stderr } = await run(...args)
    expect({ code, stdout }).toEqual({ code: 1, stdout: expect.stringMatching(/^(Formatting .*\n)?$/) })
    expect(stderr).toContain(message)
    expect(stderr).toMatch(/^(qcow2: .*\n)+((Try|Optional suffix|and exabytes,|The formats|A file with) .*\n)*$/)
    expect(readdirSync(folder)).not.toContain('a')
  })
})

describe('help', () => {
  it('is there for the program and each command, and lists every option', async () => {
    const { code, stdout } = await run('--help')
    expect(code).toBe(0)
    for (const name of ['create', 'convert', 'info', 'map', 'check', 'measure', 'compare']) {
      expect(stdout).toContain(`  ${name} `)
      const help = await run(name, '--help')
      expect(help).toMatchObject({ code: 0, stderr: '' })
      expect(help.stdout).toContain(`Usage: qcow2 ${name} [options]`)
      expect((await run(name, '-h')).stdout).toBe(help.stdout)
    }
  })

  it('tells the version of the package', async () => {
    const { version } = JSON.parse(readFileSync(join(CLI, '../../package.json'), 'utf8'))
    for (const flag of ['-V', '--version']) {
      expect(await run(flag)).toEqual({ code: 0, signal: null, stdout: `qcow2 version ${version}\n`, stderr: '' })
    }
  })

  it('speaks under the name that it was called by', async () => {
    expect((await asQemuImgProcess(['frobnicate'], folder)).stderr).toMatch(
      /^qemu-img: Command not found: frobnicate\n/,
    )
  })

  it('gives errors of an image their code, but not under the name of qemu-img', async () => {
    const header = Buffer.alloc(4096)
    header.write('QFI\xfb', 'latin1')
    header.writeUInt32BE(9, 4)
    writeFileSync(join(folder, 'version9.qcow2'), header)
    const { code, stderr } = await run('info', 'version9.qcow2')
    expect(code).toBe(1)
    expect(stderr).toMatch(/^qcow2: Could not open 'version9\.qcow2': .*9.* \(ERR_QCOW2_UNSUPPORTED_FEATURE\)\n$/)
    const other = await asQemuImgProcess(['info', 'version9.qcow2'], folder)
    expect(other.stderr).toMatch(/^qemu-img: Could not open 'version9\.qcow2': /)
    expect(other.stderr).not.toContain('ERR_')
  })

  it('ends quietly when nobody reads on', async () => {
    const command = `"${process.execPath}" "${CLI}" convert --help`
    const { stdout, stderr } = await execute('sh', ['-c', `{ ${command}; echo "code $?" >&2; } | true`], folder)
    expect({ stdout, stderr }).toEqual({ stdout: '', stderr: 'code 0\n' })
  })
})

describe('a file of another kind', () => {
  it('is raw only if it looks like nothing known', async () => {
    writeFileSync(join(folder, 'disk.qed'), Buffer.concat([Buffer.from('QED\0', 'latin1'), noise(4096)]))
    for (const args of [['map'], ['check'], ['convert', '-O', 'qcow2']]) {
      const { code, stderr } = await run(...args, 'disk.qed', ...(args[0] === 'convert' ? ['out.qcow2'] : []))
      expect(code).toBe(1)
      expect(stderr).toContain("Could not open 'disk.qed': Image is in qed format, which is not supported")
    }
    expect((await run('info', 'disk.qed')).stdout).toContain('file format: qed\n')
    expect((await run('info', '-f', 'raw', 'disk.qed')).stdout).toContain('file format: raw\n')
    writeFileSync(join(folder, 'small.raw'), noise(1 << 20))
    expect((await run('info', 'small.raw')).stdout).toContain('file format: raw\n')
    expect(existsSync(join(folder, 'out.qcow2'))).toBe(false)
  })
})

describe('pictures', () => {
  it('are drawn in the terminal, or written as SVG', async () => {
    const picture = await run('map', '--picture', 'small.raw')
    expect(picture).toMatchObject({ code: 0, stderr: '' })
    expect(picture.stdout).toContain(' small.raw  raw · 1 MiB · 1 MiB on disk')
    expect(picture.stdout).toMatch(/│█+│/)
    expect(picture.stdout).not.toContain('\u001b')
    const svg = await run('map', '--output=svg', 'small.raw')
    expect(svg.stdout).toMatch(/^<svg .*<\/svg>\n$/s)
    expect(await run('map', '--output=svg', '-o', 'map.svg', 'small.raw')).toMatchObject({ code: 0, stdout: '' })
    expect(readFileSync(join(folder, 'map.svg'), 'utf8')).toBe(svg.stdout)
    expect(statSync(join(folder, 'map.svg')).size).toBeGreaterThan(1000)
  })
})

describe.skipIf(!existsSync('/dev/full'))('output that cannot be written', () => {
  it('is told in one line, and is a failure', async () => {
    expect(await run('create', '-q', '-f', 'raw', 'told.raw', '1M')).toMatchObject({ code: 0 })
    for (const args of [['info', 'told.raw'], ['map', '--output=json', 'told.raw'], ['--help']]) {
      const full = openSync('/dev/full', 'w')
      const stdio = ['ignore', full, 'pipe'] as const
      const ended = spawnSync(process.execPath, [CLI, ...args], { cwd: folder, stdio: [...stdio], encoding: 'utf8' })
      closeSync(full)
      expect(ended.stderr).toMatch(/^qcow2: the output cannot be written: ENOSPC.*\n$/)
      expect(ended.status).toBe(1)
    }
  })
})
