/** What the tests of formats share: command lines that both tools run, and disks that are compared with QEMU's. */

import { randomFillSync } from 'node:crypto'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect } from 'vitest'
import { bothTools, type Outcome } from '../cli/run.js'
import { assertSameBytes, ok, qemuImg } from '../interop/qemu.js'

/** A disk of this size with data and holes, in a raw file. */
export function writeDisk(path: string, size: number): Buffer {
  const disk = Buffer.alloc(size)
  for (const [start, length] of [
    [0, 70_000],
    [300_032, 8192],
    [2 ** 21, 100_000],
    [size - 5000, 5000],
  ] as const) {
    randomFillSync(disk, start, length)
  }
  writeFileSync(path, disk)
  return disk
}

/** Fails unless both tools print and return the same. */
export async function expectSame(folder: string, line: string): Promise<Outcome> {
  const [ours, theirs] = await bothTools(folder).inTurn(line)
  expect({ line, ...ours }).toEqual({ line, ...theirs })
  return ours
}

/** Fails unless QEMU reads these bytes. */
export function expectDisk(folder: string, name: string, format: string, expected: Buffer): void {
  const raw = join(folder, 'qemu.raw')
  ok(qemuImg('convert', '-f', format, '-O', 'raw', join(folder, name), raw))
  const found = readFileSync(raw)
  assertSameBytes(found.subarray(0, expected.length), expected, 'the disk')
  const rest = found.subarray(expected.length)
  assertSameBytes(rest, Buffer.alloc(rest.length), 'the disk')
}
