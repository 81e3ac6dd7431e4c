/** Reading guest bytes: its options, and the requests that it becomes. */

import { ABORTABLE, type Abortable, bytes } from './options.js'
import { requestWatched, type StartWatched, submitRead, toError, watchLook } from './support/requests.js'
import type { Size } from './units.js'

/** What {@link Image.read} did. */
export interface ReadResult<T> {
  /** Bytes that were read: fewer than asked only at the end of the disk. */
  bytesRead: number
  /** The buffer that was given. */
  buffer: T
}

/** What {@link Image.readv} did. */
export interface ReadvResult<T> {
  /** Bytes that were read, into all of them. */
  bytesRead: number
  /** The buffers that were given. */
  buffers: T
}

/** Options of {@link Image.read}. */
export interface ReadOptions extends Abortable {
  /** Guest offset in bytes. */
  position: Size
  /** Where in the buffer to begin, in bytes. Default 0. */
  offset?: number | undefined
  /** How many bytes. Default: the rest of the buffer. */
  length?: number | undefined
}

/** The table entries of {@link ReadOptions}. */
export const READ = { ...ABORTABLE, position: bytes, offset: bytes, length: bytes } as const

/** Fills a range that is inside the view, as far as it is on a disk of `size` bytes; tells how much that is. */
export async function fill(
  image: number,
  size: number,
  view: Uint8Array,
  offset: number,
  length: number,
  position: number,
  signal?: AbortSignal,
): Promise<number> {
  const count = Math.min(length, size - position)
  if (count <= 0) return 0
  if (signal !== undefined) {
    const start: StartWatched = (number, addon, watch) =>
      watchLook(addon.read(number, image, view, offset, count, position, watch))
    await requestWatched<void>(signal, start, { buffer: view })
    return count
  }
  try {
    await submitRead(image, view, offset, count, position)
  } catch (failure) {
    throw toError(failure)
  }
  return count
}

/** Fills several buffers, one behind the other, as {@link fill} does each. */
export async function fillAll(
  image: number,
  size: number,
  views: readonly Uint8Array[],
  position: number,
  signal: AbortSignal | undefined,
): Promise<number> {
  let at = position
  const reads = views.map(view => {
    const from = at
    at += view.length
    return fill(image, size, view, 0, view.length, from, signal)
  })
  // Every buffer is in use until its own read is done, so all are waited for.
  const ends = await Promise.allSettled(reads)
  return ends.reduce((sum, end) => {
    if (end.status === 'rejected') throw end.reason
    return sum + end.value
  }, 0)
}
