/** Images whose tables are damaged, on the command line: the disk is read, what is lost is told, and a repair keeps the rest. */

import { closeSync, openSync, readFileSync, truncateSync, writeFileSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, expect, it } from 'vitest'
import { ok, qemuImg, qemuIo } from '../interop/qemu.js'
import { asQemuImg, describeWithQemu, execute, qcow2, workspace } from './run.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const run = (...args: string[]) => qcow2(args, folder)
const CLUSTER = 65536

/** Copies the sound image, and changes its bytes. */
function damaged(name: string, change: (bytes: Buffer) => Buffer): string {
  const bytes = readFileSync(at('sound.qcow2'))
  writeFileSync(at(name), change(Buffer.from(bytes)))
  return name
}

describeWithQemu('damaged tables', () => {
  beforeAll(() => {
    ok(qemuImg('create', '-q', '-f', 'qcow2', at('sound.qcow2'), '4M'))
    ok(qemuIo('-c', 'write -q -P 1 0 256k', at('sound.qcow2')))
    ok(qemuImg('snapshot', '-c', 'one', at('sound.qcow2')))
    ok(qemuIo('-c', 'write -q -P 2 64k 64k', at('sound.qcow2')))
    ok(qemuImg('convert', '-O', 'raw', at('sound.qcow2'), at('sound.raw')))
  })

  it('a file that ends inside its snapshot table', async () => {
    // A table that is the last thing in the file, without the end of its name.
    const name = damaged('table.qcow2', bytes => {
      const table = Number(bytes.readBigUInt64BE(64))
      const end = Math.ceil(bytes.length / CLUSTER) * CLUSTER
      bytes.writeBigUInt64BE(BigInt(end), 64)
      return Buffer.concat([bytes, Buffer.alloc(end - bytes.length), bytes.subarray(table, table + 66)])
    })
    const found = await run('check', name)
    expect(found.code).toBe(2)
    expect(found.stderr).toContain('ERROR snapshot table entry 0 is incomplete\n')
    const info = await run('info', '--output=json', name)
    expect(info.code).toBe(0)
    expect(info.stderr).toMatch(
      /^qcow2: warning: table\.qcow2: the file ends inside snapshot table entry 0 .*check -r all/,
    )
    expect(JSON.parse(info.stdout)['virtual-size']).toBe(4 << 20)
    expect((await run('snapshot', '-l', name)).code).toBe(0)
    for (const option of ['-p', '--salvage']) {
      expect((await run('convert', option, '-O', 'raw', name, `table${option}.raw`)).code).toBe(0)
      expect(readFileSync(at(`table${option}.raw`)).equals(readFileSync(at('sound.raw')))).toBe(true)
    }
    const refused = await run('snapshot', '-c', 'two', name)
    expect([refused.code, refused.stderr]).toEqual([
      1,
      expect.stringMatching(/snapshot table is damaged .*repair of all/),
    ])
    expect((await run('check', '-r', 'all', name)).code).toBe(0)
    ok(qemuImg('check', at(name)))
    ok(qemuImg('convert', '-O', 'raw', at(name), at('repaired.raw')))
    expect(readFileSync(at('repaired.raw')).equals(readFileSync(at('sound.raw')))).toBe(true)
  })

  it('a check that gives up says so in the words of qemu-img under its name', async () => {
    const extra = damaged('extra.qcow2', bytes => {
      bytes.writeUInt32BE(1 << 16, Number(bytes.readBigUInt64BE(64)) + 36)
      return bytes
    })
    const many = damaged('many.qcow2', bytes => {
      bytes.writeUInt32BE(70_000, 60)
      return bytes
    })
    // Entries of the longest names, with as much extra data as may be: more than 64 MiB of them, nearly all of it a hole.
    const entry = Buffer.alloc(40)
    entry.writeUInt32BE(0xff_ff_ff_ff, 12)
    entry.writeUInt32BE(1024, 36)
    const length = 40 + 1024 + 2 * 65_535 + 2
    const count = Math.ceil((64 << 20) / length) + 2
    const long = damaged('long.qcow2', bytes => {
      bytes.writeUInt32BE(count, 60)
      bytes.writeBigUInt64BE(1n << 20n, 64)
      return bytes
    })
    truncateSync(at(long), (1 << 20) + count * length)
    const file = openSync(at(long), 'r+')
    for (let index = 0; index < count; index++) writeSync(file, entry, 0, 40, (1 << 20) + index * length)
    closeSync(file)
    for (const name of [extra, many, long]) {
      const theirs = await execute('qemu-img', ['check', name], folder)
      expect(await asQemuImg(['check', name], folder)).toMatchObject({
        code: theirs.code,
        stdout: theirs.stdout,
        stderr: theirs.stderr,
      })
      for (const command of ['info', 'snapshot -l']) {
        const args = [...command.split(' '), name]
        const said = await execute('qemu-img', args, folder)
        const { code, stdout, stderr } = await asQemuImg(args, folder)
        expect({ code, stdout }).toEqual({ code: said.code, stdout: said.stdout })
        // How many snapshots would have to go is known to a check.
        if (name === long) expect(said.stderr).toMatch(new RegExp(`^${stderr}You can force-remove all \\d+ `))
        else expect(stderr).toBe(said.stderr)
        expect((await run(...args)).code, 'under our name it is shown, with a warning').toBe(0)
      }
      expect((await run('check', name)).stderr, 'under our name').toMatch(/^qcow2: Check failed: .*a repair of all/)
    }
  })

  it('a snapshot whose L1 table is nowhere, in the words of qemu-img under its name', async () => {
    const table = (bytes: Buffer): number => Number(bytes.readBigUInt64BE(64))
    const damages: readonly (readonly [name: string, change: (bytes: Buffer) => unknown])[] = [
      ['offset', bytes => bytes.writeBigUInt64BE(0x40_02_00n, table(bytes))],
      ['size', bytes => bytes.writeUInt32BE(0x10_00_00_00, table(bytes) + 8)],
    ]
    for (const [name, change] of damages) {
      for (const args of [
        ['convert', '-l', 'one', 'IMAGE', 'x.qcow2'],
        ['snapshot', '-a', 'one', 'IMAGE'],
        ['snapshot', '-d', 'one', 'IMAGE'],
      ]) {
        const said: string[] = []
        for (const run of [asQemuImg, execute.bind(undefined, 'qemu-img')] as const) {
          // A snapshot that cannot be deleted may be gone afterwards.
          const image = damaged(`${name}.qcow2`, bytes => {
            change(bytes)
            return bytes
          })
          const command = args.map(arg => (arg === 'IMAGE' ? image : arg))
          said.push((await run(command, folder)).stderr)
        }
        expect(said[0], args.join(' ')).toBe(said[1])
      }
    }
  })

  it('an L1 table that is not in the file', async () => {
    const name = damaged('l1.qcow2', bytes => {
      bytes.writeBigUInt64BE(2n ** 40n, 40)
      return bytes
    })
    const plain = await run('convert', '-O', 'raw', name, 'l1.raw')
    expect([plain.code, plain.stderr]).toEqual([1, expect.stringContaining('l1_table_offset')])
    const salvaged = await run('convert', '--salvage', '-O', 'raw', name, 'l1.raw')
    expect(salvaged.code).toBe(0)
    expect(salvaged.stderr).toContain('warning: error while reading')
    expect(readFileSync(at('l1.raw')).equals(Buffer.alloc(4 << 20))).toBe(true)
    expect((await run('check', name)).code).toBe(2)
  })

  it('a file that ends inside its L1 table', async () => {
    const name = damaged('cut.qcow2', bytes => {
      const table = Number(bytes.readBigUInt64BE(40))
      const end = Math.ceil(bytes.length / CLUSTER) * CLUSTER
      bytes.writeBigUInt64BE(BigInt(end), 40)
      return Buffer.concat([bytes, Buffer.alloc(end - bytes.length), bytes.subarray(table, table + 8)])
    })
    truncateSync(at(name), readFileSync(at(name)).length - 2)
    expect((await run('convert', '-O', 'raw', name, 'cut.raw')).code).toBe(1)
    expect(await run('convert', '--salvage', '-O', 'raw', name, 'cut.raw')).toMatchObject({ code: 0, stderr: '' })
    expect(readFileSync(at('cut.raw')).equals(readFileSync(at('sound.raw')))).toBe(true)
    expect((await run('check', '-r', 'all', name)).code).toBe(0)
    ok(qemuImg('check', at(name)))
    expect(await run('compare', name, 'sound.raw')).toMatchObject({ code: 0 })
  })
})
