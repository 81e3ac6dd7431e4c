/** Disks that are objects of an S3-compatible store. */

import type { GetObjectCommandOutput } from '@aws-sdk/client-s3'
import { Qcow2Error } from '../errors.js'
import { ABORTABLE, type Abortable, integer, readOptions, text } from '../options.js'
import type { RandomAccessSource } from '../random-access.js'
import { readBody, wrongAnswer } from './body.js'
import { difference, readContentRange, type Version, wrongPart } from './content-range.js'
import { changed, failed, type RequestPlace } from './failures.js'
import { CONCURRENCY, FIRST, RangedSource } from './ranged-source.js'
import { type Attempt, REMOTE_TIMES, type RemoteTimes, toPatience } from './retry.js'
import { S3Object, statusOf } from './s3-object.js'
import { S3_PLACE, type S3Place, toS3Place } from './s3-place.js'

/** Options of {@link s3Source}. */
export interface S3SourceOptions extends S3Place, RemoteTimes, Abortable {
  /** The version, where the store keeps several. Default: the newest one, which is read to the end also where another replaces it. */
  versionId?: string | undefined
  /** Requests at once, 1 to 64. Default 8. */
  concurrency?: number | undefined
}

const OPTIONS = {
  ...ABORTABLE,
  ...REMOTE_TIMES,
  ...S3_PLACE,
  versionId: text,
  concurrency: integer(1, 64),
} as const

/**
 * A disk that is an object of an S3-compatible store, which is asked for the ranges that are read of it, by the package `@aws-sdk/client-s3`: an optional
 * peer dependency, to be installed beside this one. The first request, of the first MiB, is made here.
 *
 * An object that is replaced while it is read ends what reads it with `ERR_QCOW2_SOURCE_CHANGED`, unless the store keeps versions.
 *
 * @example
 * ```js
 * import { s3Source } from 'qcow2'
 *
 * const source = await s3Source({ bucket: 'images', key: 'base.qcow2', region: 'eu-central-1' })
 * const header = Buffer.alloc(512)
 * await source.read(header, 0, AbortSignal.timeout(60_000))
 * ```
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_INVALID_ARGUMENT`; `ERR_QCOW2_UNSUPPORTED_FEATURE` where the SDK is not installed, or the store answers no ranges;
 *   `ENOENT` for an object or bucket that is not there, `EACCES` where it is not to be read, and without credentials; the names of the system, and
 *   `ERR_QCOW2_IO`, as {@link httpSource}. The SDK's error is the `cause`
 */
export async function s3Source(options: S3SourceOptions): Promise<RandomAccessSource> {
  const read = readOptions(options, 's3Source', OPTIONS)
  const { signal, versionId, concurrency = CONCURRENCY } = read
  const object = await S3Object.at(toS3Place(read, 's3Source'), toPatience(read), 's3Source')
  const version = await begin(object, versionId, signal)
  return new RangedSource({
    size: version.size,
    name: object.name,
    identity: `${object.name}?${version.versionId ?? version.etag}`,
    concurrency,
    first: version.first,
    fill: (buffer, position, signal) => fill(object, version, buffer, position, signal),
    rest: () => object.rest(),
  })
}

/** A version of an object, and its beginning. */
interface Beginning extends Version {
  readonly versionId: string | undefined
  readonly first: Uint8Array
}

/** Asks for the beginning, and so for all else that is to be known. */
async function begin(
  object: S3Object,
  versionId: string | undefined,
  signal: AbortSignal | undefined,
): Promise<Beginning> {
  const named = { ...object.address, ...(versionId !== undefined && { VersionId: versionId }) }
  try {
    const command = new object.sdk.GetObjectCommand({ ...named, Range: `bytes=0-${FIRST - 1}` })
    return await object.call('GetObject', { signal }, async (client, options, attempt, place) => {
      const answer = await client.send(command, options)
      const { total } = partOf(answer, { first: 0, last: FIRST - 1 }, undefined, place)
      const first = new Uint8Array(Math.min(FIRST, total))
      await readBody(bodyOf(answer, attempt), { buffer: first, start: 0, attempt, place })
      return { ...versionOf(answer, total), first }
    })
  } catch (error) {
    // Of an object that has nothing there is no range.
    if (!(error instanceof Qcow2Error) || statusOf(error.cause) !== 416) throw error
  }
  const head = new object.sdk.HeadObjectCommand(named)
  const answer = await object.call('HeadObject', { signal }, (client, options) => client.send(head, options))
  const place = { name: object.name, call: 'HeadObject' }
  if (answer.ContentLength !== 0) throw wrongAnswer('no range of an object that is not empty', place)
  return { ...versionOf(answer, 0), first: new Uint8Array(0) }
}

/** Fills the buffer with the bytes of that version from `position` on. */
async function fill(
  object: S3Object,
  version: Beginning,
  buffer: Uint8Array,
  position: number,
  signal: AbortSignal | undefined,
): Promise<void> {
  const { etag, size, versionId } = version
  let filled = 0
  const came = (count: number): void => {
    filled += count
  }
  await object.call('GetObject', { signal, reached: () => filled }, async (client, options, attempt, place) => {
    const asked = { first: position + filled, last: position + buffer.length - 1 }
    const command = new object.sdk.GetObjectCommand({
      ...object.address,
      Range: `bytes=${asked.first}-${asked.last}`,
      ...(etag !== undefined && { IfMatch: etag }),
      ...(versionId !== undefined && { VersionId: versionId }),
    })
    const answer = await client.send(command, options)
    const how = difference(version, versionOf(answer, readContentRange(answer.ContentRange)?.total ?? size))
    if (how !== undefined) {
      giveUp(answer.Body)
      throw changed(how, place)
    }
    partOf(answer, asked, size, place)
    await readBody(bodyOf(answer, attempt), { buffer, start: filled, attempt, place, came })
  })
}

/** By what versions of an object are told apart: not by times, which say less than its ETag. */
const versionOf = (
  { ETag, VersionId }: { readonly ETag?: string | undefined; readonly VersionId?: string | undefined },
  size: number,
): Version & Pick<Beginning, 'versionId'> => ({ size, etag: ETag, modified: undefined, versionId: VersionId })

/** What must hold of an answer before any of its body is read. */
function partOf(
  { ContentRange, ContentLength, Body, $metadata }: GetObjectCommandOutput,
  asked: { readonly first: number; readonly last: number },
  whole: number | undefined,
  place: RequestPlace,
): { readonly total: number } {
  try {
    const range = readContentRange(ContentRange)
    if ($metadata.httpStatusCode === 200 && range === undefined) {
      const message = 'the store answers with the whole object, and not with the range that it was asked for'
      throw failed('ERR_QCOW2_UNSUPPORTED_FEATURE', message, place)
    }
    const wrong = wrongPart(asked, range, whole)
    if (wrong !== undefined || range?.total === undefined) throw wrongAnswer(`${wrong}`, place)
    const length = range.last - range.first + 1
    if (ContentLength !== undefined && ContentLength !== length) {
      throw wrongAnswer(`${ContentLength} bytes, where there must be ${length}`, place)
    }
    return { total: range.total }
  } catch (error) {
    giveUp(Body)
    throw error
  }
}

/** The bytes of an answer, which end where the attempt does. */
function bodyOf({ Body }: GetObjectCommandOutput, { signal }: Attempt): AsyncIterable<Uint8Array> {
  signal.addEventListener('abort', () => giveUp(Body), { once: true })
  return Body as unknown as AsyncIterable<Uint8Array>
}

/** Ends what nobody reads. */
function giveUp(body: unknown): void {
  if (typeof body !== 'object' || body === null) return
  if ('destroy' in body && typeof body.destroy === 'function') body.destroy()
  else if ('cancel' in body && typeof body.cancel === 'function') Promise.resolve(body.cancel()).catch(() => {})
}
