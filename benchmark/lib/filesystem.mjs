// File systems in loop-mounted files, where they can be had: that takes root and a loop device.

import { spawnSync } from 'node:child_process'
import { closeSync, existsSync, ftruncateSync, mkdirSync, openSync, rmSync } from 'node:fs'
import { join } from 'node:path'

const MAKE = {
  // A file system that shares extents.
  xfs: ['mkfs.xfs', '-q', '-m', 'reflink=1'],
  ext4: ['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=0,lazy_journal_init=0'],
}

/** Mounts a new one of `sizeMiB`, whose file is in `folder`; `undefined`, with a visible line, where that is not possible. */
export function mount(kind, folder, sizeMiB) {
  const [image, place] = [join(folder, `${kind}-${process.pid}.img`), join(folder, `${kind}-${process.pid}`)]
  const file = openSync(image, 'w')
  ftruncateSync(file, sizeMiB * 2 ** 20)
  closeSync(file)
  mkdirSync(place)
  for (const [command, ...args] of [
    [...MAKE[kind], image],
    ['mount', '-o', 'loop', image, place],
  ]) {
    const { status, stderr, error } = spawnSync(command, args, { encoding: 'utf8' })
    if (status === 0) continue
    process.stderr.write(`SKIPPED ${kind} in a loop device: ${error?.message ?? stderr.trim()}\n`)
    rmSync(place, { recursive: true })
    rmSync(image)
    return undefined
  }
  return { place, image }
}

export function unmount({ place, image }) {
  spawnSync('umount', [place])
  rmSync(place, { recursive: true, force: true })
  rmSync(image, { force: true })
}

/** A device that nobody else uses: ext4 on a loop device over memory. */
export function quietDevice(sizeMiB) {
  if (existsSync('/dev/shm')) return mount('ext4', '/dev/shm', sizeMiB)
  process.stderr.write('SKIPPED a quiet device: there is no /dev/shm\n')
  return undefined
}
