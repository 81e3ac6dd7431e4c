/** How files are opened, shared with other processes, and written: the options that `open` and the jobs have in common. */

import { invalidArgument } from './errors.js'
import type { NativeLock, NativeWriting } from './native.js'
import { flag, oneOf, type Read } from './options.js'

/**
 * How the host caches an image, by QEMU's names:
 *
 * | mode | page cache | a write is durable |
 * |---|---|---|
 * | `writeback` | used | at the next `datasync` |
 * | `none` | bypassed (`O_DIRECT`) | at the next `datasync` |
 * | `writethrough` | used | when its promise resolves |
 * | `directsync` | bypassed (`O_DIRECT`) | when its promise resolves |
 * | `unsafe` | used | never for sure: nothing is synced, on closing too |
 *
 * Other systems than Linux bypass the cache by a call of their own: the guide on platforms has it.
 */
export type CacheMode = 'writeback' | 'none' | 'writethrough' | 'directsync' | 'unsafe'

/**
 * How an image is shared with other processes. On Linux the locks are QEMU's: a running QEMU and this library keep each other out. On other
 * systems they hold between processes of this library; the guide on platforms says what keeps QEMU out.
 */
export interface SharingOptions {
  /**
   * `'auto'`, the default: files are locked where the system can. `'on'`: refuse where it cannot. `'off'`: lock nothing.
   * Reading excludes writers, writing excludes everybody else.
   */
  locking?: 'auto' | 'on' | 'off' | undefined
  /** Read although another process writes. What is read then need not be consistent. */
  forceShare?: boolean | undefined
}

/** The table entries of {@link SharingOptions}. */
export const SHARING = { locking: oneOf('auto', 'on', 'off'), forceShare: flag } as const

/** Options of `open` that say how the image is accessed. */
export interface AccessOptions extends SharingOptions {
  /** `'r'` to read, the default; `'r+'` to read and write. */
  flags?: 'r' | 'r+' | undefined
  /** Default `'writeback'`. It holds for every file of the backing chain. */
  cache?: CacheMode | undefined
  /** What {@link Image.discard} does: nothing, the default, or freeing clusters and their space. */
  discard?: 'ignore' | 'unmap' | undefined
  /**
   * What a write of nothing but zeroes becomes: data, the default; a write of zeroes that keeps its clusters (`'on'`); one that
   * gives them up (`'unmap'`).
   */
  detectZeroes?: 'off' | 'on' | 'unmap' | undefined
  /**
   * Write refcounts late, as QEMU's option `lazy-refcounts`: the image is marked dirty while it is open, and one that is not closed
   * is repaired when it is opened for writing the next time, by whichever program. Default false, also for an image that was created
   * with `lazyRefcounts`, which allows this and does not demand it: refcounts seldom cost a sync here. Needs version 3.
   */
  lazyRefcounts?: boolean | undefined
}

/** The table entries of {@link AccessOptions}. */
export const ACCESS = {
  ...SHARING,
  flags: oneOf('r', 'r+'),
  cache: oneOf('writeback', 'none', 'writethrough', 'directsync', 'unsafe'),
  discard: oneOf('ignore', 'unmap'),
  detectZeroes: oneOf('off', 'on', 'unmap'),
  lazyRefcounts: flag,
} as const

/** How a chain's files are opened. */
export interface Access {
  readonly cache: CacheMode | undefined
  readonly lock: NativeLock | undefined
  /** How the top layer is written; undefined for reading only. */
  readonly write: NativeWriting | undefined
}

/** For reading, locked where the system can. */
export const READING: Access = { cache: undefined, lock: { locking: 'auto' }, write: undefined }

/** For writing, with the defaults of `open`. */
export const WRITING: Access = { ...READING, write: {} }

/** Reads {@link SharingOptions} for a job that only reads. */
export function toReadAccess({ locking = 'auto', forceShare }: Partial<Read<typeof SHARING>>): Access {
  return { cache: undefined, lock: locking === 'off' ? undefined : { locking, forceShare }, write: undefined }
}

/** Reads {@link AccessOptions}; what only makes sense for writing is refused without it. */
export function toAccess(owner: string, read: Read<typeof ACCESS>): Access {
  const { flags = 'r', cache, discard, detectZeroes, lazyRefcounts } = read
  const reading = { ...toReadAccess(read), cache }
  if (flags === 'r') {
    for (const [name, value] of Object.entries({ discard, detectZeroes, lazyRefcounts })) {
      if (value !== undefined) throw invalidArgument(name, `${owner}: ${name} is for writing: it needs flags: 'r+'`)
    }
    return reading
  }
  if (read.forceShare) {
    throw invalidArgument('forceShare', `${owner}: forceShare is for reading: a writer excludes other writers`)
  }
  return { ...reading, write: { cache, discard, detectZeroes, lazyRefcounts } }
}

/** How the files of a layer are locked. */
export const lockFor = ({ lock, write }: Access): NativeLock | undefined =>
  lock && { ...lock, writable: write !== undefined }
