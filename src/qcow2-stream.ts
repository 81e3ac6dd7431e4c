/** New images as streams: for uploads, pipes, and whatever else is written once and front to back. */

import type { Readable } from 'node:stream'
import { toReadAccess } from './access.js'
import { openChain } from './backing/chain.js'
import { emit } from './emission.js'
import { invalidArgument, Qcow2Error } from './errors.js'
import { creationOf, DEFAULT_FORMAT, PLAIN_FORMAT, STREAMED_FORMATS, type StreamedFormat } from './formats/table.js'
import type { Image } from './image.js'
import type { NativePlannedStream } from './native.js'
import {
  bytes,
  LONG_RUNNING,
  type LongRunning,
  oneOf,
  type Progress,
  type Read,
  readOptions,
  throwIfAborted,
} from './options.js'
import { forgetting } from './secret.js'
import { type Compression, compression, type ReadShape, type Shapes, shape, type Target, toTarget } from './shape.js'
import { type ImageSource, type Located, release, toSources } from './source.js'
import {
  checkFormats,
  fromAdvice,
  readFormats,
  SOURCE,
  type SourceFormat,
  type SourceOptions,
} from './source-options.js'
import { runJob } from './support/jobs.js'
import { type ImageOwner, ownerOf } from './support/owner.js'
import { onAbort } from './support/signals.js'
import { type Size, safe, toSize } from './units.js'

/** Options of {@link createQcow2Stream}. */
export interface Qcow2StreamOptions extends Omit<SourceOptions, 'from'>, LongRunning {
  /** Format of the source, or one for each of several: as {@link ConvertOptions.from}. Not for an open image. */
  from?: SourceFormat | readonly (SourceFormat | undefined)[] | undefined
  /**
   * Format of the stream. Default `'qcow2'`. `'raw'` is the disk, zeroes and all; `'vpc'` a fixed VHD, which is that and a footer; `'vmdk'`
   * a streamOptimized image, which is always compressed.
   */
  to?: StreamedFormat | undefined
  /**
   * Compress every cluster that shrinks, and leave out what is zero; qcow2 and vmdk only. The tables in front of the data need the length of
   * each cluster, so that everything is read and compressed twice: once before the promise resolves, to count, and once as it is emitted.
   */
  compress?: boolean | Compression | undefined
  /** Shape of the image, as far as it is one file that has no key and no more room than it needs. */
  create?: Shapes[StreamedFormat] | undefined
  /**
   * First byte of the stream to emit: where an upload was interrupted. The bytes are those that a stream of the same source, with the same
   * options, has from there on. Default 0.
   */
  start?: Size | undefined
}

/** The bytes of an image. */
export type ImageStream = Readable & {
  /** Bytes that it emits: from `start` on. */
  readonly byteLength: number
  /** Bytes of the disk. */
  readonly virtualSize: Size
}

const STREAM = {
  ...LONG_RUNNING,
  ...SOURCE,
  from: readFormats,
  to: oneOf(...STREAMED_FORMATS),
  compress: compression,
  create: shape,
  start: bytes,
} as const

type ReadStream = Read<typeof STREAM>

const OWNER = 'createQcow2Stream'
/** Chunks that are read ahead, unless the caller says otherwise: compressing uses more than one core. */
const AHEAD = 4

/** What is only about files that are opened. */
const OF_FILES = ['from', 'references', 'secret', 'snapshot', 'locking', 'forceShare'] as const

/**
 * The disk of an image, or of several one behind the other, as a stream of a new image, the header first: nothing is written to a file, and
 * how long it is is known before the first byte. Its bytes depend on the disk and its map alone, and are the same in each run, so that what
 * was interrupted goes on at `start`. Without `compress`, only the map of the source decides what is stored, so that nothing is read before it is
 * sent. Memory is bounded by what is read ahead, a few MiB, and by the plan: 16 bytes for each run of the map, 4 for each cluster that is
 * compressed, at most `limits.maxMemory`.
 *
 * The source must not change meanwhile: what is emitted is what is read when its turn comes. Of a disk that is in use, an internal snapshot
 * or {@link Image.clone} has one moment. The stream holds its source open until it has ended or was destroyed; closing an image that it
 * was made of ends it with `ERR_QCOW2_CLOSED`. What fails while it is read is the stream's error.
 *
 * @example
 * ```ts
 * const image = await createQcow2Stream('disk.raw', { from: 'raw', signal })
 * await fetch(url, {
 *   method: 'PUT',
 *   headers: { 'content-length': String(image.byteLength) },
 *   body: Readable.toWeb(image),
 *   duplex: 'half',
 * })
 * ```
 *
 * @throws {@link Qcow2Error} as `open`; `ERR_QCOW2_INVALID_ARGUMENT` for a shape that a stream cannot have, and a `start` behind the end;
 *   `ERR_QCOW2_LIMIT` for a map that takes more than `limits.maxMemory`, and for an image that is too large for its format
 */
export async function createQcow2Stream(
  source: ImageSource | Image | readonly ImageSource[],
  options?: Qcow2StreamOptions,
): Promise<ImageStream> {
  return await forgetting(async () => {
    const owner = typeof source === 'object' && source !== null ? ownerOf(source) : undefined
    const located = owner === undefined ? toSources(source) : []
    const read = readOptions(options, OWNER, STREAM)
    const target = toTargetOf(read)
    return owner === undefined ? streamOfFiles(located, target, read) : streamOfImage(owner, target, read)
  })
}

async function streamOfFiles(located: readonly Located[], target: Target, read: ReadStream): Promise<ImageStream> {
  checkSources(located.length, read)
  throwIfAborted(read.signal)
  const images: number[] = []
  const close = async (): Promise<void> => {
    const ends = await Promise.allSettled(images.splice(0).map(release))
    for (const end of ends) if (end.status === 'rejected') throw end.reason
  }
  try {
    for (const index of located.keys()) images.push(await openSource(located, index, read))
    return await plan(images, target, read, { close, signal: read.signal })
  } catch (error) {
    // The error that led here is the one to report.
    await close().catch(() => {})
    throw error
  }
}

/** Opens one of the sources. */
async function openSource(all: readonly Located[], index: number, read: ReadStream): Promise<number> {
  const { from, references, secret, snapshot, limits, signal } = read
  const [located, format] = [all[index], typeof from === 'string' ? from : from?.[index]]
  if (located === undefined) throw invalidArgument('source', `${OWNER}: there must be a source`)
  const say = (word: SourceFormat): string => fromAdvice(from, index, all.length, word)
  const streams = { signal, judge: () => {}, say }
  const opening = { format, sayRaw: say(PLAIN_FORMAT), streams, references, secret, source: index, snapshot }
  return (await openChain(located, { ...opening, limits, signal, access: toReadAccess(read) })).image
}

function checkSources(count: number, { from, snapshot, references }: ReadStream): void {
  checkFormats(OWNER, from, count)
  if (snapshot !== undefined && count > 1) {
    throw invalidArgument('snapshot', `${OWNER}: snapshot is for one source, not several`)
  }
  if (references === 'layer') {
    const message = `${OWNER}: references: 'layer' would emit what is only in the backing file as zeroes`
    throw invalidArgument('references', message)
  }
}

/** An image that is open stays the caller's: it is kept open until the stream has ended, and ends it when it is closed. */
async function streamOfImage(owner: ImageOwner, target: Target, read: ReadStream): Promise<ImageStream> {
  const given = OF_FILES.find(name => read[name] !== undefined)
  if (given !== undefined) {
    throw invalidArgument(given, `${OWNER}: ${given} is for a source that is opened here: the image is open already`)
  }
  const { signal } = read
  throwIfAborted(signal)
  // Two may end the planning: the caller's signal, and closing the image.
  const ending = new AbortController()
  const forgetSignal = onAbort(signal, () => ending.abort(signal?.reason))
  let stream: ImageStream | undefined
  let isClosing = false
  const forgetClosing = owner.onClose(() => {
    isClosing = true
    ending.abort()
    stream?.destroy(closed())
  })
  return new Promise<ImageStream>((resolve, reject) => {
    const hold = (): Promise<void> =>
      new Promise<void>((freed, failed) => {
        const close = async (): Promise<void> => freed()
        plan([owner.image], target, read, { close, signal: ending.signal }).then(planned => {
          stream = planned
          resolve(planned)
        }, failed)
      })
    const fail = (error: unknown): void => reject(isClosing && !signal?.aborted ? closed() : error)
    // Until the stream has freed what it holds.
    owner
      .read(hold)
      .catch(fail)
      .finally(() => {
        forgetSignal()
        forgetClosing()
      })
  })
}

const closed = (): Qcow2Error => new Qcow2Error('ERR_QCOW2_CLOSED', 'the image was closed before its stream had ended')

/** How a stream begins and ends. */
interface Held {
  /** Gives up what it is made of, when it has ended. */
  close(): Promise<void>
  /** Ends the planning. */
  readonly signal: AbortSignal | undefined
}

/** Plans the stream of open images. */
async function plan(
  images: readonly number[],
  target: Target,
  read: ReadStream,
  { close, signal }: Held,
): Promise<ImageStream> {
  const { concurrency, limits, start = 0 } = read
  const order = { ...target, concurrency, maxMemory: limits?.maxMemory }
  const progress = new StreamProgress(read)
  const counting = { ...progress.counting(), signal }
  const planned = await runJob<NativePlannedStream>('stream', counting, (request, job, addon) =>
    addon.planStream(request, job, images, order),
  )
  const free = async (): Promise<void> => {
    try {
      await release(planned.stream)
    } finally {
      await close()
    }
  }
  try {
    throwIfAborted(signal)
    const end = safe(planned.byteLength, `${OWNER}: byteLength`)
    if (start > end) {
      throw invalidArgument(
        'start',
        `${OWNER}: start (${start}) is behind the end of the stream, which has ${end} bytes`,
      )
    }
    const ahead = planned.sequential ? 0 : (concurrency ?? AHEAD)
    const report = progress.emitting(planned)
    const stream = emit({ stream: planned.stream, start, end, ahead, report, close: free }, read)
    return Object.assign(stream, { virtualSize: toSize(planned.virtualSize) })
  } catch (error) {
    await release(planned.stream)
    throw error
  }
}

/** The progress in bytes of guest data, as jobs have it; what is counted first, and read for that, is the first half. */
class StreamProgress {
  readonly #read: ReadStream
  /** Bytes that were counted. */
  #counted = 0

  constructor(read: ReadStream) {
    this.#read = read
  }

  /** Of the plan, which calls back only where it counts. */
  counting(): LongRunning {
    const { onProgress, progressInterval } = this.#read
    if (onProgress === undefined) return {}
    const first = ({ phase, current, total, steps }: Progress): unknown => {
      if (total === 0) return undefined
      this.#counted = total
      return onProgress({ phase, current, total: 2 * total, steps })
    }
    return { progressInterval, onProgress: first }
  }

  /** Of what is emitted: the part of the disk that it is of the file. */
  emitting({ byteLength, virtualSize }: NativePlannedStream): ((emitted: number) => unknown) | undefined {
    const { onProgress, start = 0 } = this.#read
    if (onProgress === undefined) return undefined
    const length = byteLength - start
    return emitted => {
      const current = length === 0 ? virtualSize : Math.floor((emitted / length) * virtualSize)
      const total = this.#counted + virtualSize
      return onProgress({ phase: 'stream', current: this.#counted + current, total, steps: [] })
    }
  }
}

/** What is made, in the shape of its format that can be written front to back. */
function toTargetOf({ to = DEFAULT_FORMAT, create, compress }: ReadStream): Target {
  if (create?.encrypt !== undefined) {
    const message = `${OWNER}: a stream is the same in each run, and a key is not: convert to a file to encrypt`
    throw invalidArgument('encrypt', message)
  }
  if (create?.backingFile !== undefined) {
    throw invalidArgument('backingFile', `${OWNER}: a stream holds the whole disk: it has no backing file`)
  }
  const { streamed } = creationOf(to)
  const free = create?.subformat === undefined && create?.preset === undefined
  const shape: ReadShape = typeof streamed === 'string' && free ? { ...create, subformat: streamed } : { ...create }
  return toTarget(OWNER, to, shape, compress)
}
