// What is converted: an ext4 file system with files of this machine, as mke2fs makes it, or a structured disk where mke2fs is
// missing or something small is wanted.

import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { closeSync, ftruncateSync, openSync, writeSync } from 'node:fs'
import { open } from '../../dist/index.js'
import { trial } from './trial.mjs'

const MIB = 2 ** 20
const FULL_MIB = 16 * 1024

/** A raw disk with at most `dataMiB` of data: its path, the bytes of data, and what it is, in words. */
export async function makeDisk(bench, name, dataMiB) {
  const path = bench.at(name)
  const source = bench.quick
    ? undefined
    : await bench.once('ext4', () => makeFileSystem(bench.at('ext4.raw'), bench.source))
  if (source === undefined) {
    structured(path, dataMiB)
    return {
      path,
      data: (dataMiB * MIB * 3) / 4,
      words: `structured disk of ${dataMiB} MiB: text, records, noise and holes by turns`,
    }
  }
  const { end, data } = await cut(source, dataMiB * MIB)
  trial(bench.ours('dd', '-f', 'raw', '-O', 'raw', `bs=${MIB}`, `count=${end / MIB}`, `if=${source}`, `of=${path}`))
  const words = `the first ${end / MIB} MiB of an ext4 file system with ${bench.source}, ${Math.round(data / MIB)} MiB of data`
  return { path, data, words }
}

/** An ext4 file system with the files of a folder; `undefined`, with a visible line, where it cannot be made. */
function makeFileSystem(path, folder) {
  const mke2fs = ['mke2fs', '/sbin/mke2fs', '/usr/sbin/mke2fs'].find(name => !spawnSync(name, ['-V']).error)
  if (mke2fs === undefined) {
    process.stderr.write('SKIPPED mke2fs is not installed: a structured disk instead of a file system\n')
    return undefined
  }
  const made = spawnSync(mke2fs, ['-q', '-F', '-t', 'ext4', '-d', folder, path, `${FULL_MIB}M`], { encoding: 'utf8' })
  if (made.status === 0) return path
  process.stderr.write(`SKIPPED mke2fs of ${folder} failed, a structured disk instead: ${made.stderr}\n`)
  return undefined
}

/** Where to cut a disk, in whole MiB, so that what is in front has `wanted` bytes of data. */
async function cut(path, wanted) {
  const image = await open(path, { format: 'raw' })
  let [data, end] = [0, image.virtualSize]
  for await (const extent of image.map()) {
    if (!extent.data) continue
    if (data + extent.length >= wanted) {
      end = Math.min(end, Math.ceil((extent.start + wanted - data) / MIB) * MIB)
      data = wanted
      break
    }
    data += extent.length
  }
  await image.close()
  return { end, data }
}

/** A disk that is the same on every machine. */
export function structured(path, sizeMiB) {
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
