/** Images that come as streams: uploads, downloads, standard input. */

import { tmpdir } from 'node:os'
import { dirname } from 'node:path'
import type { Readable } from 'node:stream'
import type { ReadableStream } from 'node:stream/web'
import { decide } from './backing/policy.js'
import {
  CONVERT,
  type ConvertOptions,
  type ConvertResult,
  convertLocated,
  orderOf,
  type ReadConvert,
} from './convert.js'
import { AbortError, Qcow2Error } from './errors.js'
import { isOva } from './formats/ova.js'
import { detectFormat } from './formats/probe.js'
import { DEFAULT_FORMAT, isFormat, isPlain } from './formats/table.js'
import { type FindingCode, type Inspection, inspectPrefix } from './inspect.js'
import { Intake } from './intake.js'
import type { NbdSource } from './nbd-source.js'
import { bytes, flag, type Read, readOptions, text, throwIfAborted } from './options.js'
import { type TargetPlace, toPlace } from './remote-target.js'
import { forgetting } from './secret.js'
import { type PathLike, sourceFormat, toPath } from './source.js'
import type { SourceFormat } from './source-options.js'
import { Spool } from './spool.js'
import { fileStat } from './support/files.js'
import { incoming } from './support/incoming.js'
import { onAbort } from './support/signals.js'
import { exactText, shownText, toName } from './text.js'
import { type BigIntResults, type Size, sizesIn } from './units.js'

/** Options of {@link ingest}. Of those that are `convert`'s, what is said there holds. */
export interface IngestOptions
  extends Omit<ConvertOptions, 'from' | 'base' | 'salvage' | 'rate' | 'countData' | 'concurrency'> {
  /**
   * Format of what comes. Default: by its magic. Raw, which has none, must be said, and so must a fixed VHD (`'vpc'`), which is known by its end
   * alone. A compressed stream holds a raw disk; an appliance (`.ova`) one disk, or the `member` that is meant.
   */
  from?: SourceFormat | undefined
  /** Of an appliance with several disks: the one with this file name or id. */
  member?: string | undefined
  /**
   * How many bytes the stream has (`Content-Length`): fewer or more are an error. Default: not known. Then a raw disk whose stream ends early, without
   * an error, is a smaller disk, and of the last cluster of an uncompressed image what is missing reads as zeroes. A raw disk is written as it comes only
   * where this says how large it is; without it all of it is stored first.
   */
  byteLength?: Size | undefined
  /**
   * Of a compressed stream: how many bytes the disk in it has; another number is an error. It is then decompressed as it comes. Default: all of the stream is
   * stored, to find out.
   */
  diskSize?: Size | undefined
  /** Refuse a stream of more bytes. Default: as long as it likes. Set it, or `byteLength`, for streams of strangers. */
  maxBytes?: Size | undefined
  /**
   * Store at most this many bytes of the stream, 16 MiB at least: bytes are taken only as fast as they are used up, and an image that cannot be read so
   * is refused. Default: what the image needs.
   */
  maxSpool?: Size | undefined
  /** The folder in which they are stored, in a file without a name. Default: that of the target. */
  spoolDir?: PathLike | undefined
  /**
   * Leave a `Readable` as it is when this fails, instead of destroying it: a server that destroys a request cannot answer it any more.
   * Default false.
   */
  keepInput?: boolean | undefined
  /** As for every job. Default 2: mostly it waits for the stream. */
  concurrency?: number | undefined
}

/** What {@link ingest} did. */
export interface IngestResult<N extends number | bigint = number> extends ConvertResult<N> {
  /** What the first bytes of the stream said. */
  readonly inspection: Inspection<N>
  /** Bytes of the stream. */
  readonly byteLength: N
  /** Most bytes of it that were stored at once. */
  readonly spooled: N
}

const { base: _base, salvage: _salvage, rate: _rate, countData: _countData, ...CONVERT_OF_STREAM } = CONVERT

const INGEST = {
  ...CONVERT_OF_STREAM,
  from: sourceFormat,
  member: text,
  byteLength: bytes,
  diskSize: bytes,
  maxBytes: bytes,
  maxSpool: bytes,
  spoolDir: (value: unknown, name: string): string => toPath(value, name),
  keepInput: flag,
} as const

type ReadIngest = Read<typeof INGEST>

/** Less than this is not enough for what is read at once. */
const LEAST_SPOOL = 16 << 20
/** Bytes that are judged first; all of the largest first cluster where these are not enough. */
const HEADS = [64 << 10, 2 << 20] as const
const WORKERS = 2

/**
 * Takes an image from a stream, and makes a new one of it, as `convert` does of a file: qcow2, raw, raw compressed with gzip, xz or zstd, VMDK (as in
 * an OVA), VHD and all other formats. Its first bytes are judged before the rest is taken. Data goes to its place as it comes, as far as the image is
 * laid out so: what has to wait is stored in a file without a name, whose space is given back as it is used up. So much is stored at most: a little
 * of raw disks and fixed VHD with `byteLength`, of compressed raw disks with `diskSize`, of streamOptimized VMDK, in an appliance too (QEMU's with
 * `byteLength` only), and of uncompressed qcow2 whose tables lie in front of what they map, as `convert` and `qemu-img convert` write it; the
 * compressed bytes of compressed qcow2; of all others the whole image, which goes while the target grows.
 *
 * The stream is read to its end, and only as fast as the disk takes it. The target has its name only when all of it came and is written: nothing is
 * left of a stream that breaks, ends early, or is aborted. What it fails with is the `cause` of `ERR_QCOW2_IO`. When `ingest` fails, the stream is
 * destroyed (see `keepInput`) or cancelled.
 *
 * @example
 * ```ts
 * const server = createServer(async (request, response) => {
 *   const byteLength = Number(request.headers['content-length'])
 *   const { virtualSize } = await ingest(request, 'disk.qcow2', { to: 'qcow2', byteLength, maxBytes: 2 ** 40 })
 *   response.end(`${virtualSize}`)
 * })
 * ```
 *
 * @throws {@link Qcow2Error} as `convert`; `ERR_QCOW2_IO` for a stream that fails, or has not `byteLength` bytes; `ERR_QCOW2_LIMIT` for one of more than
 *   `maxBytes`, and for an image that needs more than `maxSpool`; `ERR_QCOW2_CORRUPT` for one that goes on behind the end of the stream;
 *   `ERR_QCOW2_UNSUPPORTED_FEATURE` for a qcow2 image that has stored bytes in two places of its disk
 */
export function ingest(
  input: Readable | AsyncIterable<Uint8Array> | ReadableStream<Uint8Array>,
  target: PathLike | NbdSource,
  options: IngestOptions & { bigint: true },
): Promise<IngestResult<bigint>>
export function ingest(
  input: Readable | AsyncIterable<Uint8Array> | ReadableStream<Uint8Array>,
  target: PathLike | NbdSource,
  options: IngestOptions & BigIntResults,
): Promise<IngestResult>
export async function ingest(
  input: Readable | AsyncIterable<Uint8Array> | ReadableStream<Uint8Array>,
  target: PathLike | NbdSource,
  options: IngestOptions & BigIntResults,
): Promise<IngestResult<number | bigint>> {
  return await forgetting(() => ingestStream(input, target, options))
}

async function ingestStream(input: unknown, target: unknown, options: unknown): Promise<IngestResult<number | bigint>> {
  const place = toPlace(target)
  const given = readOptions(options, 'ingest', INGEST)
  const read: ReadConvert = {
    ...given,
    concurrency: given.concurrency ?? WORKERS,
    base: undefined,
    salvage: undefined,
    rate: undefined,
    countData: undefined,
  }
  const order = orderOf(place, read, 1)
  const bounds = toBounds(given)
  const { signal } = given
  throwIfAborted(signal)
  const begin = performance.now()
  const intake = new Intake(incoming(input, 'ingest: input'), bounds)
  const forget = onAbort(signal, () => intake.halt(new AbortError(signal?.reason)))
  try {
    const target = await lookAt(place, given)
    const inspection = await judged(intake, given)
    const { from, bitmaps } = given
    const unit = (from ?? inspection.format) === DEFAULT_FORMAT ? inspection.clusterSize : undefined
    const folder = given.spoolDir ?? target.folder
    const length = given.byteLength
    const spool = await Spool.open(folder, { length, unit, keep: bitmaps !== undefined }, signal)
    try {
      const located = { arriving: spool, member: given.member }
      const { diskSize } = given
      const use = (opened: () => void) => convertLocated([located], place, read, order, { diskSize, opened })
      const converted = await intake.into(spool, use)
      const size = sizesIn(given.bigint)
      const { came, peak } = spool.progress
      return {
        ...converted,
        durationMs: performance.now() - begin,
        inspection,
        byteLength: size(came, 'byteLength'),
        spooled: size(peak, 'spooled'),
      }
    } finally {
      await spool.end()
    }
  } catch (error) {
    intake.leave(given.keepInput === true)
    throw error
  } finally {
    forget()
  }
}

/** What of the stream is refused whatever is in it. */
function toBounds({ from, byteLength, maxBytes, maxSpool, limits }: ReadIngest) {
  const plain = isFormat(from) && isPlain(from)
  const most = [
    { field: 'maxBytes', bytes: maxBytes },
    // Of a raw disk that is the same.
    { field: 'maxVirtualSize', bytes: plain ? limits?.maxVirtualSize : undefined },
  ]
  if (maxSpool !== undefined && maxSpool < LEAST_SPOOL) {
    const message = `ingest: maxSpool must be at least ${LEAST_SPOOL}, not ${maxSpool}`
    throw new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', message, { field: 'maxSpool' })
  }
  return { byteLength, most, maxSpool }
}

/** Judges the first bytes: what the opened image would be refused for is refused now. */
async function judged(intake: Intake, read: ReadIngest): Promise<Inspection<number | bigint>> {
  for (const length of HEADS) {
    const { head, whole } = await intake.head(length)
    const inspection = await inspectPrefix(head, read.limits, read.bigint === true)
    // There may be more of the header than came.
    const known = inspection.format !== 'unknown' && inspection.findings.some(({ code }) => code === 'HEADER_INVALID')
    const short = known && !whole && length < HEADS[1]
    if (short) continue
    await refuse(inspection, head, read)
    return isOva(head) ? { ...inspection, detected: 'ova' } : inspection
  }
  throw new Qcow2Error('ERR_QCOW2_INTERNAL', 'a bug in this library: nothing was judged')
}

/** What findings are as errors. Of a header that is wrong, opening it says more, and does that first. */
const REFUSED: Partial<Record<FindingCode, Qcow2Error['code']>> = {
  UNKNOWN_FEATURE: 'ERR_QCOW2_UNSUPPORTED_FEATURE',
  TABLE_OUT_OF_BOUNDS: 'ERR_QCOW2_CORRUPT',
  LIMIT: 'ERR_QCOW2_LIMIT',
}

async function refuse(inspection: Inspection<number | bigint>, head: Buffer, read: ReadIngest): Promise<void> {
  const detected = detectFormat(head)
  const format = read.from ?? detected
  // Other formats have what decides elsewhere, too; what is not known is refused when it is opened, as always.
  if (!isFormat(format) || format !== detected || isPlain(format)) return
  for (const { code, message } of inspection.findings) {
    const error = REFUSED[code]
    if (error !== undefined && (format === DEFAULT_FORMAT || code === 'LIMIT')) {
      throw new Qcow2Error(error, `the stream: ${message}`)
    }
  }
  if ((read.references ?? 'deny') !== 'deny') return
  const { backingFilename, backingFilenameBytes, backingFilenameFormat, dataFile, dataFileBytes } = inspection
  const denied = (kind: 'backing' | 'data-file', filename: string, named?: string): Promise<unknown> =>
    decide('deny', kind, { filename, ...(named !== undefined && { format: named }) }, undefined, undefined, read.signal)
  if (backingFilename !== undefined) {
    await denied('backing', exactText(backingFilename, backingFilenameBytes), backingFilenameFormat)
  }
  if (inspection.findings.some(({ code }) => code === 'DATA_FILE')) {
    await denied('data-file', exactText(dataFile ?? '', dataFileBytes))
  }
}

/** Refuses a target that exists when the stream would be lost on it; tells in which folder it lies, or another one where it is no file. */
async function lookAt(place: TargetPlace, read: ReadIngest): Promise<{ readonly folder: string }> {
  if (!('path' in place)) return { folder: tmpdir() }
  const { path } = place
  const stat = await fileStat(toName(path)).catch(() => undefined)
  if (stat !== undefined && read.overwrite !== true && read.existingTarget !== true) {
    const message = `EEXIST: file already exists, open '${shownText(path)}'`
    throw new Qcow2Error('EEXIST', message, { path, syscall: 'open' })
  }
  return { folder: stat === undefined || stat.isFile() ? dirname(path) : tmpdir() }
}
