// Random 4 KiB requests: this engine from Rust and from JavaScript, `FileHandle` of Node on the raw file, fio on the raw file, and
// `qemu-img bench` on the same image; page cache and O_DIRECT, depths 1, 32 and 256.

import { spawnSync } from 'node:child_process'
import { randomFillSync } from 'node:crypto'
import { closeSync, openSync, rmSync, writeSync } from 'node:fs'
import { ENCRYPT, SECRET } from '../lib/bench.mjs'
import { structured } from '../lib/input.mjs'
import { race } from '../lib/race.mjs'
import { trial } from '../lib/trial.mjs'

const MIB = 2 ** 20
const BLOCK = 4096
/** An odd number of blocks comes to every block once, far from the one before. */
const SCATTERED = 4097 * BLOCK
const GROWING = 8 * 1024 * MIB

const SHAPES = {
  allocated: { kinds: ['read', 'write'], full: true },
  growing: { kinds: ['write'], fresh: true },
  overlay: { kinds: ['read', 'write'], fresh: true },
  compressed: { kinds: ['read'] },
  LUKS: { kinds: ['read', 'write'] },
  'extended L2': { kinds: ['read', 'write'] },
}

/** The files of all shapes: those that change what they grow from are made anew before each trial. */
function makeFiles(bench, sizeMiB) {
  const [raw, text] = [bench.at('requests.raw'), bench.at('text.raw')]
  const file = openSync(raw, 'w')
  const chunk = Buffer.alloc(MIB)
  for (let at = 0; at < sizeMiB; at++) writeSync(file, randomFillSync(chunk), 0, MIB, at * MIB)
  closeSync(file)
  structured(text, sizeMiB)
  return {
    raw,
    allocated: bench.image('allocated.qcow2', raw, '-O', 'qcow2'),
    compressed: bench.image('compressed.qcow2', text, '-O', 'qcow2', '-c'),
    LUKS: bench.image('requests-luks.qcow2', raw, '-O', 'qcow2', ...SECRET, '-o', ENCRYPT),
    'extended L2': bench.image('extended.qcow2', raw, '-O', 'qcow2', '-o', 'extended_l2=on'),
    growing: bench.at('growing.qcow2'),
    overlay: bench.at('requests-overlay.qcow2'),
  }
}

function remake(bench, shape, files) {
  rmSync(files[shape], { force: true })
  const backing = shape === 'overlay' ? ['-b', files.raw, '-F', 'raw'] : []
  const size = shape === 'overlay' ? [] : [GROWING]
  trial(bench.ours('create', '-q', '-f', 'qcow2', ...backing, files[shape], ...size))
}

/** `undefined` for LUKS: `qemu-img bench` takes no secret. */
function qemuBench(bench, { shape, kind, depth, cache, file, step, size, count }) {
  if (shape === 'LUKS') return undefined
  const writes = kind === 'write' ? ['-w', '--pattern=90'] : []
  const argv = bench.theirs(
    'bench',
    ...writes,
    '-f',
    'qcow2',
    '-c',
    count,
    '-d',
    depth,
    '-s',
    BLOCK,
    '-S',
    step % size,
    '-t',
    cache,
    file,
  )
  return argv && { argv, read: stdout => ({ rate: count / Number(/completed in ([\d.]+) seconds/.exec(stdout)?.[1]) }) }
}

function fio(bench, { kind, depth, cache, raw, size, seconds }) {
  if (bench.once('fio', () => spawnSync('fio', ['--version']).status) !== 0) return undefined
  const direct = cache === 'none' ? 1 : 0
  const args = [
    `--rw=rand${kind}`,
    `--bs=${BLOCK}`,
    '--ioengine=io_uring',
    `--direct=${direct}`,
    `--iodepth=${depth}`,
    `--size=${size}`,
  ]
  const rest = [
    `--runtime=${Math.max(1, seconds)}`,
    '--time_based',
    '--invalidate=0',
    '--output-format=json',
    '--name=requests',
  ]
  const argv = ['fio', `--filename=${raw}`, ...args, ...rest]
  return { argv, read: stdout => ({ rate: JSON.parse(stdout.slice(stdout.indexOf('{'))).jobs[0][kind].iops }) }
}

function job(bench, files, sizeMiB, { shape, kind, depth, cache }) {
  const seconds = bench.quick ? 0.05 : 0.5
  const isFull = shape === 'allocated'
  const size = shape === 'growing' ? GROWING : sizeMiB * MIB
  // An overlay and an empty image get each cluster once: every write allocates one.
  const grows = kind === 'write' && SHAPES[shape].fresh
  const step = grows ? 64 * 1024 : SCATTERED
  const many = shape === 'compressed' ? 2000 : 40_000
  const count = grows ? size / step : many
  const common = [
    '--kind',
    kind,
    '--cache',
    cache,
    '--depth',
    depth,
    '--seconds',
    seconds,
    '--size',
    size,
    '--step',
    step,
  ]
  const limit = ['--count', grows ? count : 1e9]
  const own = [
    '--image',
    files[shape],
    '--format',
    'qcow2',
    ...(shape === 'LUKS' ? ['--luks'] : []),
    ...common,
    ...limit,
  ]
  const backing = shape === 'overlay' ? ['--backing', files.raw] : []
  const read = stdout => JSON.parse(stdout)
  const shared = { shape, kind, depth, cache, file: files[shape], raw: files.raw, step, size, seconds }
  const handle = ['--by', 'file', '--image', files.raw, ...common, ...limit]
  return {
    name: `${kind}, ${shape}, ${cache === 'none' ? 'O_DIRECT' : 'page cache'}, depth ${depth}`,
    before: SHAPES[shape].fresh ? () => remake(bench, shape, files) : undefined,
    sides: {
      'Image, JavaScript': { argv: bench.worker('requests', '--by', 'image', ...own), read },
      'Image, Rust': { argv: [bench.example('requests'), ...own, ...backing], read },
      'FileHandle, raw': isFull && cache !== 'none' ? { argv: bench.worker('requests', ...handle), read } : undefined,
      'fio io_uring, raw': isFull && !bench.quick ? fio(bench, shared) : undefined,
      'qemu-img bench': qemuBench(bench, {
        ...shared,
        count: bench.quick ? Math.min(count, 500) : Math.min(count, many),
      }),
    },
  }
}

/** A compressed image from its start, in small requests and in those of a cluster: each cluster is inflated once. */
function frontToBack(bench, files, sizeMiB) {
  const side = block => {
    const where = ['--by', 'image', '--image', files.compressed, '--format', 'qcow2', '--cache', 'writeback']
    const what = ['--kind', 'read', '--depth', 1, '--size', sizeMiB * MIB, '--block', block, '--step', block]
    const limit = ['--seconds', bench.quick ? 0.05 : 0.5, '--count', 1e9]
    const argv = bench.worker('requests', ...where, ...what, ...limit)
    return { argv, read: stdout => ({ throughput: JSON.parse(stdout).throughput }) }
  }
  return {
    name: 'read, compressed, front to back, page cache, depth 1, JavaScript',
    sides: { '4 KiB': side(BLOCK), '64 KiB': side(16 * BLOCK) },
  }
}

/** What is measured: everything of an allocated image; of other shapes the page cache, and the depths that tell most. */
function choose(bench) {
  const all = Object.entries(SHAPES).flatMap(([shape, { kinds, full }]) =>
    kinds.flatMap(kind =>
      (full ? [1, 32, 256] : [1, 32]).flatMap(depth =>
        (full ? ['writeback', 'none'] : ['writeback']).map(cache => ({ shape, kind, depth, cache })),
      ),
    ),
  )
  // To see that nothing rots: each shape and kind once.
  return bench.quick ? all.filter(({ depth, cache }) => depth === 32 && cache === 'writeback') : all
}

export const line = {
  name: 'requests',
  about: '4 KiB requests',
  async run(bench) {
    const sizeMiB = bench.quick ? 8 : 256
    const files = makeFiles(bench, sizeMiB)
    const rows = choose(bench).flatMap(each => race(bench, job(bench, files, sizeMiB, each)))
    const whole = race(bench, frontToBack(bench, files, sizeMiB))
    const { path } = await bench.part()
    const delays = race(bench, {
      name: 'delay of the event loop, 99th percentile, while 4 converts run',
      sides: {
        'Image, JavaScript': {
          argv: bench.worker('event-loop', path, bench.folder, 4),
          read: stdout => JSON.parse(stdout),
        },
      },
    })
    return {
      rows: [...rows, ...whole, ...delays],
      notes: [
        'At scattered places of a disk of 256 MiB; growing images and overlays: 64 KiB apart, each cluster once.',
      ],
    }
  },
}
