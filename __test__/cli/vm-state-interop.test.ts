/** The state of a virtual machine behind the disk: what the one tool writes, the other reads, and what a snapshot has of it stays. */

import { symlinkSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { CLI, describeWithQemu, execute, workspace } from './run.js'

const folder = workspace()
symlinkSync(CLI, join(folder, 'qemu-io'))

type Tool = (commands: readonly string[], args: readonly string[]) => ReturnType<typeof execute>

const each = (commands: readonly string[]): string[] => commands.flatMap(command => ['-c', command])
const theirs: Tool = (commands, args) => execute('qemu-io', [...each(commands), ...args], folder)
const ours: Tool = (commands, args) =>
  execute(process.execPath, [join(folder, 'qemu-io'), ...each(commands), ...args], folder)
const img = (...args: string[]) => execute('qemu-img', args, folder)

const SECRET = ['--object', 'secret,id=s,data=word']

const SHAPES: Readonly<Record<string, readonly string[]>> = {
  plain: [],
  'small clusters of version 2': ['-o', 'compat=0.10,cluster_size=512'],
  'extended L2 entries': ['-o', 'extended_l2=on'],
  'one-bit refcounts': ['-o', 'refcount_bits=1'],
  encrypted: [...SECRET, '-o', 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10'],
  'a data file': ['-o', 'data_file=state.data'],
  'a larger backing file': ['-b', 'large.raw', '-F', 'raw'],
}

describeWithQemu('the state of a virtual machine', () => {
  it.each(Object.entries(SHAPES))('%s', async (name, options) => {
    const image = `${name.replaceAll(' ', '-')}.qcow2`
    // Bytes that would show through: the state begins at 512 MiB of the disk's addresses, or before.
    writeFileSync(join(folder, 'large.raw'), '')
    truncateSync(join(folder, 'large.raw'), 2 ** 30)
    await theirs(['write -P 0xee 1M 1M', 'write -P 0xee 511M 2M'], ['-f', 'raw', 'large.raw'])
    expect(await img('create', '-q', '-f', 'qcow2', ...options, image, '4M')).toMatchObject({ code: 0, stderr: '' })
    const opts = `driver=qcow2,file.filename=${image}`
    const args =
      name === 'encrypted' ? [...SECRET, '--image-opts', `${opts},encrypt.key-secret=s`] : ['-f', 'qcow2', image]
    const at = name === 'encrypted' ? args : [image]
    const same = async (tool: Tool, commands: readonly string[]): Promise<void> => {
      const { code, stdout } = await tool(commands, args)
      expect([code, stdout.match(/failed|bytes at offset/g)], commands.join('; ')).toEqual([
        0,
        commands.map(() => 'bytes at offset'),
      ])
    }
    const disk = 'read -P 0x77 0 1M'
    // Far enough apart that the L1 table grows twice.
    await same(ours, ['write -P 0x77 0 1M', 'read -b -P 0 0 4k', 'write -b -P 1 0 64k', 'write -b -P 2 4096 512'])
    await same(ours, ['write -b -P 3 700M 4k', 'read -b -P 1 0 4k', 'read -b -P 2 4k 512', 'read -b -P 1 4608 512'])
    const first = ['read -b -P 1 0 4k', 'read -b -P 2 4k 512', 'read -b -P 1 4608 59k', 'read -b -P 3 700M 4k']
    await same(theirs, [...first, 'read -b -P 0 704m 64k', disk])
    await same(theirs, ['write -b -P 5 1G 8k', 'write -b -P 6 512 512'])
    await same(ours, ['read -b -P 5 1G 8k', 'read -b -P 1 0 512', 'read -b -P 6 512 512', disk])
    expect(await img('check', ...at)).toMatchObject({ code: 0 })
    const shared = await img('snapshot', '-c', 's', ...at)
    await same(ours, ['write -b -P 7 1k 512', 'write -b -P 8 1G 512', 'write -b -P 9 3G 4k'])
    const second = ['read -b -P 6 512 512', 'read -b -P 7 1k 512', 'read -b -P 8 1G 512', 'read -b -P 5 1073742336 512']
    for (const tool of [theirs, ours]) await same(tool, [...second, 'read -b -P 9 3G 4k', disk])
    // Some shapes have no snapshots; QEMU then leaves what it began.
    expect(shared.code !== 0).toBe(/one-bit|data file/.test(name))
    if (shared.code !== 0) return
    expect(await img('check', ...at)).toMatchObject({ code: 0 })
    expect(await img('snapshot', '-a', 's', ...at)).toMatchObject({ code: 0 })
    for (const tool of [theirs, ours]) await same(tool, ['read -b -P 1 1k 512', 'read -b -P 5 1G 8k', disk])
  })

  it('is refused as qemu-io refuses it, where there is none and where the L1 table ends', async () => {
    await img('create', '-q', '-f', 'raw', 'plain.raw', '1M')
    await img('create', '-q', '-f', 'qcow2', 'small.qcow2', '4M')
    for (const [args, commands] of [
      [
        ['-f', 'raw', 'plain.raw'],
        ['read -b 0 512', 'write -b 0 512'],
      ],
      [
        ['-f', 'qcow2', 'small.qcow2'],
        ['write -b 4P 512', 'read -b 4P 512', 'read -b 8E 512', 'write -b 1 512'],
      ],
      [['-r', '-f', 'qcow2', 'small.qcow2'], ['write -b 0 512']],
    ] as const) {
      const [want, got] = [await theirs(commands, args), await ours(commands, args)]
      const lines = ({ code, stdout }: typeof want) => ({ code, stdout: stdout.replace(/^\d.* ops; .*$/gm, '') })
      expect(lines(got), args.join(' ')).toEqual(lines(want))
    }
  })
})
