// Single calls of the API in one process, by tinybench. Those of the engine are `cargo bench`, by divan.

import { collect, toRows } from '../lib/samples.mjs'
import { trial } from '../lib/trial.mjs'

export const line = {
  name: 'micro',
  about: 'Single calls from JavaScript',
  async run(bench) {
    bench.say('micro')
    const found = {}
    for (let round = 0; round < bench.rounds; round++) {
      const { stdout } = trial(bench.worker('micro', bench.folder, bench.quick ? 20 : 300))
      for (const [name, each] of Object.entries(JSON.parse(stdout))) {
        found[name] ??= {}
        collect(found[name], 'JavaScript', { each })
      }
    }
    const rows = Object.entries(found).flatMap(([name, sides]) => toRows(name, sides))
    return {
      rows,
      notes: ['Medians of one call after the other; `cargo bench` has those of the engine: requests, ciphers, codecs.'],
    }
  },
}
