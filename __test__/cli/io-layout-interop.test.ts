/** What `qcow2 io` writes lies where qemu-io puts it, and what it finds corrupt is said and marked as by qemu-io. */

import { closeSync, copyFileSync, openSync, statSync, symlinkSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { open } from '../../dist/index.mjs'
import { ok, qemuImg } from '../interop/qemu.js'
import { CLI, describeWithQemu, execute, type Outcome, workspace } from './run.js'

const folder = workspace()
symlinkSync(CLI, join(folder, 'qemu-io'))
const at = (name: string): string => join(folder, name)

/** Makes an image, and gives both programs a copy of their own. Resolves to the files and what was printed. */
async function both(options: string, size: string, damage: (file: number) => void, commands: readonly string[]) {
  ok(qemuImg('create', '-q', '-f', 'qcow2', '-o', options, at('new.qcow2'), size))
  const file = openSync(at('new.qcow2'), 'r+')
  damage(file)
  closeSync(file)
  const outcomes: Outcome[] = []
  for (const [name, program] of [
    ['theirs.qcow2', ['qemu-io']],
    ['ours.qcow2', [process.execPath, join(folder, 'qemu-io')]],
  ] as const) {
    copyFileSync(at('new.qcow2'), at(name))
    const args = commands.flatMap(command => ['-c', command])
    outcomes.push(await execute(program[0], [...program.slice(1), '-f', 'qcow2', ...args, name], folder))
  }
  const [theirs, ours] = outcomes as [Outcome, Outcome]
  return { theirs, ours }
}

const mapOf = (name: string): unknown => JSON.parse(ok(qemuImg('map', '--output=json', at(name))))
const sound = (): undefined => undefined

describeWithQemu('what qemu-io and ours write', () => {
  test('lies at the same places, whatever the order of the guest', async () => {
    const writes = ['0 64k', '128k 192k', '600M 1k', '64k 64k', '10M 3M', '-z 0 1M', '320k 64k']
    const { ours } = await both(
      'cluster_size=64k',
      '1G',
      sound,
      writes.map(write => `write ${write}`),
    )
    expect(ours).toMatchObject({ code: 0, stderr: '' })
    expect(mapOf('ours.qcow2')).toEqual(mapOf('theirs.qcow2'))
    expect(statSync(at('ours.qcow2')).size).toBe(statSync(at('theirs.qcow2')).size)
    ok(qemuImg('check', at('ours.qcow2')))
  })

  test('is no longer than it must be: a refcount block comes with the first cluster that it counts', async () => {
    await both('cluster_size=512', '1M', sound, ['write 0 124k'])
    expect(statSync(at('ours.qcow2')).size).toBe(256 * 512)
    await both('cluster_size=512', '1M', sound, ['write 0 124k', 'write 124k 512'])
    expect(statSync(at('ours.qcow2')).size).toBe(258 * 512)
  })

  const zeroRefcounts = (file: number): void => {
    writeSync(file, Buffer.alloc(8), 0, 8, 2 * 65_536)
  }
  const oddBlock = (file: number): void => {
    // The first entry of the refcount table, in the second cluster: 512 bytes too far.
    writeSync(file, Buffer.of(0x02), 0, 1, 65_536 + 6)
  }
  test.each([
    ['the refcounts of the first clusters are 0', zeroRefcounts, 'invalid allocation of L2 table at offset 0'],
    ['a refcount block is nowhere', oddBlock, 'Refblock offset 0x20200 unaligned (reftable index: 0)'],
  ])('is told as corrupt and marked: %s', async (_, damage, said) => {
    const { theirs, ours } = await both('cluster_size=64k', '64M', damage, ['write 64k 64k'])
    expect(theirs.stderr).toContain(said)
    expect(ours).toMatchObject({ code: theirs.code, stdout: theirs.stdout, stderr: theirs.stderr })
    for (const name of ['theirs.qcow2', 'ours.qcow2']) {
      const info = JSON.parse(ok(qemuImg('info', '--output=json', at(name))))
      expect(info['format-specific'].data.corrupt, name).toBe(true)
    }
    await expect(open(at('ours.qcow2'), { flags: 'r+' })).rejects.toThrow('marked corrupt')
  })

  test('is told under our own name with the place', async () => {
    await both('cluster_size=64k', '64M', zeroRefcounts, ['length'])
    const { stdout, stderr } = await execute(
      process.execPath,
      [CLI, 'io', '-f', 'qcow2', '-c', 'write 64k 64k', at('new.qcow2')],
      folder,
    )
    expect(stdout).toBe('write failed: Input/output error\n')
    expect(stderr).toMatch(/^qcow2: the header has a refcount of 0 .*offset 0x0.*ERR_QCOW2_CORRUPT/)
  })
})
