/** Images whose headers are broken: under QEMU's names the command line refuses them in QEMU's words. */

import { closeSync, copyFileSync, openSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, expect, test } from 'vitest'
import { ok, qemuImg } from '../interop/qemu.js'
import { asQemuImg, asQemuIo, describeWithQemu, execute, qcow2, workspace } from './run.js'

const folder = workspace()

/** Big-endian bytes of a number at a place of the header. */
type Patch = readonly [at: number, bytes: 4 | 8, value: bigint]

const BROKEN: readonly (readonly [about: string, ...patches: Patch[]])[] = [
  ['header length', [100, 4, 0xff_ff_ff_ffn]],
  ['backing file offset', [8, 8, 2n ** 64n - 1n]],
  ['backing file name', [8, 8, 0x10_00n], [16, 4, 0xff_ff_ff_ffn]],
  ['extension', [112, 4, 0x12_34_56_78n], [116, 4, 0x7f_ff_ff_ffn]],
  ['refcount table size', [56, 4, 0xff_ff_ff_ffn]],
  ['refcount table offset', [48, 8, 0x12_34_56_78_90_ab_cd_efn]],
  ['refcount table behind everything', [48, 8, 0xff_ff_ff_ff_ff_ff_00_00n], [56, 4, 0x7fn]],
  ['number of snapshots', [60, 4, 0x7f_ff_ff_ffn]],
  ['snapshot table behind everything', [64, 8, 0xff_ff_ff_ff_ff_ff_00_00n], [60, 4, 0xff_ffn]],
  ['L1 table size', [36, 4, 0x7f_ff_ff_ffn]],
  ['L1 table offset', [40, 8, 0x12_34_56_78_90_ab_cd_efn], [36, 4, 1n]],
  ['L1 table behind everything', [40, 8, 0x7f_ff_ff_ff_ff_ff_00_00n], [36, 4, 0xff_ffn]],
]

describeWithQemu('broken headers', () => {
  beforeAll(() => {
    ok(qemuImg('create', '-q', '-f', 'qcow2', join(folder, 'sound.qcow2'), '64M'))
  })

  test.each(BROKEN.map(([name, ...patches]) => ({ name, patches })))('$name', async ({ patches }) => {
    copyFileSync(join(folder, 'sound.qcow2'), join(folder, 'broken.qcow2'))
    const file = openSync(join(folder, 'broken.qcow2'), 'r+')
    for (const [at, length, value] of patches) {
      const bytes = Buffer.alloc(8)
      bytes.writeBigUInt64BE(value)
      writeSync(file, bytes, 8 - length, length, at)
    }
    closeSync(file)
    for (const [program, ours, args] of [
      ['qemu-img', asQemuImg, ['info', 'broken.qcow2']],
      ['qemu-io', asQemuIo, ['-f', 'qcow2', '-c', 'read 0 512', 'broken.qcow2']],
    ] as const) {
      const theirs = await execute(program, args, folder)
      const { code, stdout, stderr } = await ours(args, folder)
      expect({ code, stdout, stderr }, program).toEqual({
        code: theirs.code,
        stdout: theirs.stdout,
        stderr: theirs.stderr,
      })
    }
  })

  test('under our own name the field and the place are named', async () => {
    const { stderr } = await qcow2(['info', 'broken.qcow2'], folder)
    expect(stderr).toMatch(/invalid l1_table_offset 0x7fffffffffff0000: .*ERR_QCOW2_/)
  })
})
