/** commit and rebase, side by side with qemu-img on copies of the same chain. */

import { cpSync, mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { asQemuImg, describeWithQemu, execute, workspace } from './run.js'

const folder = workspace()

const run = async (cwd: string, file: string, ...args: string[]) => {
  const ended = await execute(file, args, cwd)
  if (ended.code !== 0) throw new Error(`${file} ${args.join(' ')}: ${ended.stdout}${ended.stderr}`)
  return ended.stdout
}

/** base <- mid <- top, and another base; then copied, so that each tool has its own. */
async function chain(
  name: string,
  options: Partial<Record<'base' | 'mid' | 'top', string>> = {},
  extra = async (_: string) => {},
) {
  const [ours, theirs] = [join(folder, `${name}.ours`), join(folder, `${name}.theirs`)]
  mkdirSync(ours)
  const create = (file: string, size: string, list: string | undefined, ...backing: string[]) =>
    run(ours, 'qemu-img', 'create', '-q', '-f', 'qcow2', ...(list ? ['-o', list] : []), ...backing, file, size)
  const io = (file: string, ...commands: string[]) =>
    run(ours, 'qemu-io', '-f', 'qcow2', ...commands.flatMap(command => ['-c', command]), file)
  await create('base', '4M', options.base)
  await io('base', 'write -P 1 0 2M', 'write -P 7 3M 512k')
  // QEMU cannot grow an image of version 2 that is shorter than its backing file.
  await create('mid', options.mid?.includes('compat=0.10') ? '5M' : '3M', options.mid, '-b', 'base', '-F', 'qcow2')
  await io('mid', 'write -P 2 1M 512k', 'write -P 3 2M 100k')
  await create('top', '5M', options.top, '-b', 'mid', '-F', 'qcow2')
  await io('top', 'write -P 4 300k 100k', 'write -P 0 1200k 64k', 'write -P 5 4900k 10k')
  if (!options.top?.includes('compat=0.10')) await io('top', 'write -z 100k 64k', 'write -z -u 1M 64k')
  await create('other', '2M', undefined)
  await io('other', 'write -P 1 0 1M', 'write -P 9 1M 1M')
  await run(ours, 'qemu-img', 'convert', '-O', 'raw', 'base', 'plain')
  await extra(ours)
  await run(ours, 'qemu-img', 'convert', '-O', 'raw', 'top', 'want')
  cpSync(ours, theirs, { recursive: true })
  return { ours, theirs }
}

/** What qemu-img says of an image, without what depends on the layout of the file. */
async function info(cwd: string, file: string): Promise<unknown> {
  const parsed = JSON.parse(await run(cwd, 'qemu-img', 'info', '--output=json', '-U', file))
  delete parsed['actual-size']
  delete parsed.children
  delete parsed['full-backing-filename']
  return parsed
}

/** QEMU's steps of progress are those of its own buffers: begin and end are left. */
const withoutSteps = (text: string) => text.replace(/( {4}\(0\.00\/100%\)\r)(?: {4}\([\d.]+\/100%\)\r)*/g, '$1')
const withoutHint = (text: string) => text.replace(/^Try .*\n/m, '')

/** Runs the same command in both folders; compares what is said, and what the images are afterwards. */
async function sideBySide(folders: { ours: string; theirs: string }, args: string[], files: readonly string[]) {
  const { ours, theirs } = folders
  const mine = await asQemuImg(args, folder, ours)
  const other = await execute('qemu-img', args, theirs)
  expect(withoutSteps(mine.stdout)).toBe(withoutSteps(other.stdout))
  expect(withoutHint(mine.stderr)).toBe(withoutHint(other.stderr))
  expect(mine.code).toBe(other.code)
  for (const file of files) {
    expect(await info(ours, file)).toEqual(await info(theirs, file))
    expect((await execute('qemu-img', ['check', '-q', file], ours)).code).toBe(0)
    const compared = await execute('qemu-img', ['compare', join(ours, file), join(theirs, file)], folder)
    expect(compared.stdout).toBe('Images are identical.\n')
  }
  return other.code
}

const SHAPES = [
  ['plain', {}],
  ['small clusters', { base: 'cluster_size=512', mid: 'cluster_size=4k', top: 'cluster_size=1k' }],
  ['large below small', { base: 'cluster_size=2M', top: 'cluster_size=512' }],
  ['subclusters', { base: 'extended_l2=on', mid: 'extended_l2=on,cluster_size=16k', top: 'extended_l2=on' }],
  ['version 2', { base: 'compat=0.10', mid: 'compat=0.10', top: 'compat=0.10' }],
  ['zstd and 64-bit refcounts', { base: 'compression_type=zstd', top: 'compression_type=zstd,refcount_bits=64' }],
] as const

const snapshot = async (cwd: string) => {
  await run(cwd, 'qemu-img', 'snapshot', '-c', 'one', 'top')
  await run(cwd, 'qemu-io', '-f', 'qcow2', '-c', 'write -P 6 320k 64k', '-c', 'write -P 6 2M 64k', 'top')
}
const compressed = (cwd: string) =>
  run(cwd, 'qemu-io', '-f', 'qcow2', '-c', 'write -c -P 8 2560k 128k', 'top').then(() => undefined)

describeWithQemu('commit, side by side with qemu-img', () => {
  it.concurrent.each(SHAPES)('%s', async (name, options) => {
    for (const [number, args] of [[], ['-p'], ['-q', '-d'], ['-b', 'base'], ['-t', 'none', '-f', 'qcow2']].entries()) {
      const folders = await chain(`commit ${name} ${number}`, options)
      // Between top and a deeper base, the layers are what they happen to be.
      const files = args.includes('base') ? ['top', 'base'] : ['top', 'mid', 'base']
      await sideBySide(folders, ['commit', ...args, 'top'], files)
      const written = args.includes('base') ? 'base' : 'mid'
      for (const file of ['top', written]) {
        expect(await run(folders.ours, 'qemu-img', 'compare', file, 'want')).toBe('Images are identical.\n')
      }
    }
  })

  it.concurrent.each([
    ['a snapshot in the top', snapshot],
    ['compressed clusters in the top', compressed],
    [
      'a raw base',
      async (cwd: string) => {
        await run(cwd, 'qemu-img', 'rebase', '-b', 'plain', '-F', 'raw', 'top')
      },
    ],
  ])('%s', async (name, extra) => {
    const folders = await chain(name, {}, extra)
    const base = name === 'a raw base' ? 'plain' : 'mid'
    await sideBySide(folders, ['commit', 'top'], ['top'])
    expect(await run(folders.ours, 'qemu-img', 'compare', '-U', 'top', 'want')).toBe('Images are identical.\n')
    const format = base === 'plain' ? 'raw' : 'qcow2'
    expect(await run(folders.ours, 'qemu-img', 'compare', '-f', format, base, 'want')).toBe('Images are identical.\n')
    if (name !== 'a snapshot in the top') return
    const one = (cwd: string) => run(cwd, 'qemu-img', 'convert', '-l', 'one', '-O', 'raw', 'top', 'one')
    await one(folders.ours)
    await one(folders.theirs)
    expect(readFileSync(join(folders.ours, 'one')).equals(readFileSync(join(folders.theirs, 'one')))).toBe(true)
  })

  it.concurrent('leaves an empty top as small as a new one', async () => {
    const { ours } = await chain('size')
    await run(ours, 'qemu-img', 'create', '-q', '-f', 'qcow2', '-b', 'mid', '-F', 'qcow2', 'new', '5M')
    await asQemuImg(['commit', 'top'], folder, ours)
    const clusters = (bytes: Buffer) => bytes.length / 65536
    // The L2 tables and data are gone; what is left of a refcount block or so is not.
    expect(clusters(readFileSync(join(ours, 'top')))).toBeLessThanOrEqual(clusters(readFileSync(join(ours, 'new'))) + 1)
  })

  it.concurrent('refuses in the same words, and changes nothing', async () => {
    const folders = await chain('refused commit')
    const before = (cwd: string) => readdirSync(cwd).map(file => readFileSync(join(cwd, file)))
    const files = before(folders.ours)
    for (const args of [
      ['base'],
      ['-b', 'missing', 'top'],
      ['-b', 'top', 'top'],
      ['-b', 'other', 'top'],
      ['-b', 'mid', 'base'],
      ['-t', 'wrong', 'top'],
      ['-f', 'raw', 'plain'],
      ['nowhere'],
      [],
      ['top', 'mid'],
    ]) {
      expect(await sideBySide(folders, ['commit', ...args], [])).toBe(1)
      expect(before(folders.ours).every((bytes, index) => bytes.equals(files[index] ?? bytes.subarray(1)))).toBe(true)
    }
  })
})

describeWithQemu('rebase, side by side with qemu-img', () => {
  it.concurrent.each(SHAPES)('%s', async (name, options) => {
    for (const [number, args] of [
      ['-b', 'other', '-F', 'qcow2'],
      ['-b', 'base', '-F', 'qcow2'],
      ['-b', 'plain', '-F', 'raw', '-p'],
      ['-b', '', '-q'],
      ['-c', '-b', 'other', '-F', 'qcow2'],
      ['-b', 'mid', '-F', 'qcow2'],
    ].entries()) {
      // QEMU does not come to an end with compressed subclusters.
      if (name === 'subclusters' && args[0] === '-c') continue
      const folders = await chain(`rebase ${name} ${number}`, options)
      expect(await sideBySide(folders, ['rebase', ...args, 'top'], ['top'])).toBe(0)
      expect(await run(folders.ours, 'qemu-img', 'compare', 'top', 'want')).toBe('Images are identical.\n')
    }
  })

  it.concurrent.each([
    ['a snapshot in the top', snapshot],
    ['compressed clusters in the top', compressed],
  ])('%s', async (name, extra) => {
    const folders = await chain(`rebase ${name}`, {}, extra)
    await sideBySide(folders, ['rebase', '-b', 'other', '-F', 'qcow2', 'top'], ['top'])
    expect(await run(folders.ours, 'qemu-img', 'compare', 'top', 'want')).toBe('Images are identical.\n')
  })

  it.concurrent('without looking at the backing files', async () => {
    const folders = await chain('unsafe')
    const say = (...args: string[]) => sideBySide(folders, ['rebase', '-u', ...args, 'top'], [])
    expect(await say('-b', 'moved', '-F', 'qcow2')).toBe(0)
    for (const cwd of [folders.ours, folders.theirs]) {
      expect(await info(cwd, 'top')).toMatchObject({ 'backing-filename': 'moved', 'backing-filename-format': 'qcow2' })
    }
    expect(await say('-b', 'mid', '-F', 'qcow2')).toBe(0)
    expect(await run(folders.ours, 'qemu-img', 'compare', 'top', 'want')).toBe('Images are identical.\n')
    expect(await say()).toBe(0)
    expect(await info(folders.ours, 'top')).not.toHaveProperty('backing-filename')
    expect(await info(folders.ours, 'top')).toEqual(await info(folders.theirs, 'top'))
  })

  it.concurrent('refuses in the same words, and changes nothing', async () => {
    const folders = await chain('refused rebase')
    const before = readFileSync(join(folders.ours, 'top'))
    const long = 'n'.repeat(2000)
    for (const args of [
      ['-b', 'missing', '-F', 'qcow2', 'top'],
      ['-u', '-b', 'mid', 'top'],
      ['-b', 'mid', '-F', 'wrong', 'top'],
      ['-F', 'qcow2', 'top'],
      ['-u', '-b', long, '-F', 'raw', 'top'],
      ['-c', '-f', 'raw', '-b', '', 'plain'],
      ['-f', 'raw', '-u', '-b', 'mid', '-F', 'qcow2', 'plain'],
      ['-t', 'wrong', '-b', '', 'top'],
      ['-T', 'wrong', '-b', '', 'top'],
      ['-b', 'mid', '-F', 'qcow2', 'nowhere'],
      [],
      ['-b', 'mid', 'top', 'mid'],
    ]) {
      expect(await sideBySide(folders, ['rebase', ...args], [])).toBe(1)
      expect(readFileSync(join(folders.ours, 'top')).equals(before)).toBe(true)
    }
    // A loop of names only, QEMU takes: the image cannot be opened any more.
    expect(await sideBySide(folders, ['rebase', '-u', '-b', 'top', '-F', 'vmdk', 'other'], [])).toBe(0)
    expect(await sideBySide(folders, ['rebase', '-u', '-b', './other', '-F', 'qcow2', 'other'], [])).toBe(0)
    const mine = await asQemuImg(['rebase', '-b', 'top', '-F', 'qcow2', 'mid'], folder, folders.ours)
    expect(mine).toMatchObject({ code: 1, stderr: expect.stringContaining('would contain itself') })
  })
})
