// 4 KiB writes through Image.write against `qemu-img bench -w`, page cache, at queue depths 1 and 32, each trial on a fresh copy
// of the same image, trials interleaved. As qemu-img bench has it, the time is that of the writes alone; with --flush both
// times end with a flush. Shapes: an empty image, in order at a stride of 64 KiB and scattered over the disk (every write
// allocates a cluster), an allocated image, an empty overlay of an allocated image (every write copies around itself).
//
// The allocated image is written to 75,000 times, which is qemu-img bench's default, the others once for each cluster.
//
// node benchmark/random-write.mjs [--shape NAME] [--count N] [--rewrites N] [--rounds N] [--flush] [--json]

import { spawnSync } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { closeSync, copyFileSync, fsyncSync, mkdtempSync, openSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { create, open } from '../dist/index.js'

const { values } = parseArgs({
  options: {
    shape: { type: 'string' },
    count: { type: 'string', default: '16000' },
    rewrites: { type: 'string' },
    rounds: { type: 'string', default: '5' },
    flush: { type: 'boolean', default: false },
    json: { type: 'boolean', default: false },
  },
})
const COUNT = Number(values.count)
const REWRITES = Number(values.rewrites ?? 75000)
const ROUNDS = Number(values.rounds)
const BLOCK = 4096
const STRIDE = 65536
/** Clusters between two writes that follow each other: coprime to any count of clusters that has not this factor. */
const SCATTER = 7919
const SIZE = COUNT * STRIDE
const QEMU = process.env.QEMU_IMG_PROG ?? 'qemu-img'

const folder = mkdtempSync(join(process.env.QCOW2_BENCH_DIR ?? tmpdir(), 'qcow2-bench-'))
const at = name => join(folder, name)
try {
  const hasQemu = spawnSync(QEMU, ['--version']).status === 0
  if (!hasQemu) process.stderr.write('SKIPPED qemu-img is not installed: this side alone\n')
  await makeImages()
  // The first thousands of calls are those of an interpreter.
  prepare('full.qcow2')
  await measure(32, STRIDE, COUNT)
  const results = []
  for (const [shape, image, stride, count] of [
    ['growing', 'empty.qcow2', STRIDE, COUNT],
    ['scattered', 'empty.qcow2', STRIDE * SCATTER, COUNT],
    ['rewrite', 'full.qcow2', BLOCK * 17, REWRITES],
    ['overlay', 'overlay.qcow2', STRIDE, COUNT],
  ]) {
    if (values.shape && values.shape !== shape) continue
    for (const depth of [1, 32]) {
      const ours = []
      const theirs = []
      for (let round = 0; round < ROUNDS; round++) {
        prepare(image)
        ours.push(await measure(depth, stride, count))
        prepare(image)
        if (hasQemu) theirs.push(bench(depth, stride, count))
      }
      results.push({ shape, depth, ours: perSecond(ours, count), theirs: perSecond(theirs, count) })
    }
  }
  report(results)
} finally {
  rmSync(folder, { recursive: true })
}

async function makeImages() {
  await (await create(at('empty.qcow2'), { size: SIZE })).close()
  const full = await create(at('full.qcow2'), { size: SIZE })
  const chunk = randomFillSync(Buffer.alloc(2 ** 20))
  for (let position = 0; position < SIZE; position += chunk.length) {
    await full.write(chunk, { position, length: Math.min(chunk.length, SIZE - position) })
  }
  await full.close()
  await (await create(at('overlay.qcow2'), { backingFile: at('full.qcow2'), backingFormat: 'qcow2' })).close()
}

/** A fresh copy, on the disk: else its writeback runs into the trial. */
function prepare(image) {
  copyFileSync(at(image), at('trial.qcow2'))
  const file = openSync(at('trial.qcow2'), 'r+')
  fsyncSync(file)
  closeSync(file)
}

/** Seconds for `count` writes. */
async function measure(depth, stride, count) {
  const image = await open(at('trial.qcow2'), { flags: 'r+', references: 'allow' })
  const buffers = Array.from({ length: depth }, () => Buffer.alloc(BLOCK, 0x5a))
  let next = 0
  const begin = performance.now()
  const lane = async buffer => {
    while (next < count) {
      const position = (next++ * stride) % SIZE
      await image.write(buffer, { position })
    }
  }
  await Promise.all(buffers.map(lane))
  if (values.flush) await image.datasync()
  const seconds = (performance.now() - begin) / 1000
  await image.close()
  return seconds
}

/** Seconds that qemu-img says. */
function bench(depth, stride, count) {
  const args = ['bench', '-w', '-f', 'qcow2', '-t', 'writeback', '-c', count, '-d', depth, '-s', BLOCK, '-S', stride]
  const rest = ['--pattern=90', ...(values.flush ? [`--flush-interval=${count}`] : [])]
  const { status, stdout, stderr } = spawnSync(QEMU, [...args, ...rest, at('trial.qcow2')].map(String), {
    encoding: 'utf8',
  })
  if (status !== 0) throw new Error(stderr)
  return Number(/completed in ([\d.]+) seconds/.exec(stdout)?.[1])
}

/** Writes per second, the median of the trials; undefined without any. */
function perSecond(seconds, count) {
  const median = seconds.toSorted((a, b) => a - b)[Math.floor(seconds.length / 2)]
  return median === undefined ? undefined : count / median
}

function report(results) {
  if (values.json) return process.stdout.write(`${JSON.stringify(results)}\n`)
  const row = (...cells) => process.stdout.write(`${cells.map(cell => String(cell).padEnd(14)).join('')}\n`)
  row('image', 'depth', 'ours/s', 'qemu-img/s', 'ratio')
  for (const { shape, depth, ours, theirs } of results) {
    const [mine, others] = [ours, theirs].map(rate => (rate === undefined ? '-' : Math.round(rate)))
    row(shape, depth, mine, others, theirs === undefined ? '-' : (ours / theirs).toFixed(2))
  }
}
