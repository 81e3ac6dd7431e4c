/** What writing takes: its options, and the stream of guest bytes into an image. */

import { Writable } from 'node:stream'
import { invalidArgument } from './errors.js'
import { ABORTABLE, type Abortable, bytes, flag, integer, readOptions } from './options.js'
import type { Size } from './units.js'

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
  writev(buffers: readonly Uint8Array[], position: number): Promise<unknown>
  datasync(): Promise<void>
}

/** See {@link Image.createWriteStream}. Wrong options throw at once: a stream has no promise to reject. */
export function openWriteStream(disk: Disk, options: WriteStreamOptions | undefined): Writable {
  const read = readOptions(options, 'Image.createWriteStream', STREAM)
  const { start = 0, highWaterMark = MEBIBYTE, flush, signal } = read
  let position = start
  const write = (buffers: readonly Uint8Array[], done: (error?: Error | null) => void): void => {
    const at = position
    for (const buffer of buffers) position += buffer.length
    disk.writev(buffers, at).then(() => done(), done)
  }
  return new Writable({
    highWaterMark,
    ...(signal && { signal }),
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
}

/** Checks a range that is to be written against the disk, before anything changes. */
export function checkInside(owner: string, position: number, length: number, virtualSize: number): void {
  if (position + length <= virtualSize) return
  const message = `${owner}: ${length} bytes at ${position} reach beyond the disk of ${virtualSize} bytes`
  throw invalidArgument(`${owner}: ${position > virtualSize ? 'position' : 'length'}`, message)
}
