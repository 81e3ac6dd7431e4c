// What encryption costs: 4 KiB requests from JavaScript on an image with LUKS against the same on a plain one, page cache, allocated
// clusters, rounds of both in turn; and what opening costs with the default of two seconds for a guess.
//
// node benchmark/encryption.mjs [--seconds N] [--rounds N]

import { randomFillSync } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { create, open } from '../dist/index.js'
import { median } from './trial.mjs'

const { values } = parseArgs({
  options: { seconds: { type: 'string', default: '1' }, rounds: { type: 'string', default: '5' } },
})
const SECONDS = Number(values.seconds)
const ROUNDS = Number(values.rounds)
const BLOCK = 4096
const SIZE = 256 * 2 ** 20
const secret = 'secret'

const folder = mkdtempSync(join(process.env.QCOW2_BENCH_DIR ?? tmpdir(), 'qcow2-bench-'))
const at = name => join(folder, name)

/** Requests in a second at a queue depth, each at a place of its own. */
async function rate(depth, request) {
  const end = performance.now() + SECONDS * 1000
  let done = 0
  let next = 1
  const started = performance.now()
  await Promise.all(
    Array.from({ length: depth }, async () => {
      const buffer = randomFillSync(Buffer.alloc(BLOCK))
      while (performance.now() < end) {
        next = (next * 16807) % 2147483647
        await request(buffer, (next % (SIZE / BLOCK)) * BLOCK)
        done++
      }
    }),
  )
  return (done / (performance.now() - started)) * 1000
}

try {
  for (const [name, encrypt] of [
    ['plain', undefined],
    ['luks', { secret, iterTime: 10 }],
  ]) {
    const image = await create(at(name), { size: SIZE, encrypt })
    const chunk = randomFillSync(Buffer.alloc(2 ** 20))
    for (let position = 0; position < SIZE; position += chunk.length) await image.write(chunk, { position })
    await image.close()
  }
  const plain = await open(at('plain'), { flags: 'r+' })
  const luks = await open(at('luks'), { flags: 'r+', secret })
  const kinds = {
    read: image => (buffer, position) => image.read(buffer, { position }),
    write: image => (buffer, position) => image.write(buffer, { position }),
  }
  for (const [kind, of] of Object.entries(kinds)) {
    for (const depth of [1, 32]) {
      const rates = { plain: [], luks: [] }
      for (let round = 0; round <= ROUNDS; round++) {
        for (const [name, image] of round % 2 === 0
          ? [
              ['plain', plain],
              ['luks', luks],
            ]
          : [
              ['luks', luks],
              ['plain', plain],
            ]) {
          const found = await rate(depth, of(image))
          // The first calls are those of an interpreter.
          if (round > 0) rates[name].push(found)
        }
      }
      const [a, b] = [median(rates.plain), median(rates.luks)]
      const each = `${Math.round(a).toLocaleString('en')} and ${Math.round(b).toLocaleString('en')} a second`
      console.log(
        `4 KiB ${kind}s, depth ${depth}, plain and LUKS: ${each}, LUKS takes ${(a / b).toFixed(2)} times the time`,
      )
    }
  }
  await plain.close()
  await luks.close()
} finally {
  rmSync(folder, { recursive: true })
}
