// Converts in every direction: plain, compressed at several levels, encrypted.

import { ENCRYPT, FAST, SECRET } from '../lib/bench.mjs'
import { race } from '../lib/race.mjs'

/** A convert by both sides in a folder: the same source, a target for each, compared with the source once. */
export function convertJob(bench, name, { source, from, to, flags = [], folder = bench.folder, others = {}, data }) {
  const side = (make, target, ...more) => {
    const argv = make('-f', from, '-O', to, ...flags, ...more, source, target)
    const check = bench.ours('compare', '-q', '-f', from, '-F', to, source, target)
    return argv && { argv, target, check }
  }
  const ours = (...args) => bench.ours('convert', '-q', ...args)
  const theirs = (...args) => bench.theirs('convert', ...FAST, ...args)
  const sides = { qcow2: side(ours, `${folder}/ours`) }
  for (const [label, more] of Object.entries(others)) sides[label] = side(ours, `${folder}/${label}`, ...more)
  return { name, data, sides: { ...sides, 'qemu-img': side(theirs, `${folder}/theirs`) } }
}

const ZSTD = ['-c', '-o', 'compression_type=zstd']

async function plain(bench) {
  const { path, data, words } = await bench.disk()
  const qcow2 = bench.image('disk.qcow2', path, '-O', 'qcow2')
  const rows = [
    convertJob(bench, 'raw to qcow2', { source: path, from: 'raw', to: 'qcow2', data }),
    convertJob(bench, 'qcow2 to raw', { source: qcow2, from: 'qcow2', to: 'raw', data }),
    convertJob(bench, 'qcow2 to qcow2', { source: qcow2, from: 'qcow2', to: 'qcow2', data }),
  ].flatMap(job => race(bench, job))
  return { rows, words }
}

async function codecs(bench) {
  const { path, data, words } = await bench.part()
  const out = (name, flags, others) =>
    convertJob(bench, name, { source: path, from: 'raw', to: 'qcow2', flags, others, data })
  const back = (name, source) => convertJob(bench, name, { source, from: 'qcow2', to: 'raw', data })
  const levels = (fast, best) =>
    !bench.quick && { [`level ${fast}`]: ['--level', fast], [`level ${best}`]: ['--level', best] }
  const rows = [
    out('raw to zlib', ['-c'], levels(1, 9)),
    back('zlib to raw', bench.image('zlib.qcow2', path, '-O', 'qcow2', '-c')),
    out('raw to zstd', ZSTD, levels(1, 9)),
    back('zstd to raw', bench.image('zstd.qcow2', path, '-O', 'qcow2', ...ZSTD)),
    ...encrypted(bench, path, data),
  ].flatMap(job => race(bench, job))
  return { rows, words }
}

function encrypted(bench, path, data) {
  const source = bench.image('luks.qcow2', path, '-O', 'qcow2', ...SECRET, '-o', ENCRYPT)
  const options = file => `driver=qcow2,encrypt.key-secret=s,file.filename=${file}`
  const out = convertJob(bench, 'raw to LUKS', {
    source: path,
    from: 'raw',
    to: 'qcow2',
    flags: [...SECRET, '-o', ENCRYPT],
    data,
  })
  // `compare` takes one description for both images.
  for (const side of Object.values(out.sides)) if (side) side.check = undefined
  const back = (argv, target) =>
    argv && { argv, target, check: bench.ours('compare', '-q', '-f', 'raw', '-F', 'raw', path, target) }
  const flags = [...SECRET, '--image-opts', options(source), '-O', 'raw']
  const [ours, theirs] = [bench.at('ours'), bench.at('theirs')]
  return [
    out,
    {
      name: 'LUKS to raw',
      data,
      sides: {
        qcow2: back(bench.ours('convert', '-q', ...flags, ours), ours),
        'qemu-img': back(bench.theirs('convert', ...FAST, ...flags, theirs), theirs),
      },
    },
  ]
}

export const line = {
  name: 'convert',
  about: 'Converts of whole disks',
  async run(bench) {
    const [a, b] = [await plain(bench), await codecs(bench)]
    return {
      rows: [...a.rows, ...b.rows],
      notes: [`Plain ones: ${a.words}.`, `Compressed and encrypted ones: ${b.words}.`],
    }
  },
}
