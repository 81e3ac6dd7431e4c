// What is converted: an ext4 file system with files of this machine, as mke2fs makes it, or a structured disk where mke2fs is
// missing or something small is wanted.

import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { closeSync, ftruncateSync, openSync, writeSync } from 'node:fs'

const MIB = 2 ** 20

/** Makes the disk at `path`; returns what it is, in words. `source` is the folder that the file system gets. */
export function makeInput(path, { source, sizeMiB }) {
  const mke2fs = ['mke2fs', '/sbin/mke2fs', '/usr/sbin/mke2fs'].find(name => !spawnSync(name, ['-V']).error)
  if (source && mke2fs) {
    const made = spawnSync(mke2fs, ['-q', '-F', '-t', 'ext4', '-d', source, path, `${sizeMiB}M`], { encoding: 'utf8' })
    if (made.status === 0) return `ext4 of ${sizeMiB} MiB with ${source}`
    process.stderr.write(`mke2fs of ${source} failed, a structured disk instead: ${made.stderr}`)
  }
  structured(path, sizeMiB)
  return `structured disk of ${sizeMiB} MiB: text, records, noise and holes by turns`
}

/** A disk that is the same on every machine. */
function structured(path, sizeMiB) {
  const file = openSync(path, 'w')
  ftruncateSync(file, sizeMiB * MIB)
  const kinds = [text, records, noise, undefined]
  for (let at = 0; at < sizeMiB; at++) {
    const chunk = kinds[at % kinds.length]?.(at)
    if (chunk) writeSync(file, chunk, 0, MIB, at * MIB)
  }
  closeSync(file)
}

const text = at => Buffer.alloc(MIB, `The quick brown fox jumps over the lazy dog, for the ${at}th time. `)

function records(at) {
  const chunk = Buffer.alloc(MIB)
  for (let i = 0; i < MIB; i += 64) {
    chunk.writeUInt32LE(at * 16384 + i / 64, i)
    chunk.writeUInt32LE((i * 2654435761) >>> 0, i + 8)
  }
  return chunk
}

function noise(at) {
  const seed = createHash('sha256').update(`noise ${at}`).digest()
  const blocks = Array.from({ length: MIB / 32 }, (_, i) => createHash('sha256').update(seed).update(`${i}`).digest())
  return Buffer.concat(blocks)
}
