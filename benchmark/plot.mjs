// Draws what was recorded: npm run bench:plots -- RECORD.csv... [--to FOLDER]
// Of several records, the last one that has a row counts. Writes installation.svg, convert.svg and size.svg, as far as there are rows.

import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { root } from './lib/bench.mjs'
import { fromCsv } from './lib/record.mjs'
import { bars, curves } from './lib/svg.mjs'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { to: { type: 'string', default: join(root, 'benchmark', 'plots') } },
})
const rows = positionals.flatMap(path => fromCsv(readFileSync(path, 'utf8')))
const medianOf = (line, job, side, metric) =>
  rows.findLast(row => row.line === line && row.job === job && row.side === side && row.metric === metric)?.median
const jobsOf = line => [...new Set(rows.filter(row => row.line === line).map(({ job }) => job))]

/** The time on qcow2 over that on a raw file, each driver over its own; the old policy over ours. */
function installation() {
  const of = (job, side) => medianOf('installation', job, side, 'wall')
  const over = (job, side, raw) => {
    const [time, base] = [of(job, side), of(job, raw)]
    return time && base ? time / base : undefined
  }
  const groups = jobsOf('installation').map(job => ({
    name: job,
    values: [
      over(job, 'qcow2, ours', 'raw, ours'),
      over(job, 'qcow2, QEMU', 'raw, QEMU'),
      over(job, 'qcow2, old policy', 'raw, ours'),
    ],
  }))
  const series = ['this engine', 'QEMU', 'policy of QEMU 0.10.5']
  return (
    groups.length > 0 &&
    bars({
      title: 'An installation on qcow2: time over that on a raw file',
      series,
      groups,
      tell: ratio => ratio.toFixed(2),
      reference: 1,
    })
  )
}

function convert() {
  const of = (job, side) => medianOf('convert', job, side, 'throughput')
  const groups = jobsOf('convert')
    .map(job => ({ name: job, values: [of(job, 'qcow2'), of(job, 'qemu-img')] }))
    .filter(({ values }) => values.some(value => value !== undefined))
  const title = 'Converts: MB of data a second'
  return (
    groups.length > 0 &&
    bars({ title, series: ['qcow2', 'qemu-img -W -m 8'], groups, tell: rate => Math.round(rate).toLocaleString('en') })
  )
}

function size() {
  const pattern = /^(convert|map) of (\S+) sparse$/
  const found = jobsOf('scale')
    .map(job => pattern.exec(job))
    .filter(match => match !== null)
  const names = [...new Set(found.map(([, , name]) => name))]
  const series = ['convert', 'map'].flatMap(what =>
    ['qcow2', 'qemu-img'].map(side => ({
      name: `${side} ${what}`,
      values: names.map(name => medianOf('scale', `${what} of ${name} sparse`, side, 'wall')),
    })),
  )
  return (
    names.length > 0 &&
    curves({ title: 'Time against the size of an empty disk', names, series, tell: seconds => `${seconds} s` })
  )
}

mkdirSync(values.to, { recursive: true })
for (const [name, draw] of Object.entries({ installation, convert, size })) {
  const text = draw()
  if (text) writeFileSync(join(values.to, `${name}.svg`), text)
  process.stdout.write(text ? `${join(values.to, name)}.svg\n` : `SKIPPED ${name}: the records have no rows of it\n`)
}
