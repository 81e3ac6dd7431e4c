/** Writing guest bytes: its options, the requests that it becomes, and the stream of guest bytes into an image. */

import type { Writable } from 'node:stream'
import type { Chain } from './backing/chain.js'
import { AbortError, invalidArgument, Qcow2Error } from './errors.js'
import { can } from './formats/table.js'
import { ABORTABLE, type Abortable, bytes, flag, integer, readOptions } from './options.js'
import { endedBy, nodeStream } from './support/node-stream.js'
import { requestWatched, type StartWatched, submitWrite, toError, watchLook } from './support/requests.js'
import { type Size, toBytes } from './units.js'

/** What {@link Image.write} did. */
export interface WriteResult<T> {
  /** Bytes that were written: all of them. */
  bytesWritten: number
  /** The buffer that was given. */
  buffer: T
}

/** What {@link Image.writev} did. */
export interface WritevResult<T> {
  /** Bytes that were written, from all of them. */
  bytesWritten: number
  /** The buffers that were given. */
  buffers: T
}

/** Options of {@link Image.write}. */
export interface WriteOptions extends Abortable {
  /** Guest offset in bytes. */
  position: Size
  /** Where in the buffer to begin, in bytes. Default 0. */
  offset?: number | undefined
  /** How many bytes. Default: the rest of the buffer. */
  length?: number | undefined
  /**
   * Store the clusters compressed, those that shrink. The range must be whole clusters (the last one of the disk may be cut
   * off); a raw image and one with an external data file have no compressed clusters.
   */
  compressed?: boolean | undefined
}

/** The table entries of {@link WriteOptions}. */
export const WRITE = { ...ABORTABLE, position: bytes, offset: bytes, length: bytes, compressed: flag } as const

/** Options of {@link Image.writev}. */
export interface WritevOptions extends Abortable {
  /** As for {@link Image.write}; the buffers together are whole clusters. */
  compressed?: boolean | undefined
}

/** The table entries of {@link WritevOptions}. */
export const WRITEV = { ...ABORTABLE, compressed: flag } as const

/** Options of {@link Image.writeZeroes}. */
export interface WriteZeroesOptions extends Abortable {
  /** Give the clusters and their space up. Default false: what is allocated stays allocated. */
  unmap?: boolean | undefined
}

/** The table entries of {@link WriteZeroesOptions}. */
export const WRITE_ZEROES = { ...ABORTABLE, unmap: flag } as const

/** Options of {@link Image.createWriteStream}. */
export interface WriteStreamOptions extends Abortable {
  /** First guest byte. Default 0. */
  start?: Size | undefined
  /** Bytes that are taken before the writer is asked to wait: 512 to 2^30. Default 1 MiB. */
  highWaterMark?: number | undefined
  /** Make everything durable before the stream finishes, as Node's `fs.createWriteStream` has it. Default false. */
  flush?: boolean | undefined
}

const STREAM = { ...ABORTABLE, start: bytes, highWaterMark: integer(512, 2 ** 30), flush: flag } as const

const MEBIBYTE = 2 ** 20

/** What a write stream needs of an image. */
interface Disk {
  writev(buffers: readonly Uint8Array[], position: Size): Promise<unknown>
  datasync(): Promise<void>
}

/** See {@link Image.createWriteStream}. Wrong options throw at once: a stream has no promise to reject. */
export function openWriteStream(disk: Disk, options: WriteStreamOptions | undefined): Writable {
  const read = readOptions(options, 'Image.createWriteStream', STREAM)
  const { start = 0, highWaterMark = MEBIBYTE, flush, signal } = read
  let position = BigInt(start)
  const write = (buffers: readonly Uint8Array[], done: (error?: Error | null) => void): void => {
    const at = position
    for (const buffer of buffers) position += BigInt(buffer.length)
    disk.writev(buffers, at).then(() => done(), done)
  }
  const stream = new (nodeStream().Writable)({
    highWaterMark,
    write: (chunk: Uint8Array, _, done) => write([chunk], done),
    writev: (chunks, done) =>
      write(
        chunks.map(({ chunk }) => chunk as Uint8Array),
        done,
      ),
    final: done => {
      if (flush) disk.datasync().then(() => done(), done)
      else done()
    },
  })
  return endedBy(stream, signal)
}

/** Checks a range that is to be written against the disk, before anything changes. */
export function checkInside(owner: string, position: number, length: number, virtualSize: number): void {
  if (position + length <= virtualSize) return
  const message = `${owner}: ${length} bytes at ${position} reach beyond the disk of ${virtualSize} bytes`
  throw invalidArgument(`${owner}: ${position > virtualSize ? 'position' : 'length'}`, message)
}

/** Guest bytes that were checked. */
type GuestRange = readonly [position: number, length: number]

/** Reads a range of a disk of `size` bytes. */
export function toRange(owner: string, position: Size, length: Size, size: number): GuestRange {
  const range: GuestRange = [toBytes(position, `${owner}: position`), toBytes(length, `${owner}: length`)]
  checkInside(owner, ...range, size)
  return range
}

/** Checks what is to be written to a disk of `size` bytes, before anything changes. */
export function checkWrite(
  owner: string,
  { clusterSize = 1, format, hasDataFile, path }: Chain,
  size: number,
  position: number,
  length: number,
  compressed: boolean,
): void {
  checkInside(owner, position, length, size)
  if (!compressed) return
  if (!can(format, 'compress') || hasDataFile) {
    const what = can(format, 'compress') ? 'an image with an external data file' : `a ${format} image`
    throw new Qcow2Error('ERR_QCOW2_UNSUPPORTED_FEATURE', `${owner}: ${what} has no compressed clusters`, { path })
  }
  const end = position + length
  if (position % clusterSize !== 0 || (end % clusterSize !== 0 && end !== size)) {
    const message = `${owner}: a compressed write takes whole clusters of ${clusterSize} bytes, not ${length} bytes at ${position}`
    throw invalidArgument(`${owner}: ${position % clusterSize === 0 ? 'length' : 'position'}`, message)
  }
}

/** Writes a range of the view; it was checked. */
export async function put(
  image: number,
  view: Uint8Array,
  offset: number,
  length: number,
  position: number,
  compressed: boolean,
  signal?: AbortSignal,
): Promise<void> {
  if (length === 0) return
  if (signal !== undefined) {
    const start: StartWatched = (number, addon, watch) =>
      watchLook(addon.write(number, image, view, offset, length, position, compressed, watch))
    return requestWatched<void>(signal, start, { buffer: view, tells: true })
  }
  try {
    await submitWrite(image, view, offset, length, position, compressed)
  } catch (failure) {
    throw toError(failure)
  }
}

/** Several buffers that come to no more than this are written as one. */
const GATHERED = 2 ** 20

/** Writes several buffers of `length` bytes in all, one behind the other. */
export async function putAll(
  image: number,
  views: readonly Uint8Array[],
  length: number,
  position: number,
  compressed: boolean,
  signal: AbortSignal | undefined,
): Promise<void> {
  const [only] = views
  if (views.length === 1 && only !== undefined) return put(image, only, 0, length, position, compressed, signal)
  // Compressed clusters can begin in one buffer and end in the next.
  if (compressed || length <= GATHERED) {
    return put(image, Buffer.concat(views), 0, length, position, compressed, signal)
  }
  let at = position
  if (signal !== undefined) {
    // One behind the other: it must be known what is done.
    for (const view of views) {
      try {
        await put(image, view, 0, view.length, at, false, signal)
      } catch (error) {
        if (!(error instanceof AbortError)) throw error
        throw new AbortError(signal.reason, at - position + (error.bytesDone ?? 0))
      }
      at += view.length
    }
    return
  }
  const writes = views.map(view => {
    const to = at
    at += view.length
    return put(image, view, 0, view.length, to, false)
  })
  // Every buffer is in use until its own write is done, so all are waited for.
  const failed = (await Promise.allSettled(writes)).find(end => end.status === 'rejected')
  if (failed !== undefined) throw failed.reason
}

/** Makes a range read as zeroes. */
export const putZeroes = (
  image: number,
  range: GuestRange,
  unmap: boolean,
  signal: AbortSignal | undefined,
): Promise<void> =>
  requestWatched<void>(signal, (number, addon, watch) => addon.writeZeroes(number, image, ...range, unmap, watch), {
    tells: true,
  })

/** Gives the contents of a range up. */
export const giveUp = (image: number, range: GuestRange, signal: AbortSignal | undefined): Promise<void> =>
  requestWatched<void>(signal, (number, addon, watch) => addon.discard(number, image, ...range, watch), {
    tells: true,
  })
