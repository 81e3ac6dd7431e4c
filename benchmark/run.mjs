// The benchmarks: this package against qemu-img at its best flags, side by side, every trial in a fresh process.
//
// npm run bench [-- NAME...] [--rounds N] [--quick] [--data MIB] [--source FOLDER] [--cold] [--results FOLDER] [--device NAME] [--no-build]
// Without names, every line but `guest`. --quick: one round of everything on small inputs, to see that nothing rots; nothing is recorded unless
// --results says where. --data: what plain converts copy, 2048. --no-build takes dist/ as it is.
// --device: the installation on 'shared disk', 'quiet device' or 'quiet device, 200 us a sync' alone; with every line, the quiet one.

import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { onPath, prepare } from '../.ci/lib.mjs'
import { Bench, root } from './lib/bench.mjs'
import { describe } from './lib/machine.mjs'
import { store, toCsv, toMarkdown } from './lib/record.mjs'
import { summarize } from './lib/samples.mjs'
import { lines as all } from './lines/index.mjs'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    rounds: { type: 'string' },
    quick: { type: 'boolean', default: false },
    data: { type: 'string' },
    source: { type: 'string', default: '/usr' },
    device: { type: 'string' },
    cold: { type: 'boolean', default: false },
    results: { type: 'string' },
    'no-build': { type: 'boolean', default: false },
  },
})
const unknown = positionals.filter(name => !all.some(line => line.name === name))
if (unknown.length > 0) {
  process.stderr.write(`no line is called ${unknown.join(', ')}: ${all.map(({ name }) => name).join(', ')}\n`)
  process.exit(1)
}
// What takes long and needs a machine of its own runs by its name alone.
const chosen = all.filter(({ name, alone }) => (positionals.length === 0 ? !alone : positionals.includes(name)))
const { quick } = values
if (!quick && !values['no-build']) await prepare()

const bench = new Bench({
  quick,
  cold: values.cold,
  source: values.source,
  // Every device takes half an hour: those are for the line alone.
  device: values.device ?? (positionals.length === 0 ? 'quiet device' : undefined),
  rounds: Number(values.rounds ?? (quick ? 1 : 5)),
  dataMiB: Number(values.data ?? (quick ? 16 : 2048)),
})
if (!bench.qemu) bench.skip('qemu-img is not installed: this side alone')
if (!onPath('/usr/bin/time')) bench.skip('GNU time is not installed: CPU time and memory are not measured')
// A signal ends the program that is measured, and with it the run, which then tidies up.
let stopped = false
for (const signal of ['SIGINT', 'SIGTERM'])
  process.on(signal, () => {
    stopped = true
  })

try {
  const facts = describe(bench, chosen)
  const text = [
    Object.entries(facts)
      .map(([name, value]) => `- ${name}: ${value}`)
      .join('\n'),
  ]
  console.log(text[0])
  const rows = []
  for (const line of chosen) {
    const began = performance.now()
    let found
    try {
      found = await line.run(bench)
    } catch (error) {
      // What the others measured is not lost by it.
      process.exitCode = 1
      bench.say(`FAILED ${line.name}: ${error.stack}`)
      if (stopped) break
      continue
    }
    const told = summarize(found.rows.map(row => ({ line: line.name, ...row })))
    rows.push(...told)
    const shown = found.tables ?? (told.length > 0 ? [toMarkdown(told)] : [])
    const part = [`## ${line.about}`, ...found.notes, ...shown].join('\n\n')
    text.push(part)
    console.log(`\n${part}`)
    bench.say(`${line.name}: ${((performance.now() - began) / 1000).toFixed(0)} s`)
  }
  const folder = values.results ?? (quick ? undefined : join(root, 'benchmark', 'results'))
  if (folder !== undefined) {
    const texts = { csv: toCsv(facts, rows), md: `# Benchmarks\n\n${text.join('\n\n')}\n` }
    for (const path of store(folder, facts, texts)) bench.say(path)
  }
} finally {
  bench.close()
}
