/** Inspection of images from strangers: any bytes give an answer, and what does not open is not called safe. */

import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { type Inspection, inspect } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { forge } from './forged.js'

const { images } = forge()

function expectInspection(found: Inspection): void {
  expect(found.safe).toBe(found.findings.length === 0)
  for (const { code, message } of found.findings) {
    expect(code).toMatch(/^[A-Z_]+$/)
    expect(message.length).toBeGreaterThan(10)
  }
  expect(Number.isSafeInteger(found.virtualSize)).toBe(true)
}

describe('an inspection of a broken image', () => {
  it.each(images.filter(({ stage }) => stage === 'open'))('$name has findings', async ({ name, path }) => {
    const found = await inspect(path)
    expectInspection(found)
    if (found.format === 'unknown') expect(name).toMatch(/empty-file|zeroes|wrong-magic|truncated-in-magic|version-1/)
    expect(found).toMatchObject({ safe: false })
  })

  it.each(images.filter(({ stage }) => stage !== 'open'))('$name gives an answer', async ({ path }) => {
    expectInspection(await inspect(path))
  })

  it('of the first bytes never fails, wherever they end and whatever they are', async () => {
    for (const { path } of images.slice(0, 60)) {
      const bytes = readFileSync(path).subarray(0, 4096)
      for (const length of [0, 1, 3, 4, 8, 20, 23, 24, 71, 72, 73, 100, 103, 104, 105, 111, 112, 113, 120, 511, 512]) {
        expectInspection(await inspect(new Uint8Array(bytes.subarray(0, length))))
      }
    }
  })

  it('of a sound header with any byte changed never fails', async () => {
    const sound = images.find(({ name }) => name === 'incompatible-bit-with-a-name')
    const bytes = readFileSync(sound?.path ?? '').subarray(0, 4096)
    for (let round = 0; round < 1500; round++) {
      const noise = createHash('sha256').update(`${round}`).digest()
      const changed = new Uint8Array(bytes)
      for (let i = 0; i < 3; i++) {
        const at = noise.readUInt16BE(i * 4) % 200
        changed[at] = noise[i * 4 + 2] ?? 0
      }
      expectInspection(await inspect(changed))
    }
  })
})
