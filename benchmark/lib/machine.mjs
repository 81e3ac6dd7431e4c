// What the results depend on: versions, the machine, the file system, the page cache.

import { spawnSync } from 'node:child_process'
import { statSync } from 'node:fs'
import { arch, availableParallelism, cpus, release, totalmem } from 'node:os'
import { join } from 'node:path'
import { root } from './bench.mjs'

const said = (program, ...args) => spawnSync(program, args, { encoding: 'utf8', cwd: root }).stdout?.trim()

/** By name, in the order in which it is told. */
export function describe(bench, lines) {
  const commit = said('git', 'rev-parse', '--short=12', 'HEAD') || 'unknown'
  const dirty = said('git', 'status', '--porcelain') !== ''
  const [, fileSystem] = said('df', '--output=source,fstype', bench.folder)?.split('\n') ?? []
  return {
    date: new Date().toISOString().slice(0, 16).replace('T', ' '),
    commit: dirty ? `${commit}, with changes` : commit,
    lines: lines.map(({ name }) => name).join(' '),
    rounds: bench.rounds,
    quick: bench.quick ? 'yes: small inputs, a debug build perhaps, times mean nothing' : 'no',
    node: process.versions.node,
    qemu: bench.qemu ?? 'not installed: nothing to compare with',
    kernel: `${process.platform} ${release()} ${arch()}`,
    machine: `${availableParallelism()} x ${cpus()[0]?.model.trim()}, ${Math.round(totalmem() / 2 ** 30)} GiB`,
    'file system': fileSystem?.split(/\s+/).join(', ') ?? 'unknown',
    'page cache': bench.cold ? 'cold: dropped before each trial' : 'warm and clean: synced before each trial',
    addon: addon(),
  }
}

/** One without optimisation is many times larger. */
function addon() {
  const file = process.env.NAPI_RS_NATIVE_LIBRARY_PATH ?? said('sh', '-c', 'ls dist/*.node')?.split('\n')[0] ?? ''
  try {
    return `${(statSync(join(root, file)).size / 1e6).toFixed(1)} MB`
  } catch {
    return file
  }
}
