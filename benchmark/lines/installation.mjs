// The installation table: a recorded installation of a system, request by request, on qcow2 and on a raw file, in three cache modes,
// on an empty disk that grows and on one that has it already; on the shared disk, on a device that nobody else uses, and on that
// with a delay for each sync, as a real disk has.

import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { root } from '../lib/bench.mjs'
import { quietDevice, unmount } from '../lib/filesystem.mjs'
import { race } from '../lib/race.mjs'
import { table } from '../lib/record.mjs'
import { median } from '../lib/samples.mjs'

const STARTS = ['growing', 'rewritten']
export const MODES = ['none', 'writethrough', 'writeback']

/** Who does it, in the order of a round: raw, qcow2, raw, qcow2. */
const SIDES = [
  { name: 'raw, ours', by: 'ours', format: 'raw' },
  { name: 'qcow2, ours', by: 'ours', format: 'qcow2' },
  { name: 'raw, QEMU', by: 'qemu', format: 'raw' },
  { name: 'qcow2, QEMU', by: 'qemu', format: 'qcow2' },
  { name: 'qcow2, old policy', by: 'old', format: 'qcow2' },
]

/** What a page of 2009 says about the change from QEMU 0.10.5 to 0.11: the time of an installation over that on a raw disk. */
const HISTORY = {
  'qcow2, old policy': { none: 2.97, writethrough: 3.91, writeback: 1.0 },
  'qcow2, ours': { none: 1.009, writethrough: 1.257, writeback: 1.022 },
}

/** Each sync of a device that is no memory: what a disk with a cache that survives power cuts takes, about. */
const DELAY_US = 200
const DISK_MIB = 6 * 1024

/** A library that makes QEMU's syncs slow; `undefined`, with a visible line, where there is no C compiler. */
function slowSync(bench) {
  const library = bench.at('slow-sync.so')
  const source = join(root, 'benchmark', 'lib', 'slow-sync.c')
  const { status, stderr, error } = spawnSync(process.env.CC ?? 'cc', [
    '-shared',
    '-fPIC',
    '-O2',
    '-o',
    library,
    source,
  ])
  if (status === 0) return library
  bench.skip(`QEMU on a device with a delay: ${error?.message ?? stderr}`)
  return undefined
}

/** One replay in a process of its own: `by` ours, old or qemu, on a disk in `dir`. */
export function replaySide(bench, { by, format, mode, dir, more = [] }) {
  const requests = bench.quick ? ['--requests', 300] : []
  return {
    argv: [bench.example('replay'), '--dir', dir, '--by', by, '--format', format, '--mode', mode, ...requests, ...more],
    read: stdout => {
      const { seconds, ...calls } = JSON.parse(stdout)
      return { wall: seconds, ...calls }
    },
  }
}

/** The rows of one device: `{ name, dir, delay }`. */
function onDevice(bench, { name, dir, delay }) {
  const preload = delay > 0 ? bench.once('slow sync', () => slowSync(bench)) : undefined
  const withQemu = bench.qemu !== undefined && (delay === 0 || preload !== undefined)
  const delayed = delay > 0 ? ['--delay', delay, ...(preload ? ['--preload', preload] : [])] : []
  return (bench.quick ? ['growing'] : STARTS).flatMap(start =>
    (bench.quick ? ['writeback'] : MODES).flatMap(mode => {
      const more = [...delayed, ...(start === 'rewritten' ? ['--rewrite'] : [])]
      const sides = SIDES.filter(({ by }) => by !== 'qemu' || withQemu).map(({ name, by, format }) => [
        name,
        replaySide(bench, { by, format, mode, dir, more }),
      ])
      return race(bench, { name: `${name}, ${start}, ${mode}`, sides: Object.fromEntries(sides), keepOrder: true })
    }),
  )
}

/** The table of one device and one start. */
function tableOf(rows, device, start) {
  const of = (mode, side, metric) =>
    median(
      rows.find(row => row.job === `${device}, ${start}, ${mode}` && row.side === side && row.metric === metric)
        ?.values ?? [],
    )
  const cells = SIDES.map(({ name, by, format }) => {
    const raw = by === 'qemu' ? 'raw, QEMU' : 'raw, ours'
    const ratio = mode => (of(mode, name, 'wall') ?? Number.NaN) / (of(mode, raw, 'wall') ?? Number.NaN)
    const calls = mode => [of(mode, name, 'syncs'), of(mode, name, 'writes')].map(value => value ?? '-').join(', ')
    return [
      name,
      ...MODES.map(mode => {
        const seconds = of(mode, name, 'wall')
        if (seconds === undefined) return '-'
        return `${seconds.toFixed(2)} s${format === 'raw' ? '' : `, ${ratio(mode).toFixed(2)}`}`
      }),
      by === 'qemu' ? '-' : MODES.map(calls).join('; '),
      HISTORY[name] ? MODES.map(mode => HISTORY[name][mode]).join(', ') : '-',
    ]
  })
  const head = [`${device}, ${start}`, ...MODES, 'fdatasync, pwrite by mode', 'ratios of 2009']
  return table(head, cells)
}

/** Those that are asked for; where there is no quiet one, what there is. */
function choose(bench, devices) {
  if (bench.device === undefined) return devices
  const named = devices.filter(({ name }) => name === bench.device)
  return named.length > 0 ? named : devices.slice(0, 1)
}

export const line = {
  name: 'installation',
  about: 'A recorded installation of a system: time, and over that on a raw file',
  async run(bench) {
    if (
      spawnSync(bench.example('replay'), ['--requests', '0', '--dir', bench.folder], { encoding: 'utf8' }).stdout === ''
    ) {
      bench.skip('the recording of an installation is not there: QCOW2_TRACES names its folder')
      return { rows: [], notes: [] }
    }
    const quiet = quietDevice(bench.quick ? 256 : DISK_MIB)
    try {
      const devices = choose(bench, [
        { name: 'shared disk', dir: bench.folder, delay: 0 },
        ...(quiet ? [{ name: 'quiet device', dir: quiet.place, delay: 0 }] : []),
        ...(quiet ? [{ name: `quiet device, ${DELAY_US} us a sync`, dir: quiet.place, delay: DELAY_US }] : []),
      ])
      const rows = devices.flatMap(device => onDevice(bench, device))
      const tables = devices.flatMap(({ name }) =>
        STARTS.filter(start => rows.some(({ job }) => job.startsWith(`${name}, ${start},`))).map(start =>
          tableOf(rows, name, start),
        ),
      )
      const notes = [
        'Cells: seconds, and over the raw file by the same driver (the old policy: over raw by ours).',
        'Old policy: tables written at each allocation, and made durable there with none; with writethrough every write is by itself.',
        'The quiet device is ext4 on a loop device over memory.',
      ]
      return { rows, notes, tables }
    } finally {
      if (quiet) unmount(quiet)
    }
  },
}
