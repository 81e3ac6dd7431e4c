/**
 * The kinds of jobs: what each is given, and how that is read. What is in a queue came over a network, from whoever can reach it: both
 * ends read it by these tables.
 */

import type { CheckResult } from '../check.js'
import type { CompactResult } from '../compaction.js'
import type { ConvertResult } from '../convert.js'
import { invalidArgument } from '../errors.js'
import type { Format, TargetFormat } from '../formats/table.js'
import type { Inspection } from '../inspect.js'
import { flag, integer, oneOf, type Reader, readOptions, text } from '../options.js'
import { type Compression, compression, type Preallocation, SHAPE, type Shape, shape } from '../shape.js'
import { format, sourceFormat, targetFormat } from '../source.js'
import type { SourceFormat } from '../source-options.js'
import { describe } from '../units.js'
import type { Plain } from './plain.js'

/** `convert` of the API: see there for the options. Paths lie under the worker's roots; relative ones start from the first. */
export interface ConvertJob {
  /** The image, below a root of the worker. */
  source: string
  /**
   * Has its name when it is whole. What replaces a file (`overwrite`) is another file, by a rename: it has the old one's permissions, and its owner where
   * the worker may set that; extended attributes are not taken over, and other names of the old file (hard links) keep that.
   */
  target: string
  /** Its format. Default: by its magic. */
  from?: SourceFormat | undefined
  /** Format of the target. */
  to: TargetFormat
  /** Read this internal snapshot, by id or name. */
  snapshot?: string | undefined
  /** Copy from this byte of the disk on. Default 0. */
  start?: number | undefined
  /** Copy this many bytes. Default: the rest of the disk. */
  length?: number | undefined
  /** What cannot be read becomes zeroes. Default false. */
  salvage?: boolean | undefined
  /** Compress every cluster that shrinks. Default false. */
  compress?: boolean | Compression | undefined
  /** The shape of an image that stands by itself and needs no secret: without `backingFile`, `dataFile`, `encrypt` and what belongs to them. */
  create?: Shape | undefined
  /** The same as `create.preallocation`, and for raw targets too. */
  preallocation?: Preallocation | undefined
  /** Zeroes of at least this many bytes become a hole. Default 4096. */
  sparseSize?: number | undefined
  /** Copy the persistent bitmaps. Default false. */
  bitmaps?: boolean | undefined
  /** Replace a file that has the target's name. Default false: `EEXIST`. */
  overwrite?: boolean | undefined
}

/** `check` of the API. */
export interface CheckJob {
  /** The image, below a root of the worker. */
  source: string
  /** Its format. Default: by its magic. */
  format?: Format | undefined
  /** Changes the image in place: whoever is interrupted leaves it no worse, and the next attempt repairs the rest. */
  repair?: 'leaks' | 'all' | undefined
}

/** `inspect` of the API. */
export interface InspectJob {
  /** The image, below a root of the worker. */
  source: string
}

/** `compact` of the API. It changes the image in place, and can be interrupted and begun again. */
export interface CompactJob {
  /** The image, below a root of the worker. */
  source: string
  /** `'rewrite'` moves clusters, too. Default `'in-place'`. */
  mode?: 'in-place' | 'rewrite' | undefined
  /** Give up clusters of zeroes. Default false. */
  zeroes?: boolean | undefined
  /** Change nothing: tell what would be had. Default false. */
  dryRun?: boolean | undefined
}

/** A file, byte for byte, as the body of an HTTP PUT. */
export interface UploadJob {
  /** The file, below a root of the worker; an image that is written to is `ERR_QCOW2_LOCKED`. */
  source: string
  /** Begins with one of the worker's `uploads`. */
  url: string
  /** Default `'application/octet-stream'`. */
  contentType?: string | undefined
}

/** What a server said to an upload. */
export interface UploadResult {
  /** Bytes of the file. */
  readonly bytesSent: number
  /** The status of the server's answer, 200 to 299. */
  readonly status: number
  /** The server's name for what it has now, if it says one. */
  readonly etag?: string
  /** Milliseconds that it took. */
  readonly durationMs: number
}

/** By kind, what a job is given. */
export interface JobData {
  /** A disk into a new image. */
  convert: ConvertJob
  /** An image's metadata against itself. */
  check: CheckJob
  /** What the header of an image claims. */
  inspect: InspectJob
  /** An image made smaller in place. */
  compact: CompactJob
  /** A file to a server. */
  upload: UploadJob
}

/** By kind, what a job that is done says: what the API's call says, as JSON has it. Of a check's findings the first 100. */
export interface JobResults {
  /** What was copied. */
  convert: Plain<ConvertResult>
  /** What was found. */
  check: Plain<Omit<CheckResult, 'messages'>>
  /** What the header claims. */
  inspect: Plain<Inspection>
  /** What was given back. */
  compact: Plain<CompactResult>
  /** What the server answered. */
  upload: UploadResult
}

/** What a job can be. */
export type JobKind = keyof JobData

export const JOB_KINDS = ['convert', 'check', 'inspect', 'compact', 'upload'] as const satisfies readonly JobKind[]

const LONGEST_PATH = 4096

const path: Reader<string> = (value, name) => {
  const given = text(value, name)
  if (given.length > LONGEST_PATH) throw invalidArgument(name, `${name} is longer than ${LONGEST_PATH} characters`)
  return given
}

/** What JSON has exactly. */
const size = integer(0, Number.MAX_SAFE_INTEGER)

/** What names another file, or has a secret, which a queue would keep in clear. */
const NOT_IN_A_JOB = ['backingFile', 'backingFormat', 'dataFile', 'dataFileRaw', 'keepDataFile', 'encrypt'] as const

const jobShape: Reader<unknown> = (value, name) => {
  const read = shape(value, name)
  for (const option of NOT_IN_A_JOB) {
    if (!(option in read) || Reflect.get(read, option) === undefined) continue
    throw invalidArgument(option, `${name}: a job makes an image that stands by itself: without ${option}`)
  }
  return read
}

const url: Reader<URL> = (value, name) => {
  const given = path(value, name)
  if (URL.canParse(given)) {
    const read = new URL(given)
    if (/^https?:$/.test(read.protocol) && read.username === '' && read.password === '') return read
  }
  throw invalidArgument(
    name,
    `${name} must be an address of http:// or https:// without a user, not ${describe(given)}`,
  )
}

const contentType: Reader<string> = (value, name) => {
  const given = text(value, name)
  if (/^[\x20-\x7e]{1,200}$/.test(given)) return given
  throw invalidArgument(name, `${name} must be printable ASCII, 200 characters at most`)
}

const TABLES = {
  convert: {
    source: path,
    target: path,
    from: sourceFormat,
    to: targetFormat,
    snapshot: text,
    start: size,
    length: size,
    salvage: flag,
    compress: compression,
    create: jobShape,
    preallocation: SHAPE.preallocation,
    sparseSize: integer(0, 2 ** 30),
    bitmaps: flag,
    overwrite: flag,
  },
  check: { source: path, format, repair: oneOf('leaks', 'all') },
  inspect: { source: path },
  compact: { source: path, mode: oneOf('in-place', 'rewrite'), zeroes: flag, dryRun: flag },
  upload: { source: path, url, contentType },
} as const satisfies { readonly [K in JobKind]: { readonly [P in keyof JobData[K]]-?: Reader<unknown> } }

/** What a job of a kind must say. */
const NEEDED: { readonly [K in JobKind]: readonly (keyof JobData[K] & string)[] } = {
  convert: ['source', 'target', 'to'],
  check: ['source'],
  inspect: ['source'],
  compact: ['source'],
  upload: ['source', 'url'],
}

/** Reads the name of a kind. */
export const jobKind: Reader<JobKind> = oneOf(...JOB_KINDS)

/** A job's data as it was given, once all of it was found to be right. */
export function readJob<K extends JobKind>(kind: K, data: unknown): JobData[K] {
  const read: Readonly<Record<string, unknown>> = readOptions(data, kind, TABLES[kind])
  for (const name of NEEDED[kind]) {
    if (read[name] === undefined) throw invalidArgument(name, `${kind}: ${name} is needed`)
  }
  return data as JobData[K]
}
