// Results as text: CSV for plots and comparisons, Markdown for people. A record that exists is never written again.

import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { METRICS } from './samples.mjs'

const COLUMNS = ['line', 'job', 'side', 'metric', 'unit', 'median', 'min', 'max', 'ratio', 'runs', 'values']

const quote = value => (/[",\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value)

/** The facts in front as lines of comment, then a row for each metric of a side of a job. */
export function toCsv(facts, rows) {
  const comments = Object.entries(facts).map(([name, value]) => `# ${name}: ${value}`)
  const lines = rows.map(row => {
    const cells = {
      ...row,
      runs: row.values.length,
      values: row.values.map(value => Number(value.toPrecision(6))).join(' '),
    }
    return COLUMNS.map(column => {
      const cell = cells[column] ?? ''
      return quote(String(typeof cell === 'number' ? Number(cell.toPrecision(6)) : cell))
    }).join(',')
  })
  return `${[...comments, COLUMNS.join(','), ...lines].join('\n')}\n`
}

/** The rows of a CSV of ours. */
export function fromCsv(text) {
  const [head, ...lines] = text
    .split('\n')
    .filter(line => line !== '' && !line.startsWith('#'))
    .map(cellsOf)
  return lines.map(cells => {
    const row = Object.fromEntries(head.map((column, at) => [column, cells[at]]))
    return { ...row, ...Object.fromEntries(['median', 'min', 'max', 'ratio'].map(name => [name, toNumber(row[name])])) }
  })
}

const toNumber = text => (text === '' ? undefined : Number(text))

const cellsOf = line =>
  [...line.matchAll(/(?:^|,)(?:"((?:[^"]|"")*)"|([^,]*))/g)].map(([, a, b]) => a?.replaceAll('""', '"') ?? b)

export function table(head, rows) {
  return [head, head.map(() => '---'), ...rows].map(row => `| ${row.join(' | ')} |`).join('\n')
}

/** A value in the digits of its metric, less of them where it is large. */
export function tell(metric, value) {
  if (value === undefined) return '-'
  const { digits } = METRICS[metric]
  return digits === 0
    ? Math.round(value).toLocaleString('en')
    : value.toFixed(value >= 10 ? Math.min(digits, 2) : digits)
}

/** The metric that a job is about: its first. */
const mainOf = rows => rows.find(({ metric }) => metric !== 'peak' && metric !== 'size')?.metric ?? rows[0].metric

/** A line's rows, one of the table for each side of a job. */
export function toMarkdown(rows) {
  const body = []
  for (const jobRows of groups(rows)) {
    const main = mainOf(jobRows)
    for (const { side, median, min, max, ratio, unit, values } of jobRows.filter(({ metric }) => metric === main)) {
      const other = name => jobRows.find(row => row.side === side && row.metric === name)?.median
      const spread = values.length > 1 ? `${tell(main, min)} to ${tell(main, max)}` : ''
      const rest = ['cpu', 'peak', 'size'].map(name => (name === main ? '-' : tell(name, other(name))))
      const name = side === jobRows[0].side ? jobRows[0].job : ''
      body.push([name, side, `${tell(main, median)} ${unit}`, spread, ratio?.toFixed(2) ?? '', ...rest])
    }
  }
  const head = ['job', 'side', 'median', 'from, to', 'first side over this', 'CPU s', 'peak MiB', 'file MiB']
  return table(head, body)
}

function groups(rows) {
  const found = new Map()
  for (const row of rows) found.set(row.job, [...(found.get(row.job) ?? []), row])
  return found.values()
}

/** Writes texts under the first name that no record has; returns the paths. */
export function store(folder, facts, texts) {
  mkdirSync(folder, { recursive: true })
  const commit = facts.commit.replace(', with changes', '-changed')
  const stem = `${facts.date.replace(' ', '-').replace(':', '')}-${commit}`
  for (let n = 1; ; n++) {
    const name = n === 1 ? stem : `${stem}-${n}`
    try {
      return Object.entries(texts).map(([extension, text]) => {
        const path = join(folder, `${name}.${extension}`)
        writeFileSync(path, text, { flag: 'wx' })
        return path
      })
    } catch (error) {
      if (error.code !== 'EEXIST') throw error
    }
  }
}
