// The benchmarks: this package's command line against qemu-img at its best flags, side by side. Every trial is a fresh
// process, trials of both sides alternate, page cache warm and clean. Every result is checked once, by `compare`.
//
// node benchmark/run.mjs [--smoke] [--trials N] [--source FOLDER] [--size MIB] [--only WORDS] [--json FILE]
// Words to choose by: a convert's name, 'check', 'map', 'commit', 'rebase', 'on XFS', 'random reads', 'installation',
// 'random writes', 'encryption', 'writes from Node'.
//
// --smoke: one trial of everything on a small disk, to see that nothing rots; without qemu-img, this side alone.

import { spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { availableParallelism, cpus, release, tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { chainJobs } from './chain.mjs'
import { makeInput } from './input.mjs'
import { median, trial } from './trial.mjs'
import { mountXfs, unmountXfs } from './xfs.mjs'

const { values } = parseArgs({
  options: {
    smoke: { type: 'boolean', default: false },
    trials: { type: 'string' },
    source: { type: 'string', default: '/usr' },
    size: { type: 'string' },
    only: { type: 'string', default: '' },
    json: { type: 'string' },
  },
})
const smoke = values.smoke
const trials = Number(values.trials ?? (smoke ? 1 : 5))
const here = dirname(fileURLToPath(import.meta.url))
const cli = join(here, '..', 'dist', 'cli.js')
const folder = mkdtempSync(join(process.env.QCOW2_BENCH_DIR ?? tmpdir(), 'qcow2-bench-'))
const at = name => join(folder, name)

const version = program => spawnSync(program, ['--version'], { encoding: 'utf8' }).stdout?.split('\n')[0]
const qemu = version(process.env.QEMU_IMG_PROG ?? 'qemu-img')
const ours = (...args) => [process.execPath, cli, ...args]
const theirs = (...args) => [process.env.QEMU_IMG_PROG ?? 'qemu-img', ...args]
const FAST = ['-W', '-m', '8']

/** An encrypted image whose key takes no time: what is measured is the cipher. */
const SECRET = ['--object', 'secret,id=s,data=secret']
const ENCRYPT = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10'
const LUKS = `driver=qcow2,encrypt.key-secret=s,file.filename=${at('luks.qcow2')}`

/** A convert by both sides in a folder: the same source, a target for each. */
const convertIn = (place, name, source, from, to, ...flags) => ({
  name,
  place,
  ours: ours('convert', '-q', '-f', from, '-O', to, ...flags, join(place, source), join(place, 'ours')),
  theirs: theirs('convert', ...FAST, '-f', from, '-O', to, ...flags, join(place, source), join(place, 'theirs')),
  check: target => ours('compare', '-q', '-f', from, '-F', to, join(place, source), join(place, target)),
})
const convert = (...args) => convertIn(folder, ...args)

const jobs = [
  convert('raw to qcow2', 'disk.raw', 'raw', 'qcow2'),
  convert('qcow2 to raw', 'disk.qcow2', 'qcow2', 'raw'),
  convert('qcow2 to qcow2', 'disk.qcow2', 'qcow2', 'qcow2'),
  convert('raw to zlib', 'disk.raw', 'raw', 'qcow2', '-c'),
  convert('raw to zstd', 'disk.raw', 'raw', 'qcow2', '-c', '-o', 'compression_type=zstd'),
  convert('zlib to raw', 'zlib.qcow2', 'qcow2', 'raw'),
  convert('zstd to raw', 'zstd.qcow2', 'qcow2', 'raw'),
  {
    ...convert('raw to LUKS', 'disk.raw', 'raw', 'qcow2', ...SECRET, '-o', ENCRYPT),
    check: undefined,
  },
  {
    name: 'LUKS to raw',
    place: folder,
    ours: ours('convert', '-q', ...SECRET, '--image-opts', LUKS, '-O', 'raw', at('ours')),
    theirs: theirs('convert', ...FAST, ...SECRET, '--image-opts', LUKS, '-O', 'raw', at('theirs')),
    check: target => ours('compare', '-q', '-f', 'raw', '-F', 'raw', at('disk.raw'), at(target)),
  },
  {
    name: 'check, all clusters mapped',
    ours: ours('check', '-q', at('mapped.qcow2')),
    theirs: theirs('check', '-q', at('mapped.qcow2')),
  },
  {
    name: 'map, all clusters mapped',
    ours: ours('map', '--output=json', at('mapped.qcow2')),
    theirs: theirs('map', '--output=json', at('mapped.qcow2')),
  },
].filter(({ name }) => name.includes(values.only))

function prepare() {
  const made = smoke
    ? makeInput(at('disk.raw'), { sizeMiB: 16 })
    : makeInput(at('disk.raw'), { source: values.source, sizeMiB: Number(values.size ?? 8192) })
  const own = (...args) => trial(ours('convert', '-q', '-f', 'raw', '-O', 'qcow2', ...args))
  // Sources by QEMU where it is there: both sides read what QEMU wrote.
  const make = qemu ? (...args) => trial(theirs('convert', ...FAST, '-f', 'raw', '-O', 'qcow2', ...args)) : own
  make(at('disk.raw'), at('disk.qcow2'))
  if ('LUKS to raw'.includes(values.only)) make(...SECRET, '-o', ENCRYPT, at('disk.raw'), at('luks.qcow2'))
  if ('zlib to raw'.includes(values.only)) make('-c', at('disk.raw'), at('zlib.qcow2'))
  if ('zstd to raw'.includes(values.only)) make('-c', '-o', 'compression_type=zstd', at('disk.raw'), at('zstd.qcow2'))
  trial(ours('create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', at('mapped.qcow2'), smoke ? '1G' : '1T'))
  return made
}

function runJob(job) {
  const sides = { ours: [], theirs: [] }
  const sizes = {}
  // The first round is not counted: it finds memory that the machine may have to ask its host for.
  for (let round = smoke ? 1 : 0; round <= trials; round++) {
    // Each is first in turn: the memory that one frees is at hand for the next.
    const turn = round % 2 === 0 ? ['ours', 'theirs'] : ['theirs', 'ours']
    for (const side of qemu ? turn : ['ours']) {
      job.before?.()
      // What the trial before left to write back would run into this one.
      spawnSync('sync')
      const result = trial(job[side])
      if (round > 0) sides[side].push(result)
      if (job.place === undefined) continue
      if (round === 1 && job.check) trial(job.check(side))
      sizes[side] = statSync(join(job.place, side)).blocks * 512
      rmSync(join(job.place, side))
    }
  }
  const of = (side, what) => median(sides[side].map(result => result[what]))
  const result = { name: job.name, sizes, ours: {}, theirs: {} }
  for (const what of ['wall', 'cpu', 'peakMiB']) {
    result.ours[what] = of('ours', what)
    result.theirs[what] = of('theirs', what)
  }
  result.ratio = qemu ? result.ours.wall / result.theirs.wall : undefined
  return result
}

const number = (value, digits = 2) => (value === undefined ? '-' : value.toFixed(digits))
const mib = bytes => (bytes === undefined ? '-' : (bytes / 2 ** 20).toFixed(0))

/** Converts on a file system that shares extents: their time must not grow with the data. */
function onXfs() {
  const mount = mountXfs(folder, smoke ? 512 : 24 * 1024)
  if (mount === undefined) return []
  try {
    copyFileSync(at('disk.raw'), join(mount, 'disk.raw'))
    copyFileSync(at('disk.qcow2'), join(mount, 'disk.qcow2'))
    return [
      convertIn(mount, 'raw to qcow2 on XFS', 'disk.raw', 'raw', 'qcow2'),
      convertIn(mount, 'qcow2 to raw on XFS', 'disk.qcow2', 'qcow2', 'raw'),
    ].map(runJob)
  } finally {
    unmountXfs(mount)
  }
}

/** The benchmarks of the engine alone, examples of its crate: the recorded installation, and random writes. */
function engine(example, flags, ...small) {
  const runs = smoke ? ['--runs', '1', ...small] : ['--runs', String(trials)]
  const own = ['--dir', folder, ...flags, ...runs]
  // To see that nothing rots, what the tests have built will do.
  const built = join(process.env.CARGO_TARGET_DIR ?? join(here, '..', 'target'), 'debug', 'examples', example)
  const [program, ...args] =
    smoke && existsSync(built)
      ? [built, ...own]
      : ['cargo', 'run', '--quiet', '--release', '-p', 'qcow2-engine', '--example', example, '--', ...own]
  const { status } = spawnSync(program, args, { stdio: ['ignore', 'inherit', 'inherit'], cwd: join(here, '..') })
  if (status !== 0) throw new Error(`the benchmark ${example} failed`)
}

function table(results) {
  const rows = results.map(({ name, ours, theirs, ratio, sizes }) => [
    name,
    `${number(ours.wall)} s, ${number(ours.cpu)} s`,
    `${number(theirs.wall)} s, ${number(theirs.cpu)} s`,
    number(ratio),
    number(ours.peakMiB, 0),
    `${mib(sizes.ours)} / ${mib(sizes.theirs)}`,
  ])
  const head = ['job', 'qcow2: wall, CPU', 'qemu-img: wall, CPU', 'ratio', 'peak MiB', 'file MiB']
  return [head, head.map(() => '---'), ...rows].map(row => `| ${row.join(' | ')} |`).join('\n')
}

function randomReads() {
  const flags = smoke ? ['--seconds', '0.1', '--rounds', '1'] : []
  return JSON.parse(trial([process.execPath, join(here, 'random-read.mjs'), '--json', ...flags]).stdout)
}

/** Prints what it finds. */
function encryption() {
  const flags = smoke ? ['--seconds', '0.1', '--rounds', '1'] : ['--rounds', String(trials)]
  console.log(trial([process.execPath, join(here, 'encryption.mjs'), ...flags]).stdout)
}

function nodeWrites() {
  const flags = smoke ? ['--count', '200', '--rewrites', '200', '--rounds', '1'] : ['--rounds', String(trials)]
  return JSON.parse(trial([process.execPath, join(here, 'random-write.mjs'), '--json', ...flags]).stdout)
}

try {
  const input = prepare()
  const machine = `${availableParallelism()} cores, ${cpus()[0]?.model}, ${process.platform} ${release()}`
  const versions = `node ${process.versions.node}, ${qemu ?? 'qemu-img is not installed: nothing to compare with'}`
  console.log(`${input}\n${machine}\n${versions}\nmedians of ${trials}, ${new Date().toISOString().slice(0, 10)}\n`)
  const results = jobs.map(job => {
    process.stderr.write(`${job.name}\n`)
    return runJob(job)
  })
  if (['commit', 'rebase onto nothing'].some(name => name.includes(values.only))) {
    const chains = await chainJobs(folder, smoke ? 16 : 2048, ours, theirs)
    results.push(...chains.filter(({ name }) => name.includes(values.only)).map(runJob))
  }
  if ('on XFS'.includes(values.only)) results.push(...onXfs())
  console.log(table(results))
  const reads = 'random reads'.includes(values.only) ? randomReads() : {}
  console.log()
  for (const [name, perSecond] of Object.entries(reads))
    console.log(`${name}: ${perSecond.toLocaleString('en')} reads/s`)
  if (qemu && 'installation'.includes(values.only)) {
    for (const flags of [[], ['--rewrite']]) engine('replay', flags, '--requests', '500', '--modes', 'writeback')
  }
  if (qemu && 'random writes'.includes(values.only)) engine('random_writes', [], '--count', '200')
  if ('encryption'.includes(values.only)) encryption()
  const writes = 'writes from Node'.includes(values.only) ? nodeWrites() : []
  console.log()
  for (const { shape, depth, ours, theirs } of writes) {
    const times = theirs === undefined ? '' : `, ${(ours / theirs).toFixed(2)} times qemu-img bench`
    console.log(
      `4 KiB writes from Node, ${shape}, depth ${depth}: ${Math.round(ours).toLocaleString('en')} writes/s${times}`,
    )
  }
  if (values.json) {
    const manifest = JSON.parse(readFileSync(join(here, '..', 'package.json'), 'utf8'))
    const record = { input, machine, versions, trials, version: manifest.version, results, reads, writes }
    writeFileSync(values.json, `${JSON.stringify(record, undefined, 2)}\n`)
  }
} finally {
  rmSync(folder, { recursive: true, force: true })
}
