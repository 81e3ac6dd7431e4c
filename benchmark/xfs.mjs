// A file system that shares extents, XFS in a loop-mounted file, where one can be had: it takes root and a loop device.

import { spawnSync } from 'node:child_process'
import { closeSync, ftruncateSync, mkdirSync, openSync } from 'node:fs'
import { join } from 'node:path'

/** Mounts an empty one of `sizeMiB` in `folder`; `undefined`, with a visible line, where that is not possible. */
export function mountXfs(folder, sizeMiB) {
  const [image, mount] = [join(folder, 'xfs.img'), join(folder, 'xfs')]
  const file = openSync(image, 'w')
  ftruncateSync(file, sizeMiB * 2 ** 20)
  closeSync(file)
  mkdirSync(mount)
  for (const [command, ...args] of [
    ['mkfs.xfs', '-q', '-m', 'reflink=1', image],
    ['mount', '-o', 'loop', image, mount],
  ]) {
    const { status, stderr, error } = spawnSync(command, args, { encoding: 'utf8' })
    if (status !== 0) {
      process.stderr.write(`SKIPPED on XFS: ${error?.message ?? stderr.trim()}\n`)
      return undefined
    }
  }
  return mount
}

/** Unmounts it. */
export const unmountXfs = mount => spawnSync('umount', [mount])
