/** Streams of guest bytes. */

import type { Readable } from 'node:stream'
import type { ReadableStream } from 'node:stream/web'
import { invalidArgument } from './errors.js'
import type { MapEntry } from './map.js'
import { ABORTABLE, type Abortable, bytes, flag, integer, readOptions } from './options.js'
import { endedBy, nodeStream } from './support/node-stream.js'
import { type Size, safe } from './units.js'

/** Options of {@link Image.readableWebStream}. */
export interface WebStreamOptions extends Abortable {
  /** First guest byte. Default 0. */
  start?: Size | undefined
  /** Last guest byte, included, as for Node's `fs.createReadStream`. Default: the end of the disk. */
  end?: Size | undefined
  /** Bytes per read, and read ahead: 512 to 2^30. Default 1 MiB. */
  highWaterMark?: number | undefined
}

/** Options of {@link Image.createReadStream}. */
export interface ReadStreamOptions extends WebStreamOptions {
  /** Emit objects `{ position, buffer }` for what does not read as zeroes, and skip the rest. */
  sparse?: boolean | undefined
}

/** What a sparse stream emits. */
export interface SparseChunk {
  /** Guest offset in bytes. */
  readonly position: number
  /** The bytes there. It is the receiver’s own. */
  readonly buffer: Buffer
}

/** The stream that {@link Image.createReadStream} makes with `sparse`. */
export interface SparseReadable extends Readable {
  /** The chunks, in the disk's order. */
  [Symbol.asyncIterator](): NodeJS.AsyncIterator<SparseChunk, undefined, undefined>
  /** The next chunk, if there is one already. */
  read(size?: number): SparseChunk | null
  /** All chunks. */
  toArray(options?: Abortable): Promise<SparseChunk[]>
}

/** What a stream needs of an image. */
export interface Guest {
  readonly virtualSize: number
  read(buffer: Buffer, options: { position: number; signal?: AbortSignal | undefined }): Promise<{ bytesRead: number }>
  map(range: { readonly start: number; readonly length: number }): AsyncIterable<MapEntry>
}

const CHUNK = 2 ** 20

const WEB = { ...ABORTABLE, start: bytes, end: bytes, highWaterMark: integer(512, 2 ** 30) } as const
const NODE = { ...WEB, sparse: flag } as const

interface Range {
  readonly start: number
  /** Excluded. */
  readonly end: number
}

function toRange(virtualSize: number, start: number | undefined, end: number | undefined, chunk: number): Range {
  const from = start ?? 0
  if (end !== undefined && end < from) {
    throw invalidArgument('end', `end (${end}) is before start (${from}); it is the last byte, included`)
  }
  const to = end === undefined ? virtualSize : Math.min(virtualSize, end + 1)
  // Beyond, every chunk must begin where numbers are exact.
  if (to > Number.MAX_SAFE_INTEGER && (from % 512 !== 0 || chunk % 512 !== 0)) {
    const message = 'beyond 2^53 - 1, start and highWaterMark must be multiples of 512'
    throw invalidArgument(chunk % 512 === 0 ? 'start' : 'highWaterMark', message)
  }
  return { start: Math.min(from, to), end: to }
}

/** See {@link Image.createReadStream}. Wrong options throw at once: a stream has no promise to reject. */
export function openReadStream(image: Guest, options: ReadStreamOptions | undefined): Readable {
  const { start, end, highWaterMark = CHUNK, sparse, signal } = readOptions(options, 'Image.createReadStream', NODE)
  const range = toRange(image.virtualSize, start, end, highWaterMark)
  const chunks = sparse ? sparseChunks(image, range, highWaterMark) : denseChunks(image, range, highWaterMark)
  const stream = nodeStream().Readable.from(chunks, {
    objectMode: sparse === true,
    highWaterMark: sparse ? 1 : highWaterMark,
  })
  return endedBy(stream, signal)
}

/** See {@link Image.readableWebStream}. */
export function openWebStream(image: Guest, options: WebStreamOptions | undefined): ReadableStream<Uint8Array> {
  const { start, end, highWaterMark = CHUNK, signal } = readOptions(options, 'Image.readableWebStream', WEB)
  const chunks = denseChunks(image, toRange(image.virtualSize, start, end, highWaterMark), highWaterMark, signal)
  // The global: its module is loaded at the first use, not when the library is.
  return new globalThis.ReadableStream<Uint8Array>(
    {
      async pull(controller) {
        const { done, value } = await chunks.next()
        if (done) controller.close()
        else controller.enqueue(value)
      },
      async cancel() {
        await chunks.return()
      },
    },
    // One chunk is read ahead.
    { highWaterMark: 1 },
  )
}

/** One chunk is read ahead while the consumer works on the one before. */
async function* denseChunks(
  image: Guest,
  { start, end }: Range,
  size: number,
  signal?: AbortSignal,
): AsyncGenerator<Buffer, void, undefined> {
  const read = (position: number): Promise<Buffer> | undefined => {
    if (position >= end) return undefined
    const ahead = chunk(image, position, Math.min(size, end - position), signal)
    // Its failure counts when its turn comes, which it does not if the consumer stops before.
    ahead.catch(() => {})
    return ahead
  }
  let next = read(start)
  for (let position = start + size; next !== undefined; position += size) {
    const current: Buffer = await next
    next = read(position)
    yield current
  }
}

async function* sparseChunks(
  image: Guest,
  { start, end }: Range,
  size: number,
): AsyncGenerator<SparseChunk, void, undefined> {
  for await (const entry of image.map({ start, length: end - start })) {
    if (entry.zero) continue
    const entryEnd = entry.start + entry.length
    for (let position = entry.start; position < entryEnd; position += size) {
      yield {
        position: safe(position, 'position'),
        buffer: await chunk(image, position, Math.min(size, entryEnd - position)),
      }
    }
  }
}

/** A buffer of its own for every chunk: the consumer keeps it. */
async function chunk(image: Guest, position: number, length: number, signal?: AbortSignal): Promise<Buffer> {
  const buffer = Buffer.allocUnsafeSlow(length)
  await image.read(buffer, { position, ...(signal && { signal }) })
  return buffer
}
