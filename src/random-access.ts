/** Disks that are neither files nor exports: what a caller's own object reads and writes. */

import { invalidArgument } from './errors.js'
import { bytes, callback, integer, type Reader, readOptions, text } from './options.js'
import { describe } from './units.js'

/** Runs of bytes, as a source tells of them. */
export interface SourceExtent {
  /** Bytes from the beginning of the source. */
  readonly position: number
  /** Bytes. */
  readonly length: number
  /** Whether there are only zero bytes, so that nothing of it needs to be read. */
  readonly zero: boolean
}

/** How what a source was read is kept. */
export interface SourceCache {
  /** Bytes of a block, which is read as a whole; 4096 to 64 MiB. Default 1 MiB. */
  readonly blockSize?: number | undefined
  /** Bytes of all blocks that are kept. Default 32 blocks. What is on its way comes on top. */
  readonly size?: number | undefined
  /** Bytes that are read ahead of a reader that goes forward, at most. Default 8 blocks; 0 for none. */
  readonly readAhead?: number | undefined
}

/**
 * A disk that an object of the caller's reads, and where it can, writes: for everything that takes an {@link ImageSource}, and as the target of
 * `convert`. Its promises are awaited by worker threads while the event loop goes on, up to `concurrency` of them at once. What it throws is
 * the `cause` of the error that the library's call ends with; of a `Qcow2Error` the code is kept, too. Every `signal` is aborted when nobody
 * waits for the answer any more; an answer that comes later is ignored.
 *
 * A source that never answers holds up nobody but those who asked it: they are ended by their `signal`, by closing the image (five seconds
 * without a word), and by the end of the process.
 *
 * @example
 * ```ts
 * const disk: RandomAccessSource = {
 *   size: bytes.length,
 *   read: async (buffer, position) => {
 *     buffer.set(bytes.subarray(position, position + buffer.length))
 *     return buffer.length
 *   },
 * }
 * const image = await open(disk)
 * ```
 */
export interface RandomAccessSource {
  /** Bytes. It is read where the source is given to a call; what `truncate` was told is the size from then on. */
  readonly size: number
  /**
   * Fills the whole `buffer` with the bytes from `position` on, and returns its length: nobody asks for bytes behind the end, so any other
   * number is an error (`ERR_QCOW2_IO`). The buffer is the source's until its promise is settled.
   */
  read(buffer: Uint8Array, position: number, signal: AbortSignal): Promise<number> | number
  /** Writes all of `buffer` at `position`, and returns its length; where that is behind the end, the source grows. Without it the source is read only. */
  write?(buffer: Uint8Array, position: number, signal: AbortSignal): Promise<number> | number
  /** Makes durable what was written before it was called. */
  sync?(signal: AbortSignal): Promise<void> | void
  /** Makes the source as long as that; what it grows by reads as zeroes. Without it the source keeps its size, as a device does. */
  truncate?(size: number, signal: AbortSignal): Promise<void> | void
  /** Called when what was opened on the source is closed, once for each time. */
  close?(): Promise<void> | void
  /** What is equal for two sources is the same bytes: so a loop in a chain is seen, and a target that is its own source. Default: the object. */
  readonly identity?: string | undefined
  /** What of the bytes from `position` on is zero: runs in order that begin at `position`, as many as the source likes to tell at once. */
  extents?(
    position: number,
    length: number,
    signal: AbortSignal,
  ): Promise<readonly SourceExtent[]> | readonly SourceExtent[]
  /** How many requests it may be asked at once, 1 to 1024. Default 8. */
  readonly concurrency?: number | undefined
  /** What errors call it. Default `RandomAccessSource`. */
  readonly name?: string | undefined
  /** How what was read is kept; `false`: not at all. */
  readonly cache?: SourceCache | false | undefined
}

const MEBIBYTE = 2 ** 20

const CACHE = { blockSize: integer(4096, 64 * MEBIBYTE), size: bytes, readAhead: bytes } as const

/** {@link SourceCache}, with all of it said. */
export interface ReadSourceCache {
  readonly blockSize: number
  readonly size: number
  readonly readAhead: number
}

const cacheShape: Reader<false | ReadSourceCache> = (value, name) => {
  if (value === false) return false
  const { blockSize = MEBIBYTE, size = 32 * blockSize, readAhead = 8 * blockSize } = readOptions(value, name, CACHE)
  return { blockSize, size, readAhead }
}

const method = callback<(...values: never[]) => unknown>()
const OPTIONAL = ['write', 'sync', 'truncate', 'close', 'extents'] as const
const CONCURRENCY = integer(1, 1024)

/** A source that was checked. */
export interface RandomPlace {
  readonly object: RandomAccessSource
  readonly size: number
  readonly name: string
  readonly identity: string
  readonly concurrency: number
  readonly cache: false | ReadSourceCache
}

/** Objects, told apart. */
const numbers = new WeakMap<object, number>()
let last = 0

function numberOf(object: object): number {
  const known = numbers.get(object)
  if (known !== undefined) return known
  last += 1
  numbers.set(object, last)
  return last
}

/** Whether a value is meant as a source: what it has is checked by {@link toRandomPlace}. */
export const isRandomAccess = (value: unknown): value is RandomAccessSource =>
  typeof value === 'object' && value !== null && 'read' in value && 'size' in value && !('fd' in value)

/** Checks a source. `name` is the argument's, for the message. */
export function toRandomPlace(source: RandomAccessSource, name: string): RandomPlace {
  method(source.read, `${name}.read`)
  for (const each of OPTIONAL) if (source[each] !== undefined) method(source[each], `${name}.${each}`)
  const size = bytes(source.size, `${name}.size`)
  if (size > Number.MAX_SAFE_INTEGER) {
    throw invalidArgument('size', `${name}.size must be a number up to 2^53 - 1, not ${describe(source.size)}`)
  }
  const own = <T>(key: keyof RandomAccessSource, reader: Reader<T>, otherwise: T): T =>
    source[key] === undefined ? otherwise : reader(source[key], `${name}.${key}`)
  const identity = own('identity', text, '')
  return {
    object: source,
    size,
    name: own('name', text, 'RandomAccessSource'),
    // A name of the caller's is never the number of an object.
    identity: identity === '' ? `#${numberOf(source)}` : `=${identity}`,
    concurrency: own('concurrency', CONCURRENCY, 8),
    cache: own('cache', cacheShape, cacheShape({}, name)),
  }
}
