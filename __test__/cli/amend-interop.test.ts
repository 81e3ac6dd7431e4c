import { copyFileSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { amend, open } from '../../dist/index.mjs'
import { asQemuImg, describeWithQemu, execute, workspace } from './run.js'

const folder = workspace()
const qemuImg = (...args: string[]) => execute('qemu-img', args, folder)

/** An image with data, zero clusters, compressed clusters and a snapshot. */
async function make(name: string, options: string, snapshot = true): Promise<string> {
  const path = join(folder, name)
  await qemuImg('create', '-q', '-f', 'qcow2', ...(options === '' ? [] : ['-o', options]), path, '16M')
  const commands = ['write -P 1 0 1M', 'write -P 2 4M 512k', 'write -c -P 3 8M 64k']
  const zeroes = options.includes('compat=0.10') ? [] : ['write -z 256k 128k', 'write -z 5M 64k']
  for (const command of [...commands, ...zeroes]) await execute('qemu-io', ['-c', command, path], folder)
  if (snapshot) await qemuImg('snapshot', '-c', 'one', path)
  return path
}

/** What qemu-img says of the format's options. */
async function specific(path: string): Promise<Record<string, unknown>> {
  const { stdout } = await qemuImg('info', '--output=json', path)
  const info = JSON.parse(stdout)
  return { ...info['format-specific'].data, size: info['virtual-size'], snapshots: info.snapshots?.length }
}

describeWithQemu('amend side by side with qemu-img', () => {
  it.concurrent.each([
    ['', 'compat=0.10'],
    ['', 'refcount_bits=64'],
    ['', 'refcount_bits=1'],
    ['', 'refcount_bits=8,lazy_refcounts=on'],
    ['', 'lazy_refcounts=on'],
    ['lazy_refcounts=on', 'lazy_refcounts=off'],
    ['compat=0.10', 'compat=1.1'],
    ['compat=0.10', 'compat=v3,lazy_refcounts=on,refcount_bits=32'],
    ['compat=0.10', 'refcount_bits=8'],
    ['compat=0.10', 'lazy_refcounts=on'],
    ['refcount_bits=8', 'compat=0.10'],
    ['extended_l2=on', 'compat=0.10'],
    ['compression_type=zstd', 'compat=0.10'],
    ['', 'refcount_bits=7'],
    ['', 'compat=9'],
    ['', 'foo=bar'],
    ['', 'cluster_size=64k'],
    ['', 'preallocation=full'],
    ['', 'backing_file=x'],
    ['', 'data_file=x'],
    ['', 'data_file_raw=on'],
    ['', 'lazy_refcounts=maybe'],
    ['', ',,'],
  ])("'%s', then '%s'", async (options, list) => {
    const name = `${options}-then-${list}`.replace(/[^\w]/g, '_')
    const ours = await make(`${name}.ours`, options)
    const theirs = join(folder, `${name}.theirs`)
    copyFileSync(ours, theirs)
    const before = readFileSync(ours)
    const raw = `${ours}.raw`
    await qemuImg('convert', '-O', 'raw', ours, raw)
    const mine = await asQemuImg(['amend', '-f', 'qcow2', '-o', list, ours], folder)
    const other = await qemuImg('amend', '-f', 'qcow2', '-o', list, theirs)
    expect(mine.code).toBe(other.code)
    if (other.code === 0) expect(mine).toEqual(other)
    else expect(readFileSync(ours).equals(before)).toBe(true)
    // A refcount that does not fit is worded by each tool.
    if (list !== 'refcount_bits=1') {
      expect(mine.stderr).toBe(other.stderr)
    }
    expect(await specific(ours)).toEqual(await specific(theirs))
    expect(await qemuImg('check', '-q', ours)).toMatchObject({ code: 0 })
    expect(await qemuImg('compare', '-f', 'qcow2', '-F', 'raw', ours, raw)).toMatchObject({ code: 0 })
  })

  it('needs options, a qcow2 image and one file', async () => {
    const path = await make('usage', '', false)
    await qemuImg('create', '-q', '-f', 'raw', 'raw', '1M')
    for (const args of [[path], ['-o', 'compat=v3'], ['-f', 'raw', '-o', 'size=2M', 'raw']]) {
      const mine = await asQemuImg(['amend', ...args], folder)
      const other = await qemuImg('amend', ...args)
      expect(mine.code).toBe(other.code)
      expect(mine.stderr.split('\n')[0]).toBe(other.stderr.split('\n')[0])
    }
    const help = await asQemuImg(['amend', '-f', 'qcow2', '-o', 'help'], folder)
    const all = await qemuImg('amend', '-f', 'qcow2', '-o', 'help')
    expect(help.stdout).toBe(all.stdout)
  })

  it('grows the disk before it goes back to version 2, and shrinks it on request only', async () => {
    const path = await make('size', 'lazy_refcounts=on', false)
    await amend(path, { size: 32 << 20, version: 2 })
    expect(await specific(path)).toMatchObject({ compat: '0.10', size: 32 << 20 })
    await expect(amend(path, { size: 1 << 20, version: 3 })).rejects.toMatchObject({ code: 'ERR_QCOW2_DATA_LOSS' })
    expect(await specific(path)).toMatchObject({ compat: '0.10', size: 32 << 20 })
    const args = ['amend', '-o', 'size=1M,compat=v3', path]
    const refused = await asQemuImg(args, folder)
    expect(refused).toMatchObject({ code: 1, stderr: expect.stringContaining('use --shrink if that is meant') })
    expect(await specific(path)).toMatchObject({ compat: '0.10', size: 32 << 20 })
    expect(await asQemuImg(['amend', '--shrink', ...args.slice(1)], folder)).toMatchObject({ code: 0 })
    expect(await specific(path)).toMatchObject({ compat: '1.1', size: 1 << 20 })
    await amend(path, { size: 512 << 10, shrink: true })
    expect(await specific(path)).toMatchObject({ size: 512 << 10 })
    expect(await qemuImg('check', '-q', path)).toMatchObject({ code: 0 })
  })

  it('takes the name of a data file away, as qemu-img does', async () => {
    const path = await make('unnamed', `data_file=${join(folder, 'named.raw')}`, false)
    const other = `${path}.theirs`
    copyFileSync(path, other)
    expect(await asQemuImg(['amend', '-o', 'data_file=', path], folder)).toMatchObject({ code: 0 })
    expect(await qemuImg('amend', '-o', 'data_file=', other)).toMatchObject({ code: 0 })
    expect(await specific(path)).toEqual(await specific(other))
    expect(await specific(path)).not.toHaveProperty('data-file')
  })

  it('is refused while the image is open, and names what is wrong', async () => {
    const path = await make('busy', '', false)
    const image = await open(path)
    await expect(amend(path, { version: 2 })).rejects.toMatchObject({ code: 'ERR_QCOW2_LOCKED' })
    await image.close()
    await expect(amend(path, { refcountBits: 7 as 8 })).rejects.toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    await expect(amend(path, { backingFile: 'x' })).rejects.toMatchObject({ field: 'backingFile' })
    await expect(amend(path, { signal: AbortSignal.abort() })).rejects.toMatchObject({ name: 'AbortError' })
  })
})
