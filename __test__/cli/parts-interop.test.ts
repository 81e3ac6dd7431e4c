/** Existing targets, several sources, parts of a disk and damaged sources, side by side with qemu-img. */

import { cpSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { asQemuImg, describeWithQemu, execute, type Outcome, workspace } from './run.js'

const folder = workspace()

const run = async (cwd: string, file: string, ...args: string[]) => {
  const ended = await execute(file, args, cwd)
  if (ended.code !== 0) throw new Error(`${file} ${args.join(' ')}: ${ended.stdout}${ended.stderr}`)
  return ended.stdout
}
const io = (cwd: string, file: string, ...commands: string[]) =>
  run(cwd, 'qemu-io', '-f', 'qcow2', ...commands.flatMap(command => ['-c', command]), file)

/** Sources and targets; then copied, so that each tool has its own. */
async function images(name: string) {
  const [ours, theirs] = [join(folder, `${name}.ours`), join(folder, `${name}.theirs`)]
  mkdirSync(ours)
  const create = (file: string, size: string, ...more: string[]) =>
    run(ours, 'qemu-img', 'create', '-q', '-f', 'qcow2', ...more, file, size)
  await create('base', '3M')
  await io(ours, 'base', 'write -P 1 0 2M')
  await create('source', '3000k', '-b', 'base', '-F', 'qcow2')
  await io(ours, 'source', 'write -P 2 1M 300k', 'write -z 1500k 100k', 'write -P 0 512k 64k', 'write -P 3 2999k 1k')
  await create('small', '1M', '-o', 'cluster_size=512')
  await io(ours, 'small', 'write -P 4 10k 5k', 'write -P 5 1020k 4k')
  writeFileSync(join(ours, 'odd'), Buffer.alloc(70_001, 6))
  const full = async (file: string, size: string, ...more: string[]) => {
    await create(file, size, ...more)
    await io(ours, file, `write -P 9 0 ${size}`)
  }
  await create('empty', '4M')
  await create('exact', '3000k')
  await full('full', '3000k')
  await full('larger', '4M', '-o', 'cluster_size=16k')
  await full('subclusters', '3000k', '-o', 'extended_l2=on')
  await full('old', '3000k', '-o', 'compat=0.10')
  await create('overlay', '3M', '-b', 'larger', '-F', 'qcow2')
  writeFileSync(join(ours, 'raw'), Buffer.alloc(3 << 20, 9))
  cpSync(ours, theirs, { recursive: true })
  return { ours, theirs }
}

const words = (ended: Outcome) => ({
  code: ended.code,
  stdout: ended.stdout.replace(/( {4}\(0\.00\/100%\)\r)(?: {4}\([\d.]+\/100%\)\r)*/g, '$1'),
  stderr: ended.stderr.replace(/^Try .*\n/m, ''),
})

/** Runs the same command in both folders; compares what is said, and what `target` reads as afterwards. */
async function sideBySide(
  { ours, theirs }: { ours: string; theirs: string },
  args: string[],
  target?: [string, string],
) {
  const mine = await asQemuImg(args, folder, ours)
  const other = await execute('qemu-img', args, theirs)
  expect(words(mine)).toEqual(words(other))
  if (target === undefined || other.code !== 0) return other
  const [file, format] = target
  for (const cwd of [ours, theirs]) {
    await run(cwd, 'qemu-img', 'convert', '-f', format, '-O', 'raw', file, 'got')
    if (format === 'qcow2') await run(cwd, 'qemu-img', 'check', '-q', file)
  }
  const [a, b] = [readFileSync(join(ours, 'got')), readFileSync(join(theirs, 'got'))]
  expect(a.length).toBe(b.length)
  expect(a.equals(b)).toBe(true)
  return other
}

describeWithQemu('convert into an image that exists', () => {
  it.concurrent.each([
    ['full', []],
    ['empty', []],
    ['empty', ['--target-is-zero', '-p']],
    ['larger', []],
    ['larger', ['-S', '0']],
    ['full', ['-m', '1', '-S', '64k']],
    ['subclusters', []],
    ['old', []],
    ['exact', ['-c']],
    ['overlay', []],
    ['overlay', ['-t', 'none']],
  ])('%s %s', async (target, args) => {
    const folders = await images(`${target} ${args.join(' ').replaceAll('/', '')}`)
    const other = await sideBySide(
      folders,
      ['convert', '-n', ...args, '-O', 'qcow2', 'source', target],
      [target, 'qcow2'],
    )
    expect(other.code).toBe(0)
    // Compressed clusters where there is data already: QEMU cannot write those.
    await run(
      folders.ours,
      process.execPath,
      join(folder, 'qemu-img'),
      'convert',
      '-n',
      '-c',
      '-O',
      'qcow2',
      'small',
      target,
    )
    await run(folders.ours, 'qemu-img', 'check', '-q', target)
    const part = await run(folders.ours, 'qemu-img', 'dd', '-O', 'raw', 'bs=1M', 'count=1', `if=${target}`, 'of=part')
    expect(part).toBe('')
    expect(await run(folders.ours, 'qemu-img', 'compare', '-F', 'raw', 'small', 'part')).toBe('Images are identical.\n')
  })

  it.concurrent.each([
    ['onto', []],
    ['onto', ['-S', '0']],
    ['onto', ['-m', '1', '-S', '64k']],
    ['used', []],
    ['full', []],
    ['empty', []],
    ['subclusters', []],
  ])('onto a base: %s %s', async (target, args) => {
    const folders = await images(`base ${target} ${args.join(' ').replaceAll('/', '')}`)
    for (const cwd of [folders.ours, folders.theirs]) {
      for (const [file, cluster] of [
        ['onto', '64k'],
        ['used', '4k'],
      ] as const) {
        const options = ['-o', `cluster_size=${cluster}`, '-b', 'base', '-F', 'qcow2', file, '3000k']
        await run(cwd, 'qemu-img', 'create', '-q', '-f', 'qcow2', ...options)
      }
      await io(cwd, 'used', 'write -P 8 1M 1M', 'write -P 8 1400k 300k')
    }
    const order = ['convert', '-n', '-B', 'base', ...args, '-O', 'qcow2', 'source', target]
    expect((await sideBySide(folders, order, [target, 'qcow2'])).code).toBe(0)
    if (target !== 'onto') return
    expect(await run(folders.ours, 'qemu-img', 'compare', 'source', target)).toBe('Images are identical.\n')
    const { stdout } = await execute('qemu-img', ['map', '--output=json', target], folders.ours)
    const depths = (JSON.parse(stdout) as { depth: number; start: number }[]).filter(({ start }) => start === 0)
    expect(depths).toMatchObject([{ depth: 1 }])
  })

  it.concurrent('onto what is no base is refused', async () => {
    const folders = await images('no base')
    const before = readFileSync(join(folders.ours, 'full'))
    for (const [args, message] of [
      [['-B', 'small'], 'is not in the backing chain of the source'],
      [['-B', 'base', '--target-is-zero'], 'lacks what the base has'],
      [['-B', 'base', '-c'], 'its clusters are not whole'],
    ] as const) {
      const ended = await asQemuImg(['convert', '-n', ...args, '-O', 'qcow2', 'source', 'full'], folder, folders.ours)
      expect(ended).toMatchObject({ code: 1, stdout: '', stderr: expect.stringContaining(message) })
      expect(readFileSync(join(folders.ours, 'full')).equals(before)).toBe(true)
    }
  })

  it.concurrent('refuses in the same words, and changes nothing', async () => {
    const folders = await images('refused target')
    const before = readFileSync(join(folders.ours, 'small'))
    for (const args of [
      ['-n', '-O', 'qcow2', 'source', 'small'],
      ['-n', '-O', 'qcow2', 'source', 'nowhere'],
      ['-n', '-O', 'raw', '-c', 'source', 'raw'],
      ['-n', '-O', 'raw', 'larger', 'raw'],
      ['-O', 'qcow2', '--target-is-zero', 'source', 'new'],
      ['-n', '-O', 'qcow2', '-o', 'size=1M', 'source', 'full'],
      ['-C', '--salvage', 'source', 'new'],
    ]) {
      const other = await sideBySide(folders, ['convert', ...args])
      expect(other.code).toBe(1)
      expect(readFileSync(join(folders.ours, 'small')).equals(before)).toBe(true)
    }
    // How a size is wrong, each version of qemu-img says in its own words.
    for (const args of [
      ['convert', '-r', 'fast', 'source', 'new'],
      ['dd', 'bs=x', 'if=source', 'of=new'],
    ]) {
      expect((await asQemuImg(args, folder, folders.ours)).code).toBe(1)
      expect((await execute('qemu-img', args, folders.theirs)).code).toBe(1)
    }
    const itself = await asQemuImg(['convert', '-n', '-O', 'qcow2', 'source', 'source'], folder, folders.ours)
    expect(itself).toMatchObject({ code: 1, stderr: expect.stringContaining('also a source') })
  })
})

describeWithQemu('several sources', () => {
  it.concurrent('become one disk', async () => {
    const folders = await images('several')
    for (const [list, ...args] of [
      ['source small'],
      ['small source small', '-O', 'qcow2'],
      ['source small full', '-O', 'qcow2', '-c', '-o', 'compression_type=zstd'],
      ['odd odd small', '-p'],
      ['odd odd', '-f', 'raw', '-O', 'qcow2', '-o', 'preallocation=metadata'],
    ] as [string, ...string[]][]) {
      const format = args.includes('qcow2') ? 'qcow2' : 'raw'
      await sideBySide(folders, ['convert', ...args, ...list.split(' '), 'together'], ['together', format])
    }
    await sideBySide(folders, ['convert', '-n', '-O', 'qcow2', 'small', 'odd', 'full'], ['full', 'qcow2'])
  })

  it.concurrent('refused in the same words', async () => {
    const folders = await images('refused sources')
    for (const args of [
      ['-O', 'qcow2', '-B', 'base', '-F', 'qcow2', 'source', 'small', 'new'],
      ['-l', 'one', 'source', 'small', 'new'],
      ['-O', 'qcow2', '--bitmaps', 'source', 'small', 'new'],
      ['source', 'nowhere', 'new'],
      ['-n', '-O', 'qcow2', 'source', 'small', 'full'],
    ]) {
      expect((await sideBySide(folders, ['convert', ...args])).code).toBe(1)
    }
  })
})

describeWithQemu('dd', () => {
  it.concurrent.each([
    [[]],
    [['bs=64k']],
    [['bs=1M', 'count=1']],
    [['bs=1M', 'skip=1']],
    [['bs=1M', 'count=2', 'skip=1']],
    [['bs=1M', 'count=1', 'skip=2']],
    [['bs=1k', 'skip=2999', 'count=9999']],
    [['bs=700', 'count=3000', 'skip=11']],
    [['skip=100000']],
    [['bs=1M', 'count=0']],
    [['count=9223372036854775807', 'bs=64k']],
    [['bs=2G']],
    [['bs=0']],
    [['count=-1']],
    [['bs']],
    [['seek=1']],
  ])('%s', async operands => {
    const folders = await images(`dd ${operands.join(' ')}`)
    for (const format of ['raw', 'qcow2']) {
      const args = ['dd', '-O', format, ...operands, 'if=source', 'of=part']
      await sideBySide(folders, args, ['part', format])
    }
  })

  it.concurrent('of a raw disk, over a file that exists; and refused in the same words', async () => {
    const folders = await images('dd raw')
    await sideBySide(
      folders,
      ['dd', '-f', 'raw', 'bs=1000', 'skip=3', 'count=50', 'if=odd', 'of=full'],
      ['full', 'raw'],
    )
    for (const args of [['if=odd'], ['of=part'], ['if=nowhere', 'of=part'], ['-O', 'wrong', 'if=odd', 'of=part'], []]) {
      expect((await sideBySide(folders, ['dd', ...args])).code).toBe(1)
    }
  })
})

describeWithQemu('a damaged source', () => {
  it.concurrent('is saved as far as it can be read', async () => {
    const folders = await images('salvage')
    for (const cwd of [folders.ours, folders.theirs]) {
      await run(cwd, 'qemu-img', 'convert', '-c', '-O', 'qcow2', 'source', 'packed')
      // The compressed data of the third guest cluster.
      const bytes = readFileSync(join(cwd, 'packed'))
      const table = Number(bytes.readBigUInt64BE(Number(bytes.readBigUInt64BE(40))) & 0x00fffffffffffe00n)
      const entry = bytes.readBigUInt64BE(table + 8 * 2)
      expect(entry >> 62n).toBe(1n)
      const data = Number(entry & ((1n << 54n) - 1n))
      bytes.fill(0xff, data, data + 20)
      writeFileSync(join(cwd, 'packed'), bytes)
    }
    expect((await asQemuImg(['convert', 'packed', 'out'], folder, folders.ours)).code).toBe(1)
    const mine = await asQemuImg(['convert', '--salvage', 'packed', 'out'], folder, folders.ours)
    const other = await execute('qemu-img', ['convert', '--salvage', 'packed', 'out'], folders.theirs)
    expect(mine.code).toBe(0)
    expect(other.code).toBe(0)
    expect(mine.stderr).toMatch(/warning: error while reading 65536 bytes at offset 131072: /)
    const [a, b] = [readFileSync(join(folders.ours, 'out')), readFileSync(join(folders.theirs, 'out'))]
    expect(a.equals(b)).toBe(true)
    const quiet = await asQemuImg(['convert', '-q', '--salvage', 'packed', 'out'], folder, folders.ours)
    expect(quiet).toMatchObject({ code: 0, stderr: '' })
  })
})
