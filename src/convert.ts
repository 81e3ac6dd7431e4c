/** Converting between formats and shapes. */

import { toReadAccess } from './access.js'
import { type Chain, lookAtChain, openChain } from './backing/chain.js'
import { convertToStream } from './convert-upload.js'
import { invalidArgument } from './errors.js'
import {
  can,
  DEFAULT_FORMAT,
  formatNamed,
  isFormat,
  isPlain,
  PLAIN_FORMAT,
  type StreamFormat,
  type TargetFormat,
} from './formats/table.js'
import type { NativeConverted, NativeConvertJob, NativeFile } from './native.js'
import type { NbdSource } from './nbd-source.js'
import {
  bytes,
  checkNames,
  flag,
  integer,
  LONG_RUNNING,
  type LongRunning,
  type Progress,
  type Read,
  type Reader,
  readOptions,
  throwIfAborted,
} from './options.js'
import type { RandomAccessSource, RandomPlace } from './random-access.js'
import { isSource, nameOf, openTargetFile, refuseNew, type TargetPlace, toPlace } from './remote-target.js'
import { forgetting } from './secret.js'
import {
  type Compression,
  compression,
  type Preallocation,
  type ReadShape,
  SHAPE,
  type Shape,
  shape,
  toTarget,
  withParent,
} from './shape.js'
import {
  type ImageSource,
  type Located,
  openFile,
  type PathLike,
  release,
  targetFormat,
  toLocated,
  toSources,
  toTargetFormat,
} from './source.js'
import {
  checkFormats,
  fromAdvice,
  readFormats,
  SOURCE,
  type SourceFormat,
  type SourceOptions,
} from './source-options.js'
import { isStreamTarget, type StreamTarget } from './stream-target.js'
import { runJob } from './support/jobs.js'
import { encodeText, isText, shownText } from './text.js'
import { type BigIntResults, type Size, sizesIn } from './units.js'

/** Options of {@link convert}. */
export interface ConvertOptions extends Omit<SourceOptions, 'from'>, LongRunning {
  /**
   * Format of the source, or one for each of several. Default, also of one that is undefined: by its magic; raw, which has none, must be said.
   * A compressed file (`'gzip'`, `'xz'`, `'zstd'`) holds a raw disk, which is read front to back, in one pass; where the file does not say
   * how large it is (gzip never does), it is read once before, to count. One with an image of another format in it is refused, unless it is said here
   * how it is compressed: then its bytes are the disk.
   */
  from?: SourceFormat | readonly (SourceFormat | undefined)[] | undefined
  /** Copy from this byte of the disk on. Default 0. */
  start?: Size | undefined
  /** Copy this many bytes. Default: the rest of the disk. The target is whole sectors of 512 bytes, filled up with zeroes. */
  length?: Size | undefined
  /**
   * What cannot be read becomes zeroes, sector by sector; the result says what that was. Also opens an image that ends inside its L1
   * table, or in front of it.
   */
  salvage?: boolean | undefined
  /** Read at most this many bytes a second; 0, the default, for as fast as it goes. */
  rate?: Size | undefined
  /** Format of the target. */
  to: TargetFormat
  /** Compress every cluster that shrinks. qcow2 targets only. */
  compress?: boolean | Compression | undefined
  /** Shape of the target; of a luks target `encrypt`, which it needs. Of that every byte is written, zeroes too. */
  create?: Shape | undefined
  /** The same as `create.preallocation`, and for raw targets too. */
  preallocation?: Preallocation | undefined
  /**
   * Zeroes of at least this many bytes become a hole, where they fill aligned blocks of the largest power of two in it: a multiple of
   * 512, 0 stores everything. With `compress`, clusters of zeroes do, whatever else this says. Default 4096.
   */
  sparseSize?: number | undefined
  /**
   * Write into a target that exists and is large enough, instead of making one. What it has behind the end of the source stays. Of an error
   * or an abort, a part of the source is left in it.
   */
  existingTarget?: boolean | undefined
  /** With `existingTarget`: it reads as zeroes everywhere, so zeroes need not be written. */
  targetIsZero?: boolean | undefined
  /**
   * Replace an existing file. Default false: `EEXIST`. It is whole until the new one is complete and takes its name, owner, permissions
   * and attributes by a rename. Where a rename cannot be right it is written in place, and lost with an error or an abort: a
   * file with several names, a mount point, a folder or attributes that this process may not write, an open file (`/dev/fd/8`), a file
   * system without room for both, an export of an NBD server, which exists in any case.
   */
  overwrite?: boolean | undefined
  /**
   * Return only when the target and its name are on stable storage. Default true; false is faster, and a power cut can take the target,
   * and what it replaced.
   */
  durable?: boolean | undefined
  /**
   * The progress is that of what is copied, as qemu-img counts it, and not that of the whole disk with its holes. To know how much that is,
   * the source's metadata is read once more, before anything is copied. Default false.
   */
  countData?: boolean | undefined
  /**
   * Make an overlay of this image, which the target names as its backing file (`create.backingFile`). Where it is in the source's backing
   * chain, only what lies above it is stored; where it is any other image, all of the source's disk is. Opened as qcow2, by its magic, or
   * as `create.backingFormat` says. With `existingTarget` it must be in the chain: the target is taken to read like the base wherever it
   * has nothing of its own, whatever its backing file is called; the base is not opened.
   */
  base?: ImageSource | undefined
  /**
   * Copy the persistent bitmaps of the source's top layer, with their names, granularities and whether they record; qcow2 to
   * qcow2 of version 3 only, both of them, whether there is any bitmap or not. An inconsistent bitmap, as a crash leaves it, is refused with `ERR_QCOW2_CORRUPT` before
   * anything is written; with `{ skipBroken: true }` it is left out. Default false.
   */
  bitmaps?:
    | boolean
    | {
        /** Leave inconsistent ones out instead of failing. Default false. */
        skipBroken?: boolean | undefined
      }
    | undefined
}

/** What a conversion did. */
export interface ConvertResult<N extends number | bigint = number> {
  /** Size of the disk in bytes. */
  readonly virtualSize: N
  /** Bytes of guest data read from the source, or shared with it by the file system. To a target that takes a stream: bytes of that. */
  readonly bytesRead: N
  /** Bytes of guest data written to the target, as they are stored. To a target that takes a stream: bytes of that. */
  readonly bytesWritten: N
  /** Milliseconds from the call to the end. */
  readonly durationMs: number
  /** With `salvage`: what could not be read, in order, and why. Of very many ranges, the first 4096. */
  readonly unreadable?: readonly {
    /** First guest byte. */
    readonly start: N
    /** Bytes. */
    readonly length: N
    /** Why. */
    readonly message: string
  }[]
  /** With `bitmaps`: names of the inconsistent ones that were left out. */
  readonly skippedBitmaps?: readonly string[]
  /** The bytes of all of them, where one is not UTF-8. */
  readonly skippedBitmapsBytes?: readonly Buffer[]
}

const BITMAPS = { skipBroken: flag } as const

const bitmaps: Reader<'all' | 'consistent' | undefined> = (value, name) => {
  if (typeof value === 'boolean') return value ? 'all' : undefined
  return readOptions(value, name, BITMAPS).skipBroken ? 'consistent' : 'all'
}

/** What cannot be done with a disk that is read front to back. */
const OUT_OF_ORDER = ['base', 'salvage', 'start'] as const satisfies readonly (keyof ConvertOptions)[]

export const CONVERT = {
  ...LONG_RUNNING,
  ...SOURCE,
  from: readFormats,
  start: bytes,
  length: bytes,
  salvage: flag,
  rate: bytes,
  to: targetFormat,
  compress: compression,
  create: shape,
  preallocation: SHAPE.preallocation,
  sparseSize: integer(0, 2 ** 30),
  existingTarget: flag,
  targetIsZero: flag,
  overwrite: flag,
  durable: flag,
  countData: flag,
  base: toLocated,
  bitmaps,
  bigint: flag,
} as const

export type ReadConvert = Read<typeof CONVERT>

/** What the engine is told of a convert, but for the files. */
type Order = Omit<NativeConvertJob, 'inUse'>

/**
 * Copies a disk into a new image; several sources become one disk, one behind the other. The bytes never enter JavaScript; what reads
 * as zeroes is not read. The file has its name only when it is complete: nothing is left of a failure, an abort, or a killed process,
 * except of a file that is written in place (see `overwrite`). An export of an NBD server (`nbdSource`) can be the target, too: it exists, and
 * must be large enough; and so can an object of the caller's with a `write` ({@link RandomAccessSource}), which is as long as the image where it
 * has a `truncate`. What takes a stream ({@link StreamTarget}, `s3Target`) is sent the image as {@link createQcow2Stream} makes it, with the
 * options of that alone.
 *
 * @throws {@link Qcow2Error} as `open` and `create`; `ERR_QCOW2_INVALID_ARGUMENT` for a target that is also a source, or one that exists and
 *   is too small
 *
 * @example
 * ```js
 * import { convert } from 'qcow2'
 *
 * const { bytesWritten } = await convert('disk.raw', 'small.qcow2', {
 *   from: 'raw',
 *   to: 'qcow2',
 *   compress: true,
 *   onProgress: ({ current, total }) => console.log(`${Math.floor((100 * current) / total)} %`),
 * })
 * ```
 */
export function convert(
  source: ImageSource | readonly ImageSource[],
  target: PathLike | NbdSource | RandomAccessSource | StreamTarget,
  options: ConvertOptions & { bigint: true },
): Promise<ConvertResult<bigint>>
export function convert(
  source: ImageSource | readonly ImageSource[],
  target: PathLike | NbdSource | RandomAccessSource | StreamTarget,
  options: ConvertOptions & BigIntResults,
): Promise<ConvertResult>
export async function convert(
  source: ImageSource | readonly ImageSource[],
  target: PathLike | NbdSource | RandomAccessSource | StreamTarget,
  options: ConvertOptions & BigIntResults,
): Promise<ConvertResult<number | bigint>> {
  if (isStreamTarget(target)) {
    checkNames(options, 'convert', CONVERT)
    return convertToStream(source, target, options)
  }
  return await forgetting(() => convertImages(source, target, options))
}

async function convertImages(
  source: ImageSource | readonly ImageSource[],
  target: PathLike | NbdSource | RandomAccessSource,
  options: ConvertOptions & BigIntResults,
): Promise<ConvertResult<number | bigint>> {
  const located = toSources(source)
  const place = toPlace(target)
  const read = readOptions(options, 'convert', CONVERT)
  return await convertLocated(located, place, read, orderOf(place, read, located.length))
}

/** Checks what does not depend on any file. */
export function orderOf(place: TargetPlace, read: ReadConvert, sources: number): Order {
  if (!('path' in place)) refuseNew('convert', place, read)
  return toOrder(read, sources)
}

/** What is known of a source that comes while it is read. */
export interface Coming {
  /** Bytes of the disk in a compressed one, where that is known. */
  readonly diskSize: number | undefined
  /** Called when it is open, in front of the copy. */
  opened(): void
}

/** Converts what was located. */
export async function convertLocated(
  located: readonly Located[],
  place: TargetPlace,
  read: ReadConvert,
  order: Order,
  coming?: Coming,
): Promise<ConvertResult<number | bigint>> {
  throwIfAborted(read.signal)
  const begin = performance.now()
  const remote = 'path' in place ? undefined : place
  const images: number[] = []
  const files: number[] = []
  try {
    const counting = new Counting(read, located.length)
    const chains = await openSources(located, read, images, counting, coming?.diskSize)
    coming?.opened()
    const [first] = chains
    // What cannot be said in the end is refused before anything is done.
    const whole = chains.reduce((sum, { virtualSize }) => sum + virtualSize, 0)
    sizesIn(read.bigint)(read.length ?? whole, 'convert: virtualSize')
    const delta = read.base && first && (await lookAtBase(read.base, first, read))
    const inUse = [...chains.flatMap(chain => chain.identities), ...(delta?.identities ?? [])]
    const onto =
      order.existing && read.to !== undefined && !isPlain(read.to) ? await openTarget(place, inUse, read) : undefined
    if (onto !== undefined) images.push(onto)
    const targetFile =
      onto === undefined && remote !== undefined
        ? await openTargetFile('convert', remote, inUse, read.signal)
        : undefined
    if (targetFile !== undefined) files.push(targetFile)
    const path = 'path' in place ? place.path : nameOf(place)
    const sources = chains.map(chain => chain.image)
    const shape = await withParent('convert', order.shape, delta)
    const converted = await runJob<NativeConverted>('convert', counting.copying(), (request, job, addon) =>
      addon.convertImage(request, job, sources, path, {
        ...order,
        shape,
        ...delta?.order,
        inUse,
        target: onto,
        targetFile,
      }),
    )
    // Closing makes it durable: an error of that is the conversion's.
    if (onto !== undefined) {
      images.pop()
      await release(onto)
    }
    return { ...toResult(converted, read.bigint), durationMs: performance.now() - begin }
  } finally {
    await Promise.all([...images, ...files].map(number => release(number)))
  }
}

function toResult(
  { skippedBitmaps, virtualSize, bytesRead, bytesWritten, unreadable }: NativeConverted,
  big: boolean | undefined,
): Omit<ConvertResult<number | bigint>, 'durationMs'> {
  const size = sizesIn(big)
  const converted = {
    virtualSize: size(virtualSize, 'virtualSize'),
    bytesRead: size(bytesRead, 'bytesRead'),
    bytesWritten: size(bytesWritten, 'bytesWritten'),
    ...(unreadable && {
      unreadable: unreadable.map(({ start, length, message }) => ({
        start: size(start, 'unreadable'),
        length: size(length, 'unreadable'),
        message,
      })),
    }),
  }
  if (skippedBitmaps === undefined) return converted
  const exact = skippedBitmaps.every(isText)
  return {
    ...converted,
    skippedBitmaps: skippedBitmaps.map(shownText),
    ...(!exact && { skippedBitmapsBytes: skippedBitmaps.map(encodeText) }),
  }
}

/** Opens the sources; their images are added to `images` as they are opened. */
async function openSources(
  located: readonly Located[],
  read: ReadConvert,
  images: number[],
  counting: Counting,
  size: number | undefined,
): Promise<Chain[]> {
  const { from, references, secret, snapshot, limits, signal, salvage } = read
  const access = toReadAccess(read)
  const chains: Chain[] = []
  for (const [index, each] of located.entries()) {
    const format = typeof from === 'string' ? from : from?.[index]
    const say = (word: SourceFormat): string => fromAdvice(from, index, located.length, word)
    const streams = { ...counting.source(), size, judge: (stream: StreamFormat) => refuseOutOfOrder(read, stream), say }
    const opening = { format, sayRaw: say(PLAIN_FORMAT), streams, references, secret, source: index, snapshot }
    const chain = await openChain(each, { ...opening, limits, signal, access, salvage })
    images.push(chain.image)
    chains.push(chain)
  }
  return chains
}

/** Refuses what a disk that is read front to back cannot give. */
function refuseOutOfOrder(read: ReadConvert, stream: StreamFormat): void {
  const asked = OUT_OF_ORDER.find(name => read[name] !== undefined && read[name] !== false && read[name] !== 0)
  if (asked === undefined) return
  const message = `convert: ${asked} is not possible with ${stream} data, which is read front to back: convert it to raw first`
  throw invalidArgument(asked, message)
}

/**
 * The progress of a convert that may have to count first how much its sources hold: each that has to is a part, and so is the copy. How
 * many do is not known before they are opened, so that there is a part for each as soon as there is one.
 */
class Counting {
  readonly #read: LongRunning
  readonly #sources: number
  #counted = false
  #next = 0

  constructor(read: ReadConvert, sources: number) {
    this.#read = read
    this.#sources = sources
  }

  /** Of opening the next source, which calls back only where it counts. */
  source(): Pick<LongRunning, 'onProgress' | 'progressInterval' | 'signal'> {
    const part = this.#next
    this.#next += 1
    return this.#part(part, true)
  }

  /** Of the copy. */
  copying(): LongRunning {
    return this.#counted ? { ...this.#read, ...this.#part(this.#sources, false) } : this.#read
  }

  #part(part: number, counts: boolean): Pick<LongRunning, 'onProgress' | 'progressInterval' | 'signal'> {
    const { onProgress, progressInterval, signal } = this.#read
    const parts = this.#sources + 1
    const scaled = ({ phase, current, total, steps }: Progress): unknown => {
      // A file that says how much it holds is not counted.
      if (total === 0 && counts) return undefined
      this.#counted ||= counts
      const before = part * total
      return onProgress?.({
        phase,
        current: before + current,
        total: parts * total,
        steps: steps.map(step => before + step),
      })
    }
    return { signal, progressInterval, ...(onProgress && { onProgress: scaled }) }
  }
}

/** Opens the target that exists, which is none of the files that are read. */
async function openTarget(located: Located, inUse: readonly string[], read: ReadConvert): Promise<number> {
  const { references, secret, limits, signal } = read
  const { identity, path } = 'random' in located ? known(located.random) : await lookAt(located, signal)
  if (identity !== undefined && inUse.includes(identity)) throw isSource('convert', path)
  const access = { ...toReadAccess({ locking: read.locking }), write: {} }
  return (await openChain(located, { format: read.to, references, secret, limits, signal, access })).image
}

/** What a caller's object is known by: it is not opened for that. */
const known = ({ identity, name }: RandomPlace): Pick<NativeFile, 'identity' | 'path'> => ({
  identity: `source:${identity}`,
  path: name,
})

async function lookAt(located: Located, signal: AbortSignal | undefined): Promise<NativeFile> {
  const opened = await openFile(located, {}, signal)
  await release(opened.file)
  return opened
}

/** Checks what the options demand of each other; the rules of the format are the engine's. */
function toOrder(read: ReadConvert, sources: number): Order {
  const { compress, create, existingTarget = false, targetIsZero = false } = read
  const to = toTargetFormat('convert', read.to)
  const from = typeof read.from === 'string' ? read.from : undefined
  const capable = (ability: 'bitmaps' | 'snapshots'): boolean =>
    from === undefined || (isFormat(from) && can(from, ability))
  if (read.references === 'layer') {
    const message = "convert: references: 'layer' would write what is only in the backing file as zeroes"
    throw invalidArgument('references', message)
  }
  if (existingTarget && (create !== undefined || read.preallocation !== undefined)) {
    throw invalidArgument('existingTarget', 'convert: existingTarget takes the image as it is: nothing can be created')
  }
  if (existingTarget && (compress?.type ?? compress?.level ?? compress?.window) !== undefined) {
    throw invalidArgument(
      'compress',
      'convert: an existing target has its own type of compression: compress can only be true',
    )
  }
  if (targetIsZero && !existingTarget) {
    throw invalidArgument('targetIsZero', 'convert: targetIsZero needs existingTarget: a new file is zero anyway')
  }
  if (read.bitmaps !== undefined && !(can(to, 'bitmaps') && capable('bitmaps'))) {
    throw invalidArgument('bitmaps', 'convert: bitmaps are copied from qcow2 to qcow2')
  }
  if (read.bitmaps !== undefined && create?.version === 2) {
    throw invalidArgument('bitmaps', 'convert: an image of version 2 has no bitmaps')
  }
  if (!existingTarget && (read.base !== undefined) !== (create?.backingFile !== undefined)) {
    throw invalidArgument('base', 'convert: base and create.backingFile need each other')
  }
  refuseParts(read, sources)
  if (read.snapshot !== undefined && !capable('snapshots')) {
    throw invalidArgument('snapshot', `convert: a ${from} image has no snapshots`)
  }
  return {
    ...toTarget('convert', to, toShape(read), compress, existingTarget),
    sparseSize: read.sparseSize,
    concurrency: read.concurrency,
    existing: existingTarget,
    start: read.start,
    length: read.length,
    salvage: read.salvage ?? false,
    rate: read.rate,
    bitmaps: read.bitmaps,
    targetIsZero,
    overwrite: read.overwrite ?? false,
    durable: read.durable ?? true,
    countData: read.countData ?? false,
  }
}

/** What only makes sense for one whole source. */
function refuseParts(read: ReadConvert, sources: number): void {
  checkFormats('convert', read.from, sources)
  const part = read.start !== undefined || read.length !== undefined
  for (const name of ['base', 'bitmaps', 'snapshot'] as const) {
    const whole = name === 'snapshot' ? sources === 1 : sources === 1 && !part
    if (read[name] !== undefined && !whole) {
      throw invalidArgument(
        name,
        `convert: ${name} is for one source, ${name === 'snapshot' ? 'not several' : 'as a whole'}`,
      )
    }
  }
}

function toShape({ create, preallocation }: ReadConvert): ReadShape {
  if (preallocation !== undefined && create?.preallocation !== undefined && preallocation !== create.preallocation) {
    throw invalidArgument('preallocation', 'convert: preallocation contradicts create.preallocation')
  }
  return { ...create, ...(preallocation !== undefined && { preallocation }) }
}

/** How many layers of the source are above the base, and how large that is. */
async function lookAtBase(
  base: Located,
  source: Chain,
  read: ReadConvert,
): Promise<
  Pick<Chain, 'identities'> &
    Partial<Pick<Chain, 'contentId' | 'absolutePath'>> & { order: Pick<NativeConvertJob, 'deltaLayers' | 'baseSize'> }
> {
  const { references, limits, signal } = read
  if (read.existingTarget) {
    const { file, identity, path } = await openFile(base, {}, signal)
    await release(file)
    const deltaLayers = identity === undefined ? -1 : source.layers.indexOf(identity)
    if (deltaLayers < 1) {
      const name = path === undefined ? 'base' : `'${path}'`
      throw invalidArgument('base', `convert: ${name} is not in the backing chain of the source`)
    }
    return { identities: [], order: { deltaLayers, baseSize: 0 } }
  }
  const format = formatNamed(read.create?.backingFormat ?? DEFAULT_FORMAT)
  const chain = await lookAtChain(base, { format, references, limits, signal, access: toReadAccess(read) })
  const identity = chain.layers[0]
  const place = identity === undefined ? -1 : source.layers.indexOf(identity)
  // Nothing is known of what another image has: no layer is left out, and zeroes hide what it has there.
  const deltaLayers = place < 1 ? source.layers.length : place
  const { identities, contentId, absolutePath } = chain
  return { identities, contentId, absolutePath, order: { deltaLayers, baseSize: chain.virtualSize } }
}
