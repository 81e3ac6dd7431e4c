/** The handle of an open image. */

import type { Readable } from 'node:stream'
import type { ReadableStream } from 'node:stream/web'
import type { ReferencePolicy } from './backing/policy.js'
import type { CheckResult } from './check.js'
import type { ImageInfo } from './info.js'
import type { Abortable, Limits, LongRunning } from './options.js'
import type { Format, ImageSource } from './source.js'
import type { Size } from './units.js'

/** Options of {@link open}. */
export interface OpenOptions extends Abortable {
  /** How to open the file, as for Node's `fs.open`. This version opens images for reading. Default `'r'`. */
  flags?: 'r' | undefined
  /** Default: qcow2, by its magic. Raw must be said: a guest can write any header into its raw disk. */
  format?: Format | undefined
  /** What the image may pull in. Default `'deny'`. */
  references?: ReferencePolicy | undefined
  /** Id or name of an internal snapshot: the handle is a read-only view of it. */
  snapshot?: string | undefined
  /** Bytes of L2 tables kept in memory. Default: enough for the whole image, 32 MiB at most. */
  l2CacheSize?: number | undefined
  limits?: Limits | undefined
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

/** Options of {@link Image.map}. */
export interface MapOptions extends Abortable {
  /** First guest byte. Default 0. */
  start?: Size | undefined
  /** Bytes. Default: the rest of the disk. */
  length?: Size | undefined
  /** `'top'` looks at the top layer alone: what it does not have is `present: false`. Default `'all'`. */
  depth?: 'all' | 'top' | undefined
}

/** A run of guest bytes of one kind, as QAPI's `MapEntry`. */
export interface MapEntry {
  /** First guest byte. */
  readonly start: number
  /** Bytes. */
  readonly length: number
  /** The layer that has it: 0 is the top. */
  readonly depth: number
  /** Some layer of the chain has the range. */
  readonly present: boolean
  /** Reads as zeroes. */
  readonly zero: boolean
  /** Reading takes it from a file. */
  readonly data: boolean
  readonly compressed: boolean
  /** Where the first byte is in the file, for uncompressed data. */
  readonly offset?: number
  /** The file that `offset` is in. */
  readonly filename?: string
}

/** Options of {@link Image.createReadStream}. */
export interface ReadStreamOptions extends Abortable {
  /** First guest byte. Default 0. */
  start?: Size | undefined
  /** Last guest byte, included, as for Node's `fs.createReadStream`. Default: the end of the disk. */
  end?: Size | undefined
  /** Bytes read ahead. Default 1 MiB. */
  highWaterMark?: number | undefined
  /** Emit objects `{ position, buffer }` for data only, and skip what reads as zeroes. */
  sparse?: boolean | undefined
}

/** What a sparse stream emits. */
export interface SparseChunk {
  /** Guest offset in bytes. */
  readonly position: number
  readonly buffer: Buffer
}

/** Options of {@link Image.info}. */
export interface InfoOptions extends Abortable {}

export declare class Image implements AsyncDisposable {
  private constructor()
  /** Size of the disk in bytes. */
  readonly virtualSize: number
  /** Bytes per cluster; 512 for raw. */
  readonly clusterSize: number
  readonly readOnly: boolean
  /** `close` was called: new requests are refused. */
  readonly closed: boolean
  /** Layers of the chain, the top included. */
  readonly depth: number
  read<T extends NodeJS.ArrayBufferView>(buffer: T, options: ReadOptions): Promise<{ bytesRead: number; buffer: T }>
  readv<T extends readonly NodeJS.ArrayBufferView[]>(
    buffers: T,
    position: Size,
    options?: Abortable,
  ): Promise<{ bytesRead: number; buffers: T }>
  /** The top layer. */
  info(options?: InfoOptions): Promise<ImageInfo>
  /** Every layer that is open, the top first. */
  chain(options?: InfoOptions): Promise<ImageInfo[]>
  map(options?: MapOptions): AsyncIterableIterator<MapEntry>
  check(options?: LongRunning): Promise<CheckResult>
  createReadStream(options?: ReadStreamOptions): Readable
  readableWebStream(options?: Omit<ReadStreamOptions, 'sparse'>): ReadableStream<Uint8Array>
  close(): Promise<void>
  [Symbol.asyncDispose](): Promise<void>
}

export declare function open(source: ImageSource, options?: OpenOptions): Promise<Image>
