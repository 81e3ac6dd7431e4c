// What does not depend on the data: cost against image size, depth of the chain, snapshots, open images, threads, and the L2 cache.

import { spawnSync } from 'node:child_process'
import { cpSync, rmSync } from 'node:fs'
import { open } from '../../dist/index.js'
import { race } from '../lib/race.mjs'
import { trial } from '../lib/trial.mjs'
import { convertJob } from './convert.mjs'

const own = (bench, ...args) => trial(bench.ours(...args))

/** Empty images of growing size. */
function sizes(bench) {
  const names = bench.quick ? ['64T'] : ['1G', '64G', '1T', '16T', '64T']
  return names.flatMap(size => {
    const image = bench.at(`sparse-${size}.qcow2`)
    own(bench, 'create', '-q', '-f', 'qcow2', image, size)
    const job = (name, ...args) => ({ name: `${name} of ${size} sparse`, sides: bench.both([...args, image]) })
    return [
      job('info', 'info'),
      job('check', 'check', '-q'),
      job('map', 'map', '--output=json'),
      convertJob(bench, `convert of ${size} sparse`, { source: image, from: 'qcow2', to: 'qcow2' }),
    ]
  })
}

/** Chains of images, each with a MiB of its own. */
function chains(bench) {
  const depths = bench.quick ? [4] : [1, 8, 64]
  const layer = n => bench.at(`chain-${n}.qcow2`)
  for (let n = 1; n <= depths.at(-1); n++) {
    const backing = n === 1 ? [] : ['-b', layer(n - 1), '-F', 'qcow2']
    own(bench, 'create', '-q', '-f', 'qcow2', ...backing, layer(n), '256M')
    own(bench, 'io', '-f', 'qcow2', '-c', `write -q -P ${n} ${n * 2}M 1M`, layer(n))
  }
  return depths.flatMap(depth => [
    {
      name: `info of a chain of ${depth}`,
      sides: bench.both(['info', '--backing-chain', '--output=json', layer(depth)]),
    },
    convertJob(bench, `convert of a chain of ${depth}`, { source: layer(depth), from: 'qcow2', to: 'raw' }),
  ])
}

/** One image with more and more snapshots. */
async function snapshots(bench) {
  const counts = bench.quick ? [2] : [0, 100, 1000]
  const base = bench.at('with-snapshots.qcow2')
  own(bench, 'create', '-q', '-f', 'qcow2', base, '64G')
  const image = await open(base, { flags: 'r+' })
  const jobs = []
  let made = 0
  for (const count of counts) {
    for (; made < count; made++) await image.snapshots.create(`snapshot ${made}`)
    await image.datasync()
    const copy = bench.at(`snapshots-${count}.qcow2`)
    cpSync(base, copy)
    const trialCopy = bench.at('snapshots-trial.qcow2')
    const before = () => cpSync(copy, trialCopy)
    jobs.push({ name: `snapshot -l of ${count}`, sides: bench.both(['snapshot', '-l', copy]) })
    jobs.push({
      name: `snapshot -c beside ${count}`,
      before,
      sides: bench.both(['snapshot', '-c', 'one more', trialCopy]),
    })
  }
  await image.close()
  return jobs
}

/** Many images open in one process. */
function openImages(bench) {
  const files = Number(spawnSync('sh', ['-c', 'ulimit -n'], { encoding: 'utf8' }).stdout)
  const counts = (bench.quick ? [10] : [1, 100, 1000, 5000]).filter(count => {
    if (count + 100 < files) return true
    bench.skip(`${count} open images: a process may have ${files} files open`)
    return false
  })
  const read = stdout => JSON.parse(stdout)
  return counts.map(count => ({
    name: `open and close, ${count} at once`,
    sides: { qcow2: { argv: bench.worker('open-images', bench.at('open.qcow2'), count), read } },
  }))
}

async function threads(bench) {
  const { path } = await bench.part()
  const side = threads => {
    const target = bench.at(`threads-${threads}`)
    const argv = bench.ours('convert', '-q', '-c', '-m', threads, '-f', 'raw', '-O', 'qcow2', path, target)
    return [threads === 1 ? '1 thread' : `${threads} threads`, { argv, target }]
  }
  const counts = bench.quick ? [1, 2] : [1, 2, 4, 8, 16]
  return { name: 'threads: raw to zlib', sides: Object.fromEntries(counts.map(side)) }
}

export const line = {
  name: 'scale',
  about: 'Cost against size, depth, snapshots, open images, and threads',
  async run(bench) {
    own(bench, 'create', '-q', '-f', 'qcow2', bench.at('open.qcow2'), '1G')
    const jobs = [
      ...sizes(bench),
      ...chains(bench),
      ...(await snapshots(bench)),
      ...openImages(bench),
      await threads(bench),
    ]
    const rows = jobs.flatMap(job => race(bench, job))
    rmSync(bench.at('snapshots-trial.qcow2'), { force: true })
    return {
      rows,
      notes: [
        'Images without data; chains: 256 MiB, one MiB of data in each layer. What is told of open images is for each of them.',
      ],
    }
  },
}
