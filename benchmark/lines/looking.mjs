// What looks at images: check and map of one whose clusters are all mapped, measure and compare of one with data.

import { race } from '../lib/race.mjs'

const MAPPED = 'An image of 1 TiB whose clusters are all mapped (preallocation=metadata).'

const ofMapped = name => ({
  name,
  about: `\`${name}\` of an image of 1 TiB`,
  async run(bench) {
    const image = bench.once('mapped', () => bench.mapped())
    const args = name === 'check' ? ['check', '-q', image] : ['map', '--output=json', image]
    return { rows: race(bench, { name: `${name}, all clusters mapped`, sides: bench.both(args) }), notes: [MAPPED] }
  },
})

export const check = ofMapped('check')
export const map = ofMapped('map')

export const measure = {
  name: 'measure',
  about: '`measure` of a disk with data',
  async run(bench) {
    const { path, words } = await bench.disk()
    const qcow2 = bench.image('disk.qcow2', path, '-O', 'qcow2')
    const job = (name, format, image) => ({
      name,
      sides: bench.both(['measure', '--output=json', '-f', format, '-O', 'qcow2', image]),
    })
    const jobs = [
      job('measure of raw', 'raw', path),
      job('measure of qcow2', 'qcow2', qcow2),
      job(
        'measure, all clusters mapped',
        'qcow2',
        bench.once('mapped', () => bench.mapped()),
      ),
    ]
    return { rows: jobs.flatMap(each => race(bench, each)), notes: [`${words}.`] }
  },
}

export const compare = {
  name: 'compare',
  about: '`compare` of equal disks',
  async run(bench) {
    const { path, words } = await bench.disk()
    const qcow2 = bench.image('disk.qcow2', path, '-O', 'qcow2')
    const job = (name, from, to, a, b) => ({ name, sides: bench.both(['compare', '-q', '-f', from, '-F', to, a, b]) })
    const jobs = [
      job('compare qcow2 with raw', 'qcow2', 'raw', qcow2, path),
      job('compare raw with itself', 'raw', 'raw', path, path),
    ]
    return { rows: jobs.flatMap(each => race(bench, each)), notes: [`${words}.`] }
  },
}
