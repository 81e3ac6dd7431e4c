/** The handle of an open image. */

import type { Readable, Writable } from 'node:stream'
import type { ReadableStream } from 'node:stream/web'
import type { InspectOptions } from 'node:util'
import type { Chain } from './backing/chain.js'
import { Bitmaps } from './bitmap.js'
import { type CheckResult, checkImage, readCheckOptions } from './check.js'
import { type CloneOptions, type CloneResult, Clones, readCloneOptions } from './clone.js'
import { COMPACT, type CompactOptions, type CompactResult, compactImage } from './compaction.js'
import { AbortError, invalidArgument, Qcow2Error } from './errors.js'
import { type AnyImageInfo, type ImageInfo, infoIn, layersInfo } from './info.js'
import { Keys } from './keys.js'
import { entryIn, type MapEntry, type MapOptions, type ReadMapOptions, readMapOptions, walkMap } from './map.js'
import { native } from './native.js'
import type { NbdSource } from './nbd-source.js'
import { ABORTABLE, type Abortable, flag, type LongRunning, readOptions, throwIfAborted } from './options.js'
import { type OverlayOptions, putOverlay, readOverlayOptions } from './overlay.js'
import type { RandomAccessSource } from './random-access.js'
import { fill, fillAll, READ, type ReadOptions, type ReadResult, type ReadvResult } from './read.js'
import { resizeDisk, TRUNCATE, type TruncateOptions } from './resize.js'
import { forgetting } from './secret.js'
import { Snapshots } from './snapshot/snapshots.js'
import { closing, type PathLike, release } from './source.js'
import {
  type Guest,
  openReadStream,
  openWebStream,
  type ReadStreamOptions,
  type SparseReadable,
  type WebStreamOptions,
} from './stream.js'
import { toBytesView } from './support/buffers.js'
import { INSPECT, type Inspect, inspectAs, staysHere } from './support/handle.js'
import { Lifetime } from './support/lifetime.js'
import { type ImageOwner, setOwner } from './support/owner.js'
import { request } from './support/requests.js'
import { shownText } from './text.js'
import { checkPlaces, checkTransfer, toTransfer, toViews } from './transfers.js'
import { type BigIntResults, type Size, safe, sizesIn, toBytes, toSize } from './units.js'
import {
  checkWrite,
  giveUp,
  openWriteStream,
  put,
  putAll,
  putZeroes,
  toRange,
  WRITE,
  WRITE_ZEROES,
  WRITEV,
  type WriteOptions,
  type WriteResult,
  type WriteStreamOptions,
  type WritevOptions,
  type WritevResult,
  type WriteZeroesOptions,
} from './write.js'

/** Closes what was never closed, and says so, as Node does for a `FileHandle`. */
const unclosed = new FinalizationRegistry<Chain>(({ image, path }) => {
  const name = path === undefined ? 'an image' : `image '${shownText(path)}'`
  const message = `Closing ${name} on garbage collection: call close(), or declare it with "await using"`
  process.emitWarning(message, { code: 'QCOW2_UNCLOSED' })
  // Flushed as by close(); a failure has nobody to hear of it but the process.
  release(image).catch((error: unknown) => process.emitWarning(error instanceof Error ? error : String(error)))
})

const INFO = { ...ABORTABLE, bigint: flag } as const

const STAYS = staysHere('an open image')

let stopsAtExit = false

/** What was written stays when the process exits with the image open, as it would with a file. */
function stopAtExit(): void {
  if (stopsAtExit) return
  stopsAtExit = true
  process.once('exit', () => native.stop())
}

/**
 * An open image. All methods can be called at any time and concurrently; requests keep no cursor. The handle must be closed: with
 * `close()`, or by `await using`.
 */
export class Image implements AsyncDisposable {
  #chain: Chain
  /** Overlays are put on top one after the other. */
  #overlays: Promise<unknown> = Promise.resolve()
  readonly #lifetime: Lifetime
  /** What goes on until the image closes, and has to be told. */
  readonly #ends = new Set<() => void>()
  readonly #clones: Clones
  #size: number

  /** @internal Images are made by `open` and `create`. */
  constructor(chain: Chain) {
    if (typeof chain !== 'object' || chain === null || !('image' in chain)) {
      throw invalidArgument('Image', 'an Image is made by open() or create(), not by its constructor')
    }
    this.#chain = chain
    this.#size = chain.virtualSize
    const now = (): Chain => this.#chain
    this.#lifetime = new Lifetime(
      () => nameOf(now().path),
      () => {
        unclosed.unregister(this)
        return release(chain.image)
      },
    )
    unclosed.register(this, chain, this)
    this.#clones = new Clones({ image: chain.image, path: () => now().path, identities: () => now().identities })
    if (chain.writable) stopAtExit()
    const owner: ImageOwner = {
      image: chain.image,
      shown: () => this.#shown(),
      read: work => this.#lifetime.run(work),
      change: (what, signal, work) => this.#change(what, signal, work),
      onClose: end => {
        this.#ends.add(end)
        return () => this.#ends.delete(end)
      },
    }
    setOwner(this, owner)
    const top = async () => (await layersInfo(chain.image))[0]
    this.snapshots = new Snapshots({
      ...owner,
      infos: async () => (await top())?.snapshots ?? [],
      resized: virtualSize => {
        this.#size = virtualSize
      },
    })
    this.bitmaps = new Bitmaps({ ...owner, infos: async () => (await top())?.formatSpecific?.bitmaps ?? [] })
    this.keys = new Keys({ ...owner, top })
  }

  /** @internal */
  readonly threadBound = STAYS

  /** The internal snapshots. */
  readonly snapshots: Snapshots
  /** The persistent bitmaps. */
  readonly bitmaps: Bitmaps
  /** The key slots of the top layer, where that is encrypted with LUKS. */
  readonly keys: Keys

  /**
   * Size of the disk in bytes.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_LIMIT` for a disk beyond 2^53 - 1 bytes: `virtualSizeBigInt` has it
   */
  get virtualSize(): number {
    return safe(this.#size, 'virtualSize')
  }

  /** Size of the disk in bytes, however large it is. */
  get virtualSizeBigInt(): bigint {
    return BigInt(this.#size)
  }

  /** Bytes per cluster of the top layer: what it allocates at a time. 65536 for raw, which has no clusters. */
  get clusterSize(): number {
    return this.#chain.clusterSize ?? 65536
  }

  /** Layers of the backing chain, the top included. */
  get depth(): number {
    return this.#chain.depth
  }

  /** Whether writing is refused: the image was not opened with `flags: 'r+'`. */
  get readOnly(): boolean {
    return !this.#chain.writable
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
   *
   * @example
   * ```js
   * const { bytesRead, buffer } = await image.read(Buffer.alloc(4096), { position: 2 ** 20 })
   * ```
   */
  async read<T extends NodeJS.ArrayBufferView>(buffer: T, options: ReadOptions): Promise<ReadResult<T>> {
    const view = toBytesView(buffer, 'Image.read: buffer')
    const given: ReadOptions | undefined = checkTransfer(options, 'Image.read', READ)
    const signal = given?.signal
    const { offset, length, position } = toTransfer('Image.read', view, given)
    throwIfAborted(signal)
    this.#lifetime.enter()
    try {
      const bytesRead = await fill(this.#chain.image, this.#size, view, offset, length, position, signal)
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
  ): Promise<ReadvResult<T>> {
    const views = toViews(buffers, 'Image.readv')
    const start = toBytes(position, 'Image.readv: position')
    checkPlaces('Image.readv', views, start)
    const { signal } = readOptions(options, 'Image.readv', ABORTABLE)
    throwIfAborted(signal)
    const bytesRead = await this.#lifetime.run(() => fillAll(this.#chain.image, this.#size, views, start, signal))
    if (signal?.aborted) throw new AbortError(signal.reason)
    return { bytesRead, buffers }
  }

  /**
   * Writes the buffer to the guest bytes at `position`, all of it: a range that reaches beyond the end of the disk is refused.
   * Durable after the next `datasync`. The buffer must not be touched or transferred until the promise settles, whatever the
   * signal does. Writes that overlap and are under way together end up in some order.
   *
   * @throws {@link Qcow2Error} before anything changes: `ERR_QCOW2_READ_ONLY`, `ERR_QCOW2_CLOSED`, `ERR_QCOW2_INVALID_ARGUMENT`,
   *   `ERR_QCOW2_UNSUPPORTED_FEATURE`. Else `ERR_QCOW2_CORRUPT`, `ERR_QCOW2_LIMIT`, or the system's code (`ENOSPC`, `EIO`): the guest bytes are then
   *   the old ones or the new ones, and after an error of the tables the image refuses writes until it is opened again
   *
   * @example
   * ```js
   * await image.write(Buffer.from('boot'), { position: 510 })
   * await image.datasync() // it survives a power cut from here on
   * ```
   */
  async write<T extends NodeJS.ArrayBufferView>(buffer: T, options: WriteOptions): Promise<WriteResult<T>> {
    const view = toBytesView(buffer, 'Image.write: buffer')
    const given: WriteOptions | undefined = checkTransfer(options, 'Image.write', WRITE)
    const { signal, compressed = false } = given ?? {}
    const { offset, length, position } = toTransfer('Image.write', view, given)
    throwIfAborted(signal)
    this.#enterToWrite('Image.write')
    try {
      checkWrite('Image.write', this.#chain, this.#size, position, length, compressed)
      await put(this.#chain.image, view, offset, length, position, compressed, signal)
      return { bytesWritten: length, buffer }
    } finally {
      this.#lifetime.leave()
    }
  }

  /** Writes several buffers, one behind the other; otherwise as {@link Image.write}. */
  async writev<const T extends readonly NodeJS.ArrayBufferView[]>(
    buffers: T,
    position: Size,
    options?: WritevOptions,
  ): Promise<WritevResult<T>> {
    const views = toViews(buffers, 'Image.writev')
    const start = toBytes(position, 'Image.writev: position')
    checkPlaces('Image.writev', views, start)
    const { signal, compressed = false } = readOptions(options, 'Image.writev', WRITEV)
    throwIfAborted(signal)
    const length = views.reduce((sum, view) => sum + view.length, 0)
    this.#enterToWrite('Image.writev')
    try {
      checkWrite('Image.writev', this.#chain, this.#size, start, length, compressed)
      await putAll(this.#chain.image, views, length, start, compressed, signal)
      return { bytesWritten: length, buffers }
    } finally {
      this.#lifetime.leave()
    }
  }

  /**
   * Makes guest bytes read as zeroes, as far as possible without writing them.
   *
   * @throws {@link Qcow2Error} as {@link Image.write}
   *
   * @example
   * ```js
   * await image.writeZeroes(2 ** 20, 2 ** 20, { unmap: true }) // may free the space
   * ```
   */
  async writeZeroes(position: Size, length: Size, options?: WriteZeroesOptions): Promise<void> {
    const { unmap = false, signal } = readOptions(options, 'Image.writeZeroes', WRITE_ZEROES)
    await this.#change('Image.writeZeroes', signal, () => {
      const range = toRange('Image.writeZeroes', position, length, this.#size)
      return putZeroes(this.#chain.image, range, unmap, signal)
    })
  }

  /**
   * Gives up the contents of guest bytes. With `discard: 'unmap'`, whole clusters read as zeroes afterwards and their space is
   * free; parts of clusters stay as they are. With `discard: 'ignore'`, the default of `open`, nothing happens; nor does it
   * to a luks image, whose free space would tell what is in use.
   *
   * @throws {@link Qcow2Error} as {@link Image.write}
   */
  async discard(position: Size, length: Size, options?: Abortable): Promise<void> {
    const { signal } = readOptions(options, 'Image.discard', ABORTABLE)
    await this.#change('Image.discard', signal, () => {
      const range = toRange('Image.discard', position, length, this.#size)
      return giveUp(this.#chain.image, range, signal)
    })
  }

  /**
   * Makes durable everything whose promise was fulfilled before the call. Does nothing for an image that is open for reading.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_CLOSED`; the system's code if the disk fails: the image then refuses writes
   */
  async datasync(): Promise<void> {
    await this.#lifetime.run(() => request<void>((number, addon) => addon.flush(number, this.#chain.image)))
  }

  /** As {@link Image.datasync}: an image has no metadata beside what its disk needs. */
  sync(): Promise<void> {
    return this.datasync()
  }

  /**
   * Gives the disk `size` bytes, a multiple of 512. Durable when it is done; a crash meanwhile leaves the old size or the new one. A
   * new part reads as zeroes: of a luks image they are written, and a crash meanwhile leaves a size between. What lies behind a smaller size is lost, so that needs `shrink: true`. Snapshots keep their size.
   *
   * @throws {@link Qcow2Error} as {@link Image.write}; with nothing changed `ERR_QCOW2_DATA_LOSS` for a smaller size without `shrink`,
   *   `ERR_QCOW2_LIMIT`, `ERR_QCOW2_UNSUPPORTED_FEATURE` (version 2 with snapshots; 0 bytes with bitmaps), `ERR_QCOW2_CORRUPT` (an inconsistent bitmap)
   *
   * @example
   * ```js
   * await image.truncate(40 * 2 ** 30)
   * await image.truncate(20 * 2 ** 30, { shrink: true })
   * ```
   */
  async truncate(size: Size, options?: TruncateOptions): Promise<void> {
    const wanted = toBytes(size, 'Image.truncate: size')
    const how = readOptions(options, 'Image.truncate', TRUNCATE)
    await this.#change('Image.truncate', how.signal, async () => {
      this.#size = await resizeDisk(this.#chain.image, wanted, how)
    })
  }

  /** As {@link Image.truncate}. */
  resize(size: Size, options?: TruncateOptions): Promise<void> {
    return this.truncate(size, options)
  }

  /** Runs a change of the image that has no buffer. */
  async #change<T>(owner: string, signal: AbortSignal | undefined, work: () => Promise<T>): Promise<T> {
    throwIfAborted(signal)
    this.#enterToWrite(owner)
    try {
      return await work()
    } finally {
      this.#lifetime.leave()
    }
  }

  /** Begins a request that writes. */
  #enterToWrite(owner: string): void {
    this.#lifetime.enter()
    if (this.#chain.writable) return
    this.#lifetime.leave()
    const { path } = this.#chain
    const what = nameOf(path)
    throw new Qcow2Error(
      'ERR_QCOW2_READ_ONLY',
      `${owner}: ${what} is open for reading only: open it with flags: 'r+'`,
      {
        path,
      },
    )
  }

  /**
   * Describes the top layer, in the terms of QAPI's `ImageInfo`.
   *
   * @example
   * ```js
   * const { format, virtualSize, actualSize, snapshots } = await image.info()
   * ```
   */
  info(options: Abortable & { bigint: true }): Promise<ImageInfo<bigint>>
  info(options?: Abortable & BigIntResults): Promise<ImageInfo>
  async info(options?: Abortable & BigIntResults): Promise<AnyImageInfo> {
    const [top] = await this.#describe(options)
    if (top === undefined) throw invalidArgument('image', 'an image has at least one layer')
    return top
  }

  /** Describes every layer of the backing chain that is open, the top first. */
  chain(options: Abortable & { bigint: true }): Promise<ImageInfo<bigint>[]>
  chain(options?: Abortable & BigIntResults): Promise<ImageInfo[]>
  async chain(options?: Abortable & BigIntResults): Promise<AnyImageInfo[]> {
    return this.#describe(options)
  }

  async #describe(options: (Abortable & BigIntResults) | undefined): Promise<AnyImageInfo[]> {
    const { signal, bigint } = readOptions(options, 'Image.info', INFO)
    throwIfAborted(signal)
    const layers = await this.#lifetime.run(() => layersInfo(this.#chain.image))
    throwIfAborted(signal)
    return layers.map(layer => infoIn(layer, bigint))
  }

  /**
   * Iterates over what the disk is made of: runs of one kind in order and without gaps, neighbours merged. A `start` beyond
   * the end of the disk gives nothing.
   *
   * @example
   * ```js
   * let allocated = 0
   * for await (const { length, data } of image.map()) if (data) allocated += length
   * ```
   */
  map(options: MapOptions & { bigint: true }): AsyncGenerator<MapEntry<bigint>, void, undefined>
  map(options?: MapOptions & BigIntResults): AsyncGenerator<MapEntry, void, undefined>
  async *map(options?: MapOptions & BigIntResults): AsyncGenerator<MapEntry | MapEntry<bigint>, void, undefined> {
    const read = readMapOptions(options)
    throwIfAborted(read.signal)
    for await (const entry of this.#walk(read)) yield entryIn(entry, read.bigint)
  }

  #walk(options: ReadMapOptions): AsyncGenerator<MapEntry, void, undefined> {
    return walkMap(this.#chain.image, this.#size, options, work => this.#lifetime.run(work))
  }

  /** The disk as its streams know it. */
  #guest(): Guest {
    return {
      virtualSize: this.#size,
      read: (buffer, { position, signal }) => this.read(buffer, { position: toSize(position), signal }),
      map: range => this.#walk({ ...range, depth: 'all', bigint: undefined, signal: undefined }),
    }
  }

  /**
   * Copies the disk as it is at one moment, while reads and writes go on: see `onPointInTime`. The copy is whole (what backing files
   * have is in it), has its name only when it is complete, and is durable then. Internal snapshots and bitmaps are not in it. A write
   * to a part that is not yet copied waits until that part is: 64 KiB or a cluster of the copy, more for a disk above 16 TiB. A failure of
   * the copy never fails a write. Closing the image ends it.
   *
   * @throws {@link Qcow2Error} as `create`; `ERR_QCOW2_INVALID_ARGUMENT` for a target that is a file of this image; `ERR_QCOW2_CLOSED` if the
   *   image is closed first; the system's code (`ENOSPC`, `EIO`)
   *
   * @example
   * ```js
   * await image.clone('backup.qcow2', { to: 'qcow2', compress: true })
   * ```
   */
  clone(
    target: PathLike | NbdSource | RandomAccessSource,
    options: CloneOptions & { bigint: true },
  ): Promise<CloneResult<bigint>>
  clone(target: PathLike | NbdSource | RandomAccessSource, options: CloneOptions & BigIntResults): Promise<CloneResult>
  async clone(
    target: PathLike | NbdSource | RandomAccessSource,
    options: CloneOptions & BigIntResults,
  ): Promise<CloneResult<number | bigint>> {
    return await forgetting(async () => {
      const { target: place, options: read } = readCloneOptions(target, options)
      throwIfAborted(read.signal)
      // What cannot be said in the end is refused before anything is done.
      sizesIn(read.bigint)(this.#size, 'Image.clone: virtualSize')
      return this.#lifetime.run(() => this.#clones.make(place, read))
    })
  }

  /**
   * Puts an overlay under the running guest: an external snapshot. A new qcow2 image is made whose backing file is the image as it is at
   * that moment, complete and durable, and this handle goes on with the overlay on top. The file that was the top is only read from then on,
   * and others may read it, too. Requests go on; those under way are done first, and later ones wait a moment. Internal snapshots and
   * bitmaps stay in the file that has them. An error leaves the image as it was, without an overlay.
   *
   * @throws {@link Qcow2Error} as `create`; `ERR_QCOW2_READ_ONLY`; `ERR_QCOW2_INVALID_ARGUMENT` for a `backingFile` that is not the image
   *
   * @example
   * ```js
   * // From now on writes go to today.qcow2; what was the image stands still.
   * await image.createOverlay('today.qcow2')
   * ```
   */
  async createOverlay(path: PathLike, options?: OverlayOptions): Promise<void> {
    await forgetting(async () => {
      const read = readOverlayOptions(path, options)
      await this.#change('Image.createOverlay', read.signal, () => {
        const put = this.#overlays.then(async () => {
          this.#chain = await putOverlay(this.#chain, read)
        })
        this.#overlays = put.catch(() => undefined)
        return put
      })
    })
  }

  /**
   * Checks the metadata of the top layer against itself, without changing it; see {@link check}, which also takes images
   * that are too damaged to be opened here.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_UNSUPPORTED_FEATURE` for a raw image
   */
  async check(options?: LongRunning): Promise<CheckResult> {
    const read = readCheckOptions(options)
    throwIfAborted(read.signal)
    return this.#lifetime.run(() => checkImage(this.#chain, read))
  }

  /**
   * Gives back to the file system what the top layer does not need; see {@link CompactOptions}. What the disk and its snapshots read
   * as stays, whatever interrupts it. Writes wait meanwhile, reads go on. An abort leaves a sound image, compacted in part.
   *
   * @throws {@link Qcow2Error} with nothing changed: `ERR_QCOW2_CORRUPT` for an image that must be repaired first,
   *   `ERR_QCOW2_UNSUPPORTED_FEATURE` for a raw image, `ERR_QCOW2_LIMIT`, `ERR_QCOW2_READ_ONLY`. Else as {@link Image.write}
   *
   * @example
   * ```js
   * const { reclaimedBytes } = await image.compact()
   * ```
   */
  async compact(options?: CompactOptions): Promise<CompactResult> {
    const read = readOptions(options, 'Image.compact', COMPACT)
    throwIfAborted(read.signal)
    const work = () => compactImage(this.#chain.image, read)
    return read.dryRun ? this.#lifetime.run(work) : this.#change('Image.compact', undefined, work)
  }

  /**
   * A stream of guest bytes; with `sparse`, of objects `{ position, buffer }` for what does not read as zeroes. The image stays
   * open when the stream ends.
   *
   * @example
   * ```js
   * for await (const { position, buffer } of image.createReadStream({ sparse: true })) {
   *   console.log(`${buffer.length} bytes at ${position}`)
   * }
   * ```
   */
  createReadStream(options: ReadStreamOptions & { sparse: true }): SparseReadable
  createReadStream(options?: ReadStreamOptions): Readable
  createReadStream(options?: ReadStreamOptions): Readable {
    return openReadStream(this.#guest(), options)
  }

  /** A web stream of guest bytes. The image stays open when the stream ends. */
  readableWebStream(options?: WebStreamOptions): ReadableStream<Uint8Array> {
    return openWebStream(this.#guest(), options)
  }

  /**
   * A stream that writes guest bytes one behind the other. The image stays open when the stream ends; what was written is durable
   * after the next `datasync`, or with `flush`.
   *
   * @example
   * ```js
   * import { createReadStream } from 'node:fs'
   * import { pipeline } from 'node:stream/promises'
   *
   * await pipeline(createReadStream('b.raw'), image.createWriteStream({ start: 2 ** 20, flush: true }))
   * ```
   */
  createWriteStream(options?: WriteStreamOptions): Writable {
    return openWriteStream(this, options)
  }

  #shown(): Readonly<Record<string, unknown>> {
    const { path, format, depth, writable } = this.#chain
    return {
      path: path === undefined ? undefined : shownText(path),
      format,
      virtualSize: Number.isSafeInteger(this.#size) ? this.#size : this.virtualSizeBigInt,
      clusterSize: this.clusterSize,
      depth,
      readOnly: !writable,
      state: this.#lifetime.state,
    }
  }

  /** @internal */
  [INSPECT](depth: number, options: InspectOptions, inspect: Inspect): string {
    return inspectAs('Image', this.#shown(), depth, options, inspect)
  }

  /**
   * Closes the image: running requests finish, new ones reject with `ERR_QCOW2_CLOSED`. What was written is made durable, what was
   * reserved for more writes is given back, the locks are released. Clones and NBD servers of the image end first. Every call resolves when the files are closed.
   *
   * @throws {@link Qcow2Error} the system's code if something could not be made durable; the files are closed all the same
   */
  close(): Promise<void> {
    this.#clones.end()
    for (const end of this.#ends) end()
    closing(this.#chain.image)
    return this.#lifetime.close()
  }

  /** As {@link Image.close}, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }
}

const nameOf = (path: string | undefined): string => (path === undefined ? 'the image' : `the image '${path}'`)
