// Small images: hundreds of converts from one process against a loop of qemu-img, one convert by the command line, and what a
// start costs.

import { mkdirSync, rmSync } from 'node:fs'
import { FAST } from '../lib/bench.mjs'
import { structured } from '../lib/input.mjs'
import { race } from '../lib/race.mjs'
import { median } from '../lib/samples.mjs'

const SIZE_MIB = 10

/** A command `times` times in a row, `$i` in its words the number: in one process of a shell, so that short ones can be measured. */
const repeat = (times, argv) =>
  argv && ['sh', '-c', `i=0; while [ $i -lt ${times} ]; do "$@" >/dev/null || exit; i=$((i + 1)); done`, 'sh', ...argv]

const source = bench =>
  bench.once('small', () => {
    structured(bench.at('small.raw'), SIZE_MIB)
    return bench.at('small.raw')
  })

function many(bench) {
  const times = bench.quick ? 20 : 500
  const [raw, folder] = [source(bench), bench.at('many')]
  const before = () => {
    rmSync(folder, { recursive: true, force: true })
    mkdirSync(folder)
  }
  const each = (i, program) => [...program, '-f', 'raw', '-O', 'qcow2', raw, `${folder}/${i}`]
  const loop = (...flags) =>
    bench.qemu && [
      'sh',
      '-c',
      `i=0; while [ $i -lt ${times} ]; do "$@" "${folder}/$i" || exit; i=$((i + 1)); done`,
      'sh',
      ...each('', bench.theirs('convert', ...flags)).slice(0, -1),
    ]
  const rows = race(bench, {
    name: `${times} converts of ${SIZE_MIB} MiB`,
    before,
    sides: {
      'qcow2, one process': { argv: bench.worker('converts', raw, folder, times) },
      'qemu-img -W -m 8': bench.qemu && { argv: loop(...FAST) },
      // So small a convert may be done sooner without more threads.
      'qemu-img': bench.qemu && { argv: loop() },
    },
  })
  rmSync(folder, { recursive: true })
  return rows
}

/** What one of `times` takes. */
const share = (rows, times) =>
  rows.map(row => (row.metric === 'peak' ? row : { ...row, values: row.values.map(value => value / times) }))

function one(bench) {
  const times = bench.quick ? 2 : 20
  const raw = source(bench)
  const args = target => ['-f', 'raw', '-O', 'qcow2', raw, bench.at(target)]
  const theirs = bench.theirs('convert', ...args('theirs'))
  const rows = race(bench, {
    name: `one convert of ${SIZE_MIB} MiB by the command line`,
    sides: {
      qcow2: { argv: repeat(times, bench.ours('convert', '-q', ...args('ours'))) },
      'qemu-img': theirs && { argv: repeat(times, theirs) },
    },
  })
  return share(rows, times)
}

function start(bench) {
  const times = bench.quick ? 2 : 20
  const image = bench.image('small.qcow2', source(bench), '-O', 'qcow2')
  const theirs = bench.theirs('info', image)
  const rows = race(bench, {
    name: 'start: info',
    sides: {
      'qcow2 info': { argv: repeat(times, bench.ours('info', image)) },
      'qemu-img info': theirs && { argv: repeat(times, theirs) },
      'node -e 0': { argv: repeat(times, [process.execPath, '-e', '0']) },
    },
  })
  return share(rows, times)
}

/** CPU that `qcow2 info` takes beyond that of Node, as a part of it. */
function aboveNode(rows) {
  const cpu = side => median(rows.find(row => row.side === side && row.metric === 'cpu')?.values ?? [])
  const [ours, node] = [cpu('qcow2 info'), cpu('node -e 0')]
  if (!ours || !node) return []
  return [
    `CPU of \`qcow2 info\` beyond a bare start of Node: ${((ours - node) * 1000).toFixed(1)} ms, ${(ours / node - 1).toFixed(2)} of it.`,
  ]
}

export const line = {
  name: 'small',
  about: 'Small images and starts',
  async run(bench) {
    const starts = start(bench)
    return { rows: [...many(bench), ...one(bench), ...starts], notes: aboveNode(starts) }
  },
}
