/** Disks of 2^53 bytes and more, where numbers end to be exact: the command line counts as qemu-img and qemu-io do. */

import { symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { CLI, describeWithQemu, execute, workspace } from './run.js'

const folder = workspace()
symlinkSync(CLI, join(folder, 'qemu-io'))

const ours = (name: string, args: readonly string[]) => execute(process.execPath, [join(folder, name), ...args], folder)
const plain = (text: string): string =>
  text
    .replaceAll(/ours\.qcow2|theirs\.qcow2/g, 'IMG')
    .replace(/^ *(?:disk size|file length): .*$|"actual-size": \d+/gm, '')
    .replace(/^\d.* ops; .*$/gm, '')

/** 8 PiB and an odd number of sectors. */
const SIZE = 2n ** 53n + 1536n
const SHAPE = ['-f', 'qcow2', '-o', 'cluster_size=2M']

describeWithQemu('very large disks', () => {
  const both = async (args: (image: string) => readonly string[], io = false): Promise<void> => {
    const want = await execute(io ? 'qemu-io' : 'qemu-img', args('theirs.qcow2'), folder)
    const got = await ours(io ? 'qemu-io' : 'qemu-img', args('ours.qcow2'))
    const show = ({ code, stdout, stderr }: typeof want) => ({ code, stdout: plain(stdout), stderr: plain(stderr) })
    expect(show(got), args('IMG').join(' ')).toEqual(show(want))
  }

  it('are made, described, mapped, read, written, measured and resized alike', async () => {
    await both(image => ['create', ...SHAPE, image, String(SIZE)])
    const at = SIZE - 512n
    const commands = [`write -P 5 ${at} 512`, `read -P 5 ${at} 512`, `alloc ${at - 512n} 1k`, 'length']
    await both(image => [...commands.flatMap(command => ['-c', command]), '-f', 'qcow2', image], true)
    await both(image => ['-c', `read ${SIZE} 512`, '-c', `write ${at} 1k`, '-f', 'qcow2', image], true)
    await both(image => ['info', image])
    await both(image => ['info', '--output=json', image])
    // QEMU takes long for all of it.
    await both(image => ['map', '--output=json', '-s', String(at - 2n ** 40n), image])
    const mapped = await ours('qemu-img', ['map', 'ours.qcow2'])
    expect(mapped.stdout.split('\n')[1]).toMatch(/^0x20000000000000 *0x600 +0x[0-9a-f]+ +ours\.qcow2$/)
    await both(image => ['measure', '-O', 'raw', image])
    await both(() => ['measure', '--size', '32P', '-O', 'qcow2', '-o', 'cluster_size=2M', '--output=json'])
    await both(image => ['resize', image, '+1P'])
    await both(image => ['info', image])
    // These, too; it finds nothing wrong with what became of it.
    for (const args of [
      ['resize', '--shrink', 'ours.qcow2', String(SIZE - 512n)],
      ['snapshot', '-c', 's', 'ours.qcow2'],
    ]) {
      expect(await ours('qemu-img', args)).toMatchObject({ code: 0, stderr: '' })
    }
    const measured = await ours('qemu-img', ['measure', '-O', 'qcow2', '-o', 'cluster_size=2M', 'ours.qcow2'])
    const asked = ['measure', '-O', 'qcow2', '-o', 'cluster_size=2M', '--size', String(SIZE - 512n)]
    const full = (text: string) => text.split('\n')[1]
    expect(full(measured.stdout)).toBe(full((await execute('qemu-img', asked, folder)).stdout))
    expect(await execute('qemu-img', ['check', 'ours.qcow2'], folder)).toMatchObject({ code: 0 })
    expect((await ours('qemu-img', ['check', 'theirs.qcow2'])).code).toBe(0)
  })

  it('are copied, compared and stood upon alike, and never by a rounded number', async () => {
    await execute('qemu-img', ['create', ...SHAPE, 'source.qcow2', String(SIZE)], folder)
    await execute('qemu-io', ['-c', `write -P 7 ${SIZE - 512n} 512`, 'source.qcow2'], folder)
    expect(
      await ours('qemu-img', ['convert', '-O', 'qcow2', '-o', 'cluster_size=2M', 'source.qcow2', 'copy.qcow2']),
    ).toMatchObject({ code: 0, stderr: '' })
    const same = { code: 0, stdout: 'Images are identical.\n' }
    expect(await ours('qemu-img', ['compare', 'source.qcow2', 'copy.qcow2'])).toMatchObject(same)
    await execute('qemu-io', ['-c', `write -P 8 ${SIZE - 512n} 1`, 'copy.qcow2'], folder)
    const differs = { code: 1, stdout: `Content mismatch at offset ${SIZE - 512n}!\n` }
    expect(await ours('qemu-img', ['compare', 'source.qcow2', 'copy.qcow2'])).toMatchObject(differs)
    const over = (name: string) => ['create', '-q', ...SHAPE, '-b', 'source.qcow2', '-F', 'qcow2', name]
    expect(await ours('qemu-img', over('overlay.qcow2'))).toMatchObject({ code: 0, stderr: '' })
    const read = await execute('qemu-io', ['-c', `read -P 7 ${SIZE - 512n} 512`, 'overlay.qcow2'], folder)
    expect(read).toMatchObject({ code: 0 })
    const odd = await ours('qemu-io', ['-c', `read ${2n ** 53n + 1n} 1`, 'source.qcow2'])
    expect(odd.code).toBe(1)
    expect(odd.stdout).toBe('read failed: Invalid argument\n')
  })
})
