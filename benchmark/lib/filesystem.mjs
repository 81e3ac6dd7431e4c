// File systems in loop-mounted files, where they can be had: that takes root and a loop device.

import { spawnSync } from 'node:child_process'
import { closeSync, existsSync, ftruncateSync, mkdirSync, openSync, rmSync, writeSync } from 'node:fs'
import { join } from 'node:path'

const MAKE = {
  // A file system that shares extents.
  xfs: ['mkfs.xfs', '-q', '-m', 'reflink=1'],
  ext4: ['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=0,lazy_journal_init=0,nodiscard'],
}

const MIB = 2 ** 20

/** Mounts a new one of `sizeMiB`, whose file is in `folder`; `undefined`, with a visible line, where that is not possible. `filled`: the
 * file has all of its space. */
export function mount(kind, folder, sizeMiB, { filled = false } = {}) {
  const [image, place] = [join(folder, `${kind}-${process.pid}.img`), join(folder, `${kind}-${process.pid}`)]
  mkdirSync(place)
  try {
    makeFile(image, sizeMiB, filled)
  } catch (error) {
    return giveUp(`${kind} in a loop device`, error.message, image, place)
  }
  for (const [command, ...args] of [
    [...MAKE[kind], image],
    ['mount', '-o', 'loop', image, place],
  ]) {
    const { status, stderr, error } = spawnSync(command, args, { encoding: 'utf8' })
    if (status === 0) continue
    return giveUp(`${kind} in a loop device`, error?.message ?? stderr.trim(), image, place)
  }
  return { place, image }
}

function makeFile(path, sizeMiB, filled) {
  const file = openSync(path, 'w')
  try {
    ftruncateSync(file, sizeMiB * MIB)
    const zeroes = Buffer.alloc(filled ? MIB : 0)
    for (let n = 0; filled && n < sizeMiB; n++) writeSync(file, zeroes, 0, MIB, n * MIB)
  } finally {
    closeSync(file)
  }
}

/** Says what there is not, and leaves nothing behind. */
function giveUp(what, why, image, place) {
  process.stderr.write(`SKIPPED ${what}: ${why}\n`)
  rmSync(place, { recursive: true, force: true })
  rmSync(image, { force: true })
  return undefined
}

export function unmount({ place, image }) {
  spawnSync('umount', [place])
  rmSync(place, { recursive: true, force: true })
  rmSync(image, { force: true })
}

/** A device that nobody else uses: ext4 on a loop device over memory, all of which is there before anything is measured: the file
 * system goes on to new blocks from trial to trial, and what finds a page for the first time waits for the machine to give it. */
export function quietDevice(sizeMiB) {
  if (existsSync('/dev/shm')) return mount('ext4', '/dev/shm', sizeMiB, { filled: true })
  process.stderr.write('SKIPPED a quiet device: there is no /dev/shm\n')
  return undefined
}
