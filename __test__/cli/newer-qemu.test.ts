/** What QEMU 11.1 has beside QEMU 10: recorded from its tools, judged by those that are there, and by 11.1's own where they are given. */

import { closeSync, openSync, readFileSync, statSync, truncateSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { Command } from 'commander'
import { describe, expect, it } from 'vitest'
import { declareAmend } from '../../dist/cli/commands/amend.js'
import { declareBitmap } from '../../dist/cli/commands/bitmap.js'
import { declareCheck } from '../../dist/cli/commands/check.js'
import { declareCommit } from '../../dist/cli/commands/commit.js'
import { declareCompare } from '../../dist/cli/commands/compare.js'
import { declareConvert } from '../../dist/cli/commands/convert.js'
import { declareCreate } from '../../dist/cli/commands/create.js'
import { declareDd } from '../../dist/cli/commands/dd.js'
import { declareInfo } from '../../dist/cli/commands/info.js'
import { declareMap } from '../../dist/cli/commands/map.js'
import { declareMeasure } from '../../dist/cli/commands/measure.js'
import { declareRebase } from '../../dist/cli/commands/rebase.js'
import { declareResize } from '../../dist/cli/commands/resize.js'
import { declareSnapshot } from '../../dist/cli/commands/snapshot.js'
import { asQemuImg, describeWithQemu, execute, type Outcome, qcow2, qemuVersion, workspace } from './run.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const run = (...args: string[]): Promise<Outcome> => asQemuImg(args, folder)
const qemu = (...args: string[]): Promise<Outcome> => execute('qemu-img', args, folder)
const fine = async (ended: Promise<Outcome>): Promise<string> => {
  const { code, stdout, stderr } = await ended
  expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
  return stdout
}

/** Suites for which the QEMU on the path may be too old. */
const newest = qemuVersion >= 11
if (!newest) process.stderr.write('SKIPPED (qemu-img is older than 11): comparison with the newest QEMU\n')
const describeWithNewest = describe.skipIf(!newest)

/** The options that the help of QEMU 11.1.3 names. */
const OPTIONS: Readonly<Record<string, string>> = {
  amend: '-o --options -f --format --image-opts -t --cache --force -p -q --quiet --object',
  bitmap:
    '-f --format --image-opts --add -g --granularity --remove --remove-all --clear --enable --disable --merge -b --source-file -F --source-format --object',
  check: '-f --format --image-opts -T --cache -r --repair -U --force-share --output -q --quiet --object',
  commit: '-f --format --image-opts -t --cache -d --drop -b --base -r --rate-limit -p --progress -q --quiet --object',
  compare:
    '-f --a-format -F --b-format --image-opts -s --strict -T --cache -U --force-share -p --progress -q --quiet --object',
  convert:
    '-f --source-format --image-opts -T --source-cache -l --snapshot --bitmaps --skip-broken-bitmaps --salvage -O --target-format --target-image-opts -o --target-format-options -t --target-cache -b --backing -F --backing-format -S --sparse-size -n --no-create --target-is-zero -c --compress -U --force-share -r --rate-limit -m --parallel -C --copy-range-offloading -W --oob-writes -p --progress -q --quiet --object',
  create: '-f --format -o --options -b --backing -B --backing-format -u --backing-unsafe -q --quiet --object',
  dd: '-f --format --image-opts -O --output-format -U --force-share --object',
  info: '-f --format --image-opts --backing-chain -t --cache -U --force-share --limits --output --object',
  map: '-f --format --image-opts -s --start-offset -l --max-length --output -U --force-share --object',
  measure: '-f --format --image-opts -l --snapshot -O --target-format -o --output -U --force-share --object -s --size',
  rebase:
    '-f --format --image-opts -t --cache -b --backing -B --backing-format -T --backing-cache -u --backing-unsafe -c --compress -U --force-share -p --progress -q --quiet --object',
  resize: '-f --format --image-opts --shrink --preallocation -q --quiet --object',
  snapshot:
    '-f --format --image-opts -l --list -c --create -a --apply -d --delete -U --force-share -q --quiet --object',
}

describe('every option of QEMU 11.1', () => {
  const program = new Command()
  for (const declare of [
    ...[declareAmend, declareBitmap, declareCheck, declareCommit, declareCompare, declareConvert, declareCreate],
    ...[declareDd, declareInfo, declareMap, declareMeasure, declareRebase, declareResize, declareSnapshot],
  ]) {
    declare(program, async () => undefined)
  }
  const known = (name: string): string[] =>
    program.commands
      .filter(command => command.name() === name)
      .flatMap(command => command.options.flatMap(({ short, long }) => [short, long]))
      .filter(flag => flag !== undefined)

  it.each(Object.entries(OPTIONS))('is known to %s', (name, flags) => {
    expect(known(name)).toEqual(expect.arrayContaining(flags.split(' ')))
  })

  it.skipIf(qemuVersion === 0).each(Object.keys(OPTIONS))(
    'is known to %s, by the help of the qemu-img that is here',
    async name => {
      const { stdout } = await qemu(name, '--help')
      const listed = stdout.slice(stdout.indexOf('Arguments:')).match(/^ +-[-\w]+(?:, -[-\w]+)*/gm) ?? []
      const flags = listed.flatMap(line => line.split(',').map(flag => flag.trim()))
      // Abbreviated in the help of amend; QEMU 10 lists one that it does not take.
      const real = flags.filter(flag => !['-h', '--help', '--progres', '--source-image-opts'].includes(flag))
      expect(real.length).toBeGreaterThan(1)
      expect(known(name)).toEqual(expect.arrayContaining(real))
    },
  )
})

describeWithQemu('the spellings of QEMU 11.1 beside those of 10', () => {
  it('convert -b, create -B and rebase -B do what -B and -F do', async () => {
    await fine(run('create', '-q', '-f', 'qcow2', 'base.qcow2', '1M'))
    for (const flag of ['-B', '-F', '--backing-format']) {
      await fine(run('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', flag, 'qcow2', 'top.qcow2'))
      expect(JSON.parse(await fine(qemu('info', '--output=json', 'top.qcow2')))).toMatchObject({
        'backing-filename': 'base.qcow2',
        'backing-filename-format': 'qcow2',
      })
    }
    for (const flag of ['-b', '-B', '--backing']) {
      await fine(run('convert', '-O', 'qcow2', flag, 'base.qcow2', '-F', 'qcow2', 'top.qcow2', 'copy.qcow2'))
      expect(JSON.parse(await fine(qemu('info', '--output=json', 'copy.qcow2')))).toMatchObject({
        'backing-filename': 'base.qcow2',
      })
    }
    await fine(run('create', '-q', '-f', 'raw', 'base.raw', '1M'))
    await fine(run('rebase', '--backing-unsafe', '-b', 'base.raw', '-B', 'raw', '--backing-cache', 'none', 'top.qcow2'))
    expect(JSON.parse(await fine(qemu('info', '--output=json', 'top.qcow2')))).toMatchObject({
      'backing-filename': 'base.raw',
      'backing-filename-format': 'raw',
    })
  })

  it('a value is checked however its option is spelled', async () => {
    await fine(run('create', '-q', '-f', 'qcow2', 'base.qcow2', '1M'))
    for (const flag of ['--rate', '--rate-limit']) {
      const { code, stderr } = await run('convert', flag, 'x', 'base.qcow2', 'copy.raw')
      expect({ code, stderr }).toEqual({ code: 1, stderr: expect.stringContaining('rate limit') })
    }
    const { stderr } = await run(
      'convert',
      '-O',
      'qcow2',
      '--target-format-options',
      'foo=1',
      'base.qcow2',
      'copy.qcow2',
    )
    expect(stderr).toContain("Invalid parameter 'foo'")
    expect((await run('convert', '--snapshot', 'none', 'base.qcow2', 'copy.raw')).stderr).toContain(
      "Can't find snapshot",
    )
  })

  it('a newer option leaves the abbreviations of older ones', async () => {
    await fine(run('create', '-q', '-f', 'qcow2', 'short.qcow2', '1M'))
    await fine(run('bitmap', '--ad', 'short.qcow2', 'a'))
    await fine(run('bitmap', '--rem', 'short.qcow2', 'a'))
    await fine(run('bitmap', '--remove-a', 'short.qcow2'))
  })
})

const bitmapsOf = async (name: string): Promise<unknown> =>
  JSON.parse(await fine(qemu('info', '--output=json', name)))['format-specific'].data.bitmaps?.map(
    ({ name, flags }: { name: string; flags: string[] }) => [name, ...flags],
  ) ?? []

describeWithQemu('bitmap --remove-all', () => {
  it('removes all bitmaps, inconsistent ones too, and needs no name', async () => {
    await fine(run('create', '-q', '-f', 'qcow2', 'bitmaps.qcow2', '1M'))
    await fine(run('bitmap', '--remove-all', 'bitmaps.qcow2'))
    for (const name of ['a', 'b']) await fine(qemu('bitmap', '--add', 'bitmaps.qcow2', name))
    // Left in use, as by a crash.
    await execute('qemu-io', ['-c', 'write 0 64k', '-c', 'abort', 'bitmaps.qcow2'], folder)
    expect(await bitmapsOf('bitmaps.qcow2')).toEqual([
      ['a', 'in-use', 'auto'],
      ['b', 'in-use', 'auto'],
    ])
    await fine(run('bitmap', '--remove-all', 'bitmaps.qcow2'))
    expect(await bitmapsOf('bitmaps.qcow2')).toEqual([])
    await fine(qemu('check', 'bitmaps.qcow2'))
  })

  it('is one of several actions, in the order of the command line', async () => {
    await fine(run('create', '-q', '-f', 'qcow2', 'several.qcow2', '1M'))
    await fine(run('bitmap', '--add', 'several.qcow2', 'a'))
    await fine(run('bitmap', '--remove-all', '--add', 'several.qcow2', 'b'))
    expect(await bitmapsOf('several.qcow2')).toEqual([['b', 'auto']])
    await fine(run('bitmap', '--add', '--remove-all', 'several.qcow2', 'c'))
    expect(await bitmapsOf('several.qcow2')).toEqual([])
    await fine(qemu('check', 'several.qcow2'))
  })

  it.each([
    ['-f', 'raw'],
    ['-f', 'qcow2', '-o', 'compat=v2'],
  ])('does nothing to an image that can have none: %s %s', async (...how) => {
    await fine(run('create', '-q', ...how, 'none.img', '1M'))
    const before = readFileSync(at('none.img'))
    await fine(run('bitmap', '--remove-all', 'none.img'))
    expect(readFileSync(at('none.img')).equals(before)).toBe(true)
  })

  it.each([
    [['--remove-all', 'several.qcow2', 'a'], 'Expecting filename'],
    [['--remove-all'], 'Expecting filename'],
    [['--remove-all', '--remove', 'several.qcow2'], 'Expecting filename and bitmap name'],
    [['--remove-all', '--remove', 'several.qcow2', 'a'], 'Operation remove on bitmap a failed'],
    [['--remove-all', '-g', '64k', 'several.qcow2'], 'granularity only supported with --add'],
    [['--remove-all', '-b', 'x', 'several.qcow2'], 'Merge bitmap source file only supported with --merge'],
    [['several.qcow2'], 'Need at least one of --add, --remove, --remove-all, --clear, --enable, --disable, or --merge'],
  ])('%j: %s', async (args, message) => {
    const ours = await run('bitmap', ...args)
    expect({ code: ours.code, line: ours.stderr.split('\n')[0] }).toEqual({
      code: 1,
      line: expect.stringContaining(`qemu-img: ${message}`),
    })
    if (newest) {
      const theirs = await qemu('bitmap', ...args)
      expect(theirs.code).toBe(1)
      expect(theirs.stderr).toContain(`qemu-img: ${message}`)
    }
  })
})

/** A data file with something in it. */
function dataFile(name: string, length: number): Buffer {
  const bytes = Buffer.alloc(length)
  for (let i = 0; i < length; i += 7) bytes[i] = ((i * 31) % 251) + 1
  writeFileSync(at(name), bytes)
  return bytes
}

describeWithQemu('keep_data_file', () => {
  it.each([
    ['data_file_raw=on', 1 << 20],
    ['preallocation=metadata', 1 << 20],
    ['data_file_raw=on,preallocation=metadata', 1 << 20],
    // QEMU 11.1 leaves the subclusters unallocated: its image hides the data file.
    ['data_file_raw=on,extended_l2=on', 1 << 20],
    ['preallocation=metadata,extended_l2=on', 1 << 20],
    ['data_file_raw=on', 100_000],
    ['data_file_raw=on', 3 << 20],
  ])('%s makes an image of a data file of %d bytes', async (options, length) => {
    const bytes = dataFile('kept.raw', length)
    const list = `data_file=kept.raw,keep_data_file=on,${options}`
    const { ino } = statSync(at('kept.raw'))
    await fine(run('create', '-q', '-f', 'qcow2', '-o', list, 'kept.qcow2', '1M'))
    const now = readFileSync(at('kept.raw'))
    expect(now.length).toBe(Math.max(length, 1 << 20))
    expect(now.subarray(0, length).equals(bytes)).toBe(true)
    expect(now.subarray(length).every(byte => byte === 0)).toBe(true)
    expect(statSync(at('kept.raw')).ino).toBe(ino)
    await fine(qemu('convert', '-f', 'qcow2', '-O', 'raw', 'kept.qcow2', 'read.raw'))
    expect(readFileSync(at('read.raw')).equals(now.subarray(0, 1 << 20))).toBe(true)
    await fine(qemu('check', 'kept.qcow2'))
    await fine(run('compare', '-f', 'raw', '-F', 'qcow2', 'read.raw', 'kept.qcow2'))
  })

  it('shows the backing file through what is not allocated, as QEMU does', async () => {
    dataFile('kept.raw', 1 << 20)
    await fine(run('create', '-q', '-f', 'raw', 'back.raw', '64k'))
    const list = 'data_file=kept.raw,keep_data_file=on,preallocation=metadata,extended_l2=on'
    await fine(run('create', '-q', '-f', 'qcow2', '-o', list, '-b', 'back.raw', '-B', 'raw', 'kept.qcow2', '1M'))
    await fine(qemu('convert', '-f', 'qcow2', '-O', 'raw', 'kept.qcow2', 'read.raw'))
    expect(readFileSync(at('read.raw')).every(byte => byte === 0)).toBe(true)
  })

  it('converts into a data file in place, zeroes too', async () => {
    const old = dataFile('kept.raw', 2 << 20)
    const { ino } = statSync(at('kept.raw'))
    writeFileSync(at('source.raw'), '')
    truncateSync(at('source.raw'), 1 << 20)
    const file = openSync(at('source.raw'), 'r+')
    writeSync(file, 'here', 70_000)
    closeSync(file)
    const list = 'data_file=kept.raw,keep_data_file=on,data_file_raw=on'
    await fine(run('convert', '-f', 'raw', '-O', 'qcow2', '-o', list, 'source.raw', 'kept.qcow2'))
    const now = readFileSync(at('kept.raw'))
    expect(now.subarray(0, 1 << 20).equals(readFileSync(at('source.raw')))).toBe(true)
    // Behind the disk's end nothing is anybody's but the owner's.
    expect(now.subarray(1 << 20).equals(old.subarray(1 << 20))).toBe(true)
    expect(statSync(at('kept.raw')).ino).toBe(ino)
    await fine(qemu('compare', '-f', 'raw', '-F', 'qcow2', 'source.raw', 'kept.qcow2'))
    await fine(qemu('check', 'kept.qcow2'))
  })

  it('does not convert a file into itself', async () => {
    const bytes = dataFile('kept.raw', 1 << 20)
    const list = 'data_file=kept.raw,keep_data_file=on,data_file_raw=on'
    const { code } = await run('convert', '-f', 'raw', '-O', 'qcow2', '-o', list, 'kept.raw', 'new.qcow2')
    expect(code).toBe(1)
    expect(readFileSync(at('kept.raw')).equals(bytes)).toBe(true)
  })

  it('off is what is done without it', async () => {
    dataFile('lost.raw', 1 << 20)
    await fine(run('create', '-q', '-f', 'qcow2', '-o', 'data_file=lost.raw,keep_data_file=off', 'lost.qcow2', '1M'))
    expect(readFileSync(at('lost.raw')).every(byte => byte === 0)).toBe(true)
  })

  const NEEDS =
    "'keep_data_file=on' requires 'preallocation=metadata' or 'data_file_raw=on', or the file contents will not be visible"
  const OVERWRITES =
    "Preallocating more than only metadata would overwrite the external data file's content and is therefore incompatible with " +
    "'keep_data_file=on'"
  it.each([
    ['keep_data_file=on', "Must not use 'keep_data_file=on' without 'data_file'"],
    ['keep_data_file=on,data_file_raw=on', "Must not use 'keep_data_file=on' without 'data_file'"],
    ['keep_data_file=on,data_file=kept.raw', NEEDS],
    ['keep_data_file=on,data_file=kept.raw,preallocation=off', NEEDS],
    ['keep_data_file=on,data_file=kept.raw,preallocation=falloc', OVERWRITES],
    ['keep_data_file=on,data_file=kept.raw,data_file_raw=on,preallocation=full', OVERWRITES],
    ['keep_data_file=on,data_file=none.raw,data_file_raw=on', "Could not open 'none.raw': No such file or directory"],
  ])('%s: %s', async (list, message) => {
    const bytes = dataFile('kept.raw', 1 << 20)
    const args = ['create', '-q', '-f', 'qcow2', '-o', list, 'refused.qcow2', '1M']
    const expected = { code: 1, stderr: `qemu-img: refused.qcow2: ${message}\n` }
    const ours = await run(...args)
    expect({ code: ours.code, stderr: ours.stderr }).toEqual(expected)
    expect(readFileSync(at('kept.raw')).equals(bytes)).toBe(true)
    if (newest) expect(await qemu(...args)).toMatchObject(expected)
  })

  it('does not change what a measurement says', async () => {
    const plain = await fine(run('measure', '-O', 'qcow2', '--size', '1M'))
    expect(await fine(run('measure', '-O', 'qcow2', '-o', 'keep_data_file=on', '--size', '1M'))).toBe(plain)
  })
})

const loopDevices = process.getuid?.() === 0 && (await execute('losetup', ['--version'], folder)).code === 0

describe('info --limits', () => {
  const devices = newest && loopDevices
  it('tells the limits of an image and of its file', async () => {
    await fine(run('create', '-q', '-f', 'qcow2', 'limits.qcow2', '1M'))
    const text = await fine(run('info', '--limits', 'limits.qcow2'))
    // As QEMU 11.1.3 prints them for a file on a system with pages of 4 KiB.
    const page = /opt mem alignment: (\d+)/.exec(text)?.[1]
    expect(Number(page)).toBeGreaterThanOrEqual(4096)
    expect(text).toContain(
      'Block limits:\n    write zeroes alignment: 65536\n    request alignment: 1\n    min mem alignment: 1\n' +
        `    discard alignment: 65536\n    opt mem alignment: ${page}\n    max iov: 1024\nFormat specific information:\n`,
    )
    expect(text).toMatch(
      new RegExp(
        `    Block limits:\n        request alignment: 1\n        min mem alignment: 1\n        opt mem alignment: ${page}\n        max iov: 1024\n$`,
      ),
    )
    const json = JSON.parse(await fine(run('info', '--limits', '-t', 'none', '--output=json', 'limits.qcow2')))
    expect(json.limits).toMatchObject({ 'request-alignment': 1, 'discard-alignment': 65536, 'max-iov': 1024 })
    const plain = JSON.parse(await fine(run('info', '--output=json', 'limits.qcow2')))
    expect([plain.limits, plain.children[0].info.limits]).toEqual([undefined, undefined])
  })

  it.skipIf(qemuVersion < 11).each([
    ['qcow2', '', 'writeback'],
    ['qcow2', 'cluster_size=2M,extended_l2=on', 'writeback'],
    ['qcow2', 'cluster_size=512', 'writethrough'],
    ['raw', '', 'writeback'],
    ['raw', '', 'unsafe'],
  ])('says what QEMU says of %s %s, cache %s', async (format, options, cache) => {
    const list = options === '' ? [] : ['-o', options]
    await fine(run('create', '-q', '-f', format, ...list, 'same.img', '1M'))
    for (const extra of [[], ['--output=json'], ['-f', format]]) {
      const args = ['info', '--limits', '-t', cache, ...extra, 'same.img']
      expect(await fine(run(...args))).toBe(await fine(qemu(...args)))
    }
  })

  if (!devices) process.stderr.write('SKIPPED (no root, losetup or QEMU 11): the limits of a device\n')
  it.skipIf(!devices).each([[512], [4096]])(
    'says what QEMU says of a device with sectors of %d bytes',
    async sector => {
      writeFileSync(at('device.img'), '')
      truncateSync(at('device.img'), 4 << 20)
      const attach = ['--find', '--show', '--sector-size', String(sector), 'device.img']
      const device = (await fine(execute('losetup', attach, folder))).trim()
      try {
        for (const format of ['raw', 'qcow2']) {
          if (format === 'qcow2') await fine(run('create', '-q', '-f', 'qcow2', device, '1M'))
          for (const extra of [[], ['-t', 'none', '--output=json'], ['-t', 'directsync', '-f', format]]) {
            // The kernel says more of the alignment of memory than QEMU finds out by trying.
            const told = (text: string): string => text.replace(/(min.mem.alignment\W+)\d+/g, '$1')
            const args = ['info', '--limits', ...extra, device]
            expect(told(await fine(run(...args)))).toBe(told(await fine(qemu(...args))))
          }
        }
      } finally {
        await fine(execute('losetup', ['--detach', device], folder))
      }
    },
  )

  it('refuses a cache mode that there is not', async () => {
    const { code, stderr } = await run('info', '-t', 'bogus', 'limits.qcow2')
    expect({ code, stderr }).toEqual({ code: 1, stderr: expect.stringContaining('Invalid cache option: bogus') })
  })
})

describeWithNewest('the options of new images', () => {
  it.each(['qcow2', 'raw'])('of %s are those that QEMU 11.1 lists', async format => {
    const names = (text: string): string[] => [...text.matchAll(/^ {2}([\w.]+)=/gm)].map(([, name = '']) => name)
    const theirs = names(await fine(qemu('create', '-f', format, '-o', 'help', 'x')))
    const own = new Set(names(await fine(qcow2(['create', '-f', format, '-o', 'help', 'x'], folder))))
    expect(theirs).toContain('nocow')
    expect(theirs.filter(name => !own.has(name))).toEqual([])
  })
})
