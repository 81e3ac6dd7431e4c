/** Broken images on the command line: one line that names the file, exit code 1, nothing written. */

import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe, expect, it } from 'vitest'
import { forge } from './forged.js'

const cli = fileURLToPath(new URL('../../dist/cli.js', import.meta.url))
const { folder, images } = forge()

function qcow2(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [cli, ...args], { encoding: 'utf8', cwd: folder })
  return { status, stdout, stderr }
}

/** One image of each kind of lie: a process for each of them all would take long. */
const SAMPLE = [
  'empty-file',
  'truncated-in-v2-fields',
  'cluster-bits-22',
  'incompatible-bit-with-a-name',
  'compression-type-2',
  'l1-size-max',
  'l1-behind-the-file',
  'extension-length-max',
  'backing-name-behind-the-first-cluster',
  'l2-table-unaligned',
  'data-unaligned',
  'aes-is-not-plain-text',
  'deflate-garbage',
  'zstd-too-short',
]
const sample = SAMPLE.map(name => {
  const image = images.find(candidate => candidate.name === name)
  if (image === undefined) throw new Error(`the forge makes no image '${name}'`)
  return image
})

/** What every refusal looks like. */
function expectRefusal({ status, stdout, stderr }: ReturnType<typeof qcow2>, path: string): void {
  expect(status).toBe(1)
  expect(stdout).toBe('')
  expect(stderr).toMatch(/^qcow2: .{20}/)
  expect(stderr).toContain(path)
  expect(stderr).not.toMatch(/\n\s+at |ERR_QCOW2_INTERNAL|undefined|\[object/)
  // A line, and one that names the way out where the file may be a plain disk.
  const [, ...hints] = stderr.trimEnd().split('\n')
  expect(hints.filter(line => line !== 'A file with the plain bytes of a disk is given with -f raw.')).toEqual([])
}

describe('a broken image on the command line', () => {
  it.each(sample.filter(({ stage }) => stage === 'open'))('$name has no info, in one line', ({ path }) => {
    expectRefusal(qcow2('info', '-f', 'qcow2', path), path)
    expectRefusal(qcow2('measure', '-f', 'qcow2', '-O', 'qcow2', path), path)
  })

  it.each(sample)('$name is not converted, and no file is left', ({ path }) => {
    const before = readdirSync(folder)
    for (const target of ['raw', 'qcow2']) {
      expectRefusal(qcow2('convert', '-f', 'qcow2', '-O', target, path, join(folder, 'out')), path)
    }
    expect(readdirSync(folder)).toEqual(before)
  })

  it.each(sample.filter(({ stage }) => stage === 'read'))('$name is no equal to anything', ({ path }) => {
    // The comparison itself failed: qemu-img says so with an exit code above 1.
    const { status, stderr } = qcow2('compare', '-f', 'qcow2', '-F', 'qcow2', path, path)
    expect(status).toBeGreaterThan(1)
    expect(stderr).toContain(path)
  })
})
