/** The handle of an open image. */

import type { Readable } from 'node:stream'
import type { ReadableStream } from 'node:stream/web'
import { type Chain, openChain } from './backing/chain.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { type CheckResult, checkImage, readCheckOptions } from './check.js'
import { AbortError, invalidArgument } from './errors.js'
import { type ImageInfo, layersInfo } from './info.js'
import { type MapEntry, type MapOptions, readMapOptions, walkMap } from './map.js'
import {
  ABORTABLE,
  type Abortable,
  bytes,
  type Limits,
  type LongRunning,
  limits,
  oneOf,
  readOptions,
  text,
  throwIfAborted,
} from './options.js'
import { type Format, type ImageSource, release, toLocated } from './source.js'
import { openReadStream, openWebStream, type ReadStreamOptions, type WebStreamOptions } from './stream.js'
import { toBytesView } from './support/buffers.js'
import { Lifetime } from './support/lifetime.js'
import { submitRead, toError } from './support/requests.js'
import { describe, type Size, toBytes } from './units.js'

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
  /** Most bytes of L2 tables kept in memory, for each layer. Default: enough for the whole image, 32 MiB at most. */
  l2CacheSize?: Size | undefined
  limits?: Limits | undefined
}

const OPEN = {
  ...ABORTABLE,
  flags: oneOf('r'),
  format: oneOf('qcow2', 'raw'),
  references: referencePolicy,
  snapshot: text,
  l2CacheSize: bytes,
  limits,
} as const

/** Options of {@link Image.read}. */
export interface ReadOptions extends Abortable {
  /** Guest offset in bytes. */
  position: Size
  /** Where in the buffer to begin, in bytes. Default 0. */
  offset?: number | undefined
  /** How many bytes. Default: the rest of the buffer. */
  length?: number | undefined
}

const READ = { ...ABORTABLE, position: bytes, offset: bytes, length: bytes } as const

/** Closes what was never closed, and says so, as Node does for a `FileHandle`. */
const unclosed = new FinalizationRegistry<Chain>(({ image, path }) => {
  const name = path === undefined ? 'an image' : `image '${path}'`
  const message = `Closing ${name} on garbage collection: call close(), or declare it with "await using"`
  process.emitWarning(message, { code: 'QCOW2_UNCLOSED' })
  void release(image)
})

/**
 * An open image. All methods can be called at any time and concurrently; requests keep no cursor. The handle must be closed: with
 * `close()`, or by `await using`.
 */
export class Image implements AsyncDisposable {
  readonly #chain: Chain
  readonly #lifetime: Lifetime

  /** @internal Images are made by `open` and `create`. */
  constructor(chain: Chain) {
    if (typeof chain !== 'object' || chain === null || !('image' in chain)) {
      throw invalidArgument('Image', 'an Image is made by open() or create(), not by its constructor')
    }
    this.#chain = chain
    const what = chain.path === undefined ? 'the image' : `the image '${chain.path}'`
    this.#lifetime = new Lifetime(what, () => {
      unclosed.unregister(this)
      return release(chain.image)
    })
    unclosed.register(this, chain, this)
  }

  /** Size of the disk in bytes. */
  get virtualSize(): number {
    return this.#chain.virtualSize
  }

  /** Bytes per cluster of the top layer: what it allocates at a time. 65536 for raw, which has no clusters. */
  get clusterSize(): number {
    return this.#chain.clusterSize ?? 65536
  }

  /** Layers of the backing chain, the top included. */
  get depth(): number {
    return this.#chain.depth
  }

  /** Whether writing is refused: always, in this version. */
  get readOnly(): boolean {
    return true
  }

  /** Whether `close` was called: new requests are refused. */
  get closed(): boolean {
    return this.#lifetime.closed
  }

  /**
   * Reads guest bytes into the buffer. Reads less than asked only at the end of the disk, nothing beyond it. The
   * buffer must not be touched or transferred until the promise settles, whatever the signal does.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_CLOSED`; `ERR_QCOW2_INVALID_ARGUMENT` for a detached or resizable buffer or a range
   *   outside it; `ERR_QCOW2_CORRUPT` for damaged tables or compressed data; the system's code for an I/O error
   */
  async read<T extends NodeJS.ArrayBufferView>(
    buffer: T,
    options: ReadOptions,
  ): Promise<{ bytesRead: number; buffer: T }> {
    const view = toBytesView(buffer, 'Image.read: buffer')
    const given: ReadOptions | undefined = checkReadOptions(options)
    const signal = given?.signal
    const offset = given?.offset === undefined ? 0 : toBytes(given.offset, 'Image.read: offset')
    const length = given?.length === undefined ? view.length - offset : toBytes(given.length, 'Image.read: length')
    if (offset > view.length || length < 0 || offset + length > view.length) {
      const message = `Image.read: ${length} bytes from offset ${offset} are not inside the buffer of ${view.length} bytes`
      throw invalidArgument(offset > view.length ? 'Image.read: offset' : 'Image.read: length', message)
    }
    const position = toBytes(given?.position, 'Image.read: position')
    throwIfAborted(signal)
    this.#lifetime.enter()
    try {
      const bytesRead = await this.#fill(view, offset, length, position)
      if (signal?.aborted) throw new AbortError(signal.reason)
      return { bytesRead, buffer }
    } finally {
      this.#lifetime.leave()
    }
  }

  /** Reads guest bytes into several buffers, one behind the other; otherwise as {@link Image.read}. */
  async readv<const T extends readonly NodeJS.ArrayBufferView[]>(
    buffers: T,
    position: Size,
    options?: Abortable,
  ): Promise<{ bytesRead: number; buffers: T }> {
    if (!Array.isArray(buffers)) {
      throw invalidArgument('buffers', `Image.readv: buffers must be an array, not ${describe(buffers)}`)
    }
    const views = buffers.map((buffer, index) => toBytesView(buffer, `Image.readv: buffers[${index}]`))
    const start = toBytes(position, 'Image.readv: position')
    const { signal } = readOptions(options, 'Image.readv', ABORTABLE)
    throwIfAborted(signal)
    const bytesRead = await this.#lifetime.run(async () => {
      let at = start
      const reads = views.map(view => {
        const from = at
        at += view.length
        return this.#fill(view, 0, view.length, from)
      })
      // Every buffer is in use until its own read is done, so all are waited for.
      const ends = await Promise.allSettled(reads)
      return ends.reduce((sum, end) => {
        if (end.status === 'rejected') throw end.reason
        return sum + end.value
      }, 0)
    })
    if (signal?.aborted) throw new AbortError(signal.reason)
    return { bytesRead, buffers }
  }

  /** Reads a range that is inside the view, clamped to the disk. */
  async #fill(view: Uint8Array, offset: number, length: number, position: number): Promise<number> {
    const { image, virtualSize } = this.#chain
    const count = Math.min(length, virtualSize - position)
    if (count <= 0) return 0
    try {
      await submitRead(image, view, offset, count, position)
    } catch (failure) {
      throw toError(failure)
    }
    return count
  }

  /** Describes the top layer, in the terms of QAPI's `ImageInfo`. */
  async info(options?: Abortable): Promise<ImageInfo> {
    const [top] = await this.chain(options)
    if (top === undefined) throw invalidArgument('image', 'an image has at least one layer')
    return top
  }

  /** Describes every layer of the backing chain that is open, the top first. */
  async chain(options?: Abortable): Promise<ImageInfo[]> {
    const { signal } = readOptions(options, 'Image.info', ABORTABLE)
    throwIfAborted(signal)
    const layers = await this.#lifetime.run(() => layersInfo(this.#chain.image))
    throwIfAborted(signal)
    return layers
  }

  /**
   * Iterates over what the disk is made of: runs of one kind in order and without gaps, neighbours merged. A `start` beyond
   * the end of the disk gives nothing.
   */
  async *map(options?: MapOptions): AsyncGenerator<MapEntry, void, undefined> {
    const read = readMapOptions(options)
    throwIfAborted(read.signal)
    const { image, virtualSize } = this.#chain
    yield* walkMap(image, virtualSize, read, work => this.#lifetime.run(work))
  }

  /**
   * Checks the metadata of the top layer against itself, without changing it; see {@link check}, which also takes images
   * that are too damaged to be opened here.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_UNSUPPORTED_FEATURE` for a raw image
   */
  async check(options?: LongRunning): Promise<CheckResult> {
    const read = readCheckOptions(options)
    const { image, path } = this.#chain
    throwIfAborted(read.signal)
    return this.#lifetime.run(() => checkImage(image, path, 'qcow2', read))
  }

  /**
   * A stream of guest bytes; with `sparse`, of objects `{ position, buffer }` for what does not read as zeroes. The image stays
   * open when the stream ends.
   */
  createReadStream(options?: ReadStreamOptions): Readable {
    return openReadStream(this, options)
  }

  /** A web stream of guest bytes. The image stays open when the stream ends. */
  readableWebStream(options?: WebStreamOptions): ReadableStream<Uint8Array> {
    return openWebStream(this, options)
  }

  /**
   * Closes the image: running requests finish, new ones reject with `ERR_QCOW2_CLOSED`. Every call resolves when the files are
   * closed.
   */
  close(): Promise<void> {
    return this.#lifetime.close()
  }

  /** As {@link Image.close}, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }
}

/** There can be very many reads: the full check runs only where something is out of the ordinary. */
function checkReadOptions(options: ReadOptions | undefined): ReadOptions | undefined {
  if (typeof options === 'object' && options !== null) {
    let known = true
    for (const name in options) {
      if (name !== 'position' && name !== 'offset' && name !== 'length' && name !== 'signal') known = false
    }
    if (known && options.signal === undefined) return options
  }
  readOptions(options, 'Image.read', READ)
  return options
}

/**
 * Opens an image for reading. It is refused if it names a backing file or data file, unless `references` says what to do about it.
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_FORMAT_UNKNOWN`, `ERR_QCOW2_INVALID_HEADER`, `ERR_QCOW2_UNSUPPORTED_FEATURE`,
 *   `ERR_QCOW2_CORRUPT`, `ERR_QCOW2_LIMIT`, `ERR_QCOW2_REFERENCE_DENIED`, `ERR_QCOW2_CHAIN`, `ERR_QCOW2_NO_SNAPSHOT`, or the
 *   system's code (`ENOENT`, `EACCES`)
 */
export async function open(source: ImageSource, options?: OpenOptions): Promise<Image> {
  const located = toLocated(source, 'source')
  const { flags: _, ...read } = readOptions(options, 'open', OPEN)
  if (read.format === 'raw' && read.snapshot !== undefined) {
    throw invalidArgument('snapshot', 'open: a raw image has no snapshots')
  }
  throwIfAborted(read.signal)
  const chain = await openChain(located, read)
  if (read.signal?.aborted) {
    await release(chain.image)
    throw new AbortError(read.signal.reason)
  }
  return new Image(chain)
}
