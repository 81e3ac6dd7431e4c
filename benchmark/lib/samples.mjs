// Rows of results, and what is said of several values.

/** What is measured: its unit, whether less of it is better, and how many digits are told. */
export const METRICS = {
  wall: { unit: 's', less: true, digits: 3 },
  cpu: { unit: 's', less: true, digits: 3 },
  peak: { unit: 'MiB', less: true, digits: 0 },
  size: { unit: 'MiB', less: true, digits: 1 },
  rate: { unit: '/s', less: false, digits: 0 },
  throughput: { unit: 'MB/s', less: false, digits: 0 },
  each: { unit: 'us', less: true, digits: 2 },
  delay: { unit: 'ms', less: true, digits: 2 },
  syncs: { unit: 'calls', less: true, digits: 0 },
  writes: { unit: 'calls', less: true, digits: 0 },
  spaces: { unit: 'calls', less: true, digits: 0 },
}

export function median(numbers) {
  const known = numbers.filter(number => number !== undefined).toSorted((a, b) => a - b)
  const middle = known.length / 2
  // Of an even number, what is between the two in the middle.
  const [low, high] = [known[Math.ceil(middle) - 1], known[Math.floor(middle)]]
  return low === undefined ? undefined : (low + high) / 2
}

/** Rows `{ job, side, metric, values }` of all that one job measured: `found[side][metric]` are its values, round by round. */
export function toRows(job, found) {
  return Object.entries(found).flatMap(([side, metrics]) =>
    Object.entries(metrics)
      .filter(([, values]) => values.length > 0)
      .map(([metric, values]) => ({ job, side, metric, values })),
  )
}

/** Adds what one trial measured to `found`. */
export function collect(found, side, measured) {
  found[side] ??= {}
  for (const [metric, value] of Object.entries(measured)) {
    if (!Number.isFinite(value)) continue
    found[side][metric] ??= []
    found[side][metric].push(value)
  }
}

/** A row with its median, the least and the most, and its ratio to the first side of its job: that side's value over this one's. */
export function summarize(rows) {
  const first = new Map()
  for (const { line, job, side, metric, values } of rows) {
    const key = `${line}\n${job}\n${metric}`
    if (!first.has(key)) first.set(key, { side, median: median(values) })
  }
  return rows.map(row => {
    const base = first.get(`${row.line}\n${row.job}\n${row.metric}`)
    const middle = median(row.values)
    return {
      ...row,
      unit: METRICS[row.metric].unit,
      median: middle,
      min: Math.min(...row.values),
      max: Math.max(...row.values),
      ratio: base.side === row.side || !middle ? undefined : base.median / middle,
    }
  })
}
