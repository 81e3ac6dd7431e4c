/** Files for tests: a folder that vanishes with the test file, and disks whose bytes are known. */

import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync, writeSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Image, open, Qcow2Error } from 'qcow2'
import { afterAll, expect } from 'vitest'

/** A folder for the files of one test file. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'qcow2-test-'))
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** The byte that a patterned disk has at an offset: different in every sector, never 0. */
export const patternAt = (offset: number): number => 1 + ((offset + Math.floor(offset / 512) * 7) % 251)

export const pattern = (offset: number, length: number): Buffer =>
  Buffer.from(Uint8Array.from({ length }, (_, i) => patternAt(offset + i)))

/** A raw file with the pattern where `runs` say (start, length), and holes elsewhere. */
export function writeRaw(path: string, size: number, runs: readonly (readonly [number, number])[]): string {
  const file = openSync(path, 'w')
  ftruncateSync(file, size)
  for (const [start, length] of runs) writeSync(file, pattern(start, length), 0, length, start)
  closeSync(file)
  return path
}

export const openRaw = (path: string): Promise<Image> => open(path, { format: 'raw' })

/** The error of a call that must fail. A call that throws instead of rejecting fails the test. */
export async function failure(call: () => Promise<unknown>): Promise<Qcow2Error> {
  const error: unknown = await call().then(
    value => ({ resolved: value }),
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(Qcow2Error)
  return error as Qcow2Error
}
