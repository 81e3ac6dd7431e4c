// Every other format that is made, in both directions.

import { race } from '../lib/race.mjs'
import { convertJob } from './convert.mjs'

const FORMATS = [
  { name: 'vmdk', format: 'vmdk', flags: [] },
  { name: 'vmdk streamOptimized', format: 'vmdk', flags: ['-o', 'subformat=streamOptimized'] },
  { name: 'vhdx', format: 'vhdx', flags: [] },
  { name: 'vpc', format: 'vpc', flags: ['-o', 'force_size=on'] },
  { name: 'vdi', format: 'vdi', flags: [] },
  { name: 'parallels', format: 'parallels', flags: [] },
]

export const line = {
  name: 'formats',
  about: 'Converts from raw to other formats and back',
  async run(bench) {
    const { path, words } = await bench.part()
    const chosen = bench.quick ? FORMATS.slice(1, 3) : FORMATS
    const rows = chosen.flatMap(({ name, format, flags }) => {
      const image = bench.image(`${name}.img`, path, '-O', format, ...flags)
      return [
        convertJob(bench, `raw to ${name}`, { source: path, from: 'raw', to: format, flags }),
        convertJob(bench, `${name} to raw`, { source: image, from: format, to: 'raw' }),
      ].flatMap(job => race(bench, job))
    })
    return { rows, notes: [`${words}.`] }
  },
}
