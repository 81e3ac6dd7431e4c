/** Objects of an S3-compatible store, as what a stream of bytes becomes. */

import { invalidArgument, Qcow2Error } from '../errors.js'
import { ABORTABLE, bytes, callback, flag, integer, type Progress, type Reader, readOptions } from '../options.js'
import type { StreamTarget, UploadOptions, UploadResult } from '../stream-target.js'
import { describe, type Size } from '../units.js'
import { byteStream, hush } from './parts.js'
import { REMOTE_TIMES, type RemoteTimes, toPatience } from './retry.js'
import { S3Object } from './s3-object.js'
import { nameOf, type ReadS3Place, S3_PLACE, type S3Place, toS3Place } from './s3-place.js'
import { S3Upload } from './s3-upload.js'

/** Options of {@link s3Target}. */
export interface S3TargetOptions extends S3Place, RemoteTimes {
  /** Replace an object that exists. Default false: it is refused (`EEXIST`) before anything is sent, and again by the store in the end. */
  overwrite?: boolean | undefined
  /**
   * Bytes of a part, 5 MiB to 5 GiB. Default 8 MiB, and where it is known how many bytes come, as many as it takes for 10,000 parts. Of each part that
   * is under way, and one more, there is a copy in memory.
   */
  partSize?: Size | undefined
  /** Parts that are sent at once, 1 to 64. Default 4. */
  concurrency?: number | undefined
  /** More parameters of `PutObject` and `CreateMultipartUpload`, by their names in the SDK: `ContentType`, `StorageClass`, `ServerSideEncryption`. */
  parameters?: Readonly<Record<string, unknown>> | undefined
}

const MIB = 2 ** 20
/** The limits of S3. */
const LEAST_PART = 5 * MIB
const MOST_PART = 5 * 2 ** 30
const MOST_PARTS = 10_000
const PART = 8 * MIB
const CONCURRENCY = 4

const partSize: Reader<number> = (value, name) => {
  const size = bytes(value, name)
  if (size >= LEAST_PART && size <= MOST_PART) return size
  throw invalidArgument(name, `${name} must be of 5 MiB to 5 GiB, not ${size} bytes`)
}

/** What is this module's own to say. */
const OWN: ReadonlySet<string> = new Set(['Bucket', 'Key', 'Body', 'IfNoneMatch', 'ContentLength', 'UploadId'])

const parameters: Reader<Readonly<Record<string, unknown>>> = (value, name) => {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw invalidArgument(name, `${name} must be an object, not ${describe(value)}`)
  }
  const own = Object.keys(value).find(each => OWN.has(each))
  if (own !== undefined) throw invalidArgument(name, `${name}: ${own} is said by s3Target itself`)
  return { ...value }
}

const OPTIONS = {
  ...REMOTE_TIMES,
  ...S3_PLACE,
  overwrite: flag,
  partSize,
  concurrency: integer(1, 64),
  parameters,
} as const

const UPLOAD = { ...ABORTABLE, byteLength: bytes, onProgress: callback<(progress: Progress) => unknown>() } as const

/**
 * An object of an S3-compatible store that a stream of bytes becomes, by the package `@aws-sdk/client-s3`: an optional peer dependency, to be installed
 * beside this one. Nothing is asked yet.
 *
 * What is small is put at once; all else in parts, several at a time. The object appears whole or not at all: where the stream, the store or the
 * signal ends an upload, its parts are given up, so that nothing is left to pay for.
 *
 * @example
 * ```js
 * import { createReadStream } from 'node:fs'
 * import { s3Target } from 'qcow2'
 *
 * const target = s3Target({ bucket: 'images', key: 'upload.qcow2', region: 'eu-central-1' })
 * await target.upload(createReadStream('disk.qcow2'), { signal: AbortSignal.timeout(3_600_000) })
 * ```
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_INVALID_ARGUMENT`. `upload` rejects with `EEXIST`, `EACCES`, `ENOENT` (no such bucket), the names of the system,
 *   and `ERR_QCOW2_IO`, the SDK's error as the `cause`; with `ERR_QCOW2_LIMIT` where the stream has more than 10,000 parts; with what the stream failed
 *   with; and with `ERR_QCOW2_UNSUPPORTED_FEATURE` where the SDK is not installed
 */
export function s3Target(options: S3TargetOptions): StreamTarget {
  const read = readOptions(options, 's3Target', OPTIONS)
  return new S3Target(toS3Place(read, 's3Target'), read)
}

type ReadTarget = { readonly [K in keyof typeof OPTIONS]: ReturnType<(typeof OPTIONS)[K]> | undefined }

/** What {@link s3Target} makes. */
class S3Target implements StreamTarget {
  readonly name: string
  readonly #place: ReadS3Place
  readonly #options: ReadTarget

  constructor(place: ReadS3Place, options: ReadTarget) {
    this.name = nameOf(place)
    this.#place = place
    this.#options = options
  }

  async upload(stream: AsyncIterable<Uint8Array>, options?: UploadOptions): Promise<UploadResult> {
    const taken = byteStream(stream, 'upload: bytes')
    hush(taken)
    const { signal, byteLength, onProgress } = readOptions(options, 'upload', UPLOAD)
    const { overwrite = false, concurrency = CONCURRENCY, parameters = {} } = this.#options
    const partSize = this.#partSize(byteLength)
    const object = await S3Object.at(this.#place, toPatience(this.#options), 's3Target')
    const order = { overwrite, concurrency, parameters, partSize, mostParts: MOST_PARTS, byteLength, onProgress }
    try {
      return await new S3Upload(object, order, signal).run(taken)
    } finally {
      object.rest()
    }
  }

  #partSize(byteLength: number | undefined): number {
    const { partSize } = this.#options
    const least = byteLength === undefined ? 0 : Math.ceil(byteLength / MOST_PARTS)
    const size = partSize ?? Math.max(PART, Math.ceil(least / MIB) * MIB)
    if (size >= least && size <= MOST_PART) return size
    const message = `${this.name}: ${byteLength} bytes are more than ${MOST_PARTS} parts of ${Math.min(size, MOST_PART)} bytes`
    throw new Qcow2Error('ERR_QCOW2_LIMIT', message, { path: this.name, field: 'partSize' })
  }
}
