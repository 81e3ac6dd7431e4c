// Random 4 KiB reads of cached data: Image.read of a qcow2 image against FileHandle.read of a raw file, at queue depths
// 1 and 32, in one process, rounds interleaved. The buffers are reused.
//
// node benchmark/random-read.mjs [--seconds N] [--rounds N] [--json]

import { spawnSync } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { open as openFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { convert, open } from '../dist/index.js'

const { values } = parseArgs({
  options: {
    seconds: { type: 'string', default: '1' },
    rounds: { type: 'string', default: '5' },
    json: { type: 'boolean', default: false },
  },
})
const SECONDS = Number(values.seconds)
const ROUNDS = Number(values.rounds)
const BLOCK = 4096
const SIZE = 256 * 2 ** 20

const folder = mkdtempSync(join(tmpdir(), 'qcow2-bench-'))
try {
  const raw = join(folder, 'disk.raw')
  const file = await openFile(raw, 'w+')
  const chunk = Buffer.alloc(2 ** 20)
  for (let at = 0; at < SIZE; at += chunk.length) await file.write(randomFillSync(chunk), 0, chunk.length, at)
  await makeQcow2(raw, join(folder, 'disk.qcow2'))
  const image = await open(join(folder, 'disk.qcow2'))
  const readers = {
    'FileHandle.read': (buffer, position) => file.read(buffer, 0, BLOCK, position),
    'Image.read': (buffer, position) => image.read(buffer, { position }),
  }
  const results = {}
  for (const depth of [1, 32]) {
    for (let round = 0; round < ROUNDS; round++) {
      for (const [name, read] of Object.entries(readers)) {
        const key = `${name}, depth ${depth}`
        results[key] ??= []
        results[key].push(await measure(read, depth))
      }
    }
  }
  await image.close()
  await file.close()
  report(results)
} finally {
  rmSync(folder, { recursive: true })
}

async function makeQcow2(raw, target) {
  if (convert) return convert(raw, target, { from: 'raw', to: 'qcow2' })
  const made = spawnSync('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, target])
  if (made.status !== 0) throw new Error('qemu-img convert failed')
}

/** Reads per second with `depth` requests under way. */
async function measure(read, depth) {
  const end = performance.now() + SECONDS * 1000
  const begin = performance.now()
  let count = 0
  const worker = async () => {
    const buffer = Buffer.alloc(BLOCK)
    while (performance.now() < end) {
      await read(buffer, Math.floor(Math.random() * (SIZE / BLOCK)) * BLOCK)
      count++
    }
  }
  await Promise.all(Array.from({ length: depth }, worker))
  return (count * 1000) / (performance.now() - begin)
}

function median(numbers) {
  return numbers.toSorted((a, b) => a - b)[Math.floor(numbers.length / 2)]
}

function report(results) {
  const medians = Object.fromEntries(Object.entries(results).map(([name, runs]) => [name, Math.round(median(runs))]))
  if (values.json) return console.log(JSON.stringify(medians))
  for (const [name, reads] of Object.entries(medians)) console.log(`${name}: ${reads.toLocaleString('en')} reads/s`)
}
