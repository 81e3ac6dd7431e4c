/** Requests of one object in an S3-compatible store, by the SDK, which is loaded when the first is made. */

import type * as Sdk from '@aws-sdk/client-s3'
import { Qcow2Error } from '../errors.js'
import { badConnection, badStatus, failed, passing, type RequestPlace, silent } from './failures.js'
import { Attempt, Passing, type Patience, retrying } from './retry.js'
import { nameOf, type ReadS3Place } from './s3-place.js'

const PACKAGE = '@aws-sdk/client-s3'

/** Loads the SDK. It is an optional peer dependency: most users of this package need none. */
async function loadSdk(owner: string): Promise<typeof Sdk> {
  try {
    return await import('@aws-sdk/client-s3')
  } catch (error) {
    const message = `${owner} needs the package '${PACKAGE}', which cannot be loaded: npm install ${PACKAGE}`
    throw new Qcow2Error('ERR_QCOW2_UNSUPPORTED_FEATURE', message, { cause: error })
  }
}

/** What a condition that does not hold can mean. */
type Conflict = 'EEXIST' | 'ERR_QCOW2_SOURCE_CHANGED'

/** What a request may be told beside its parameters. */
export interface CallOptions {
  readonly signal: AbortSignal | undefined
  /** Milliseconds of silence, where that is another time than usual. */
  readonly silence?: number
  /** How many bytes have come of what is asked for. */
  readonly reached?: () => number
  /** What a condition that does not hold means: `EEXIST` where nothing may be there, `ERR_QCOW2_SOURCE_CHANGED` where a version must be. */
  readonly conflict?: Conflict
}

/** How a request is made: with the client, and the options of its `send`. */
export type Send<T> = (
  client: Sdk.S3Client,
  options: { readonly abortSignal: AbortSignal },
  attempt: Attempt,
  place: RequestPlace,
) => Promise<T>

/** One object, and who asks for it. */
export class S3Object {
  readonly sdk: typeof Sdk
  /** What names it in each request. */
  readonly address: { readonly Bucket: string; readonly Key: string }
  readonly name: string
  readonly patience: Patience
  readonly #place: ReadS3Place
  #own: Sdk.S3Client | undefined
  #running = 0

  private constructor(sdk: typeof Sdk, place: ReadS3Place, patience: Patience) {
    this.sdk = sdk
    this.address = { Bucket: place.bucket, Key: place.key }
    this.name = nameOf(place)
    this.patience = patience
    this.#place = place
  }

  /** `owner`: the call that needs it. */
  static async at(place: ReadS3Place, patience: Patience, owner: string): Promise<S3Object> {
    return new S3Object(await loadSdk(owner), place, patience)
  }

  /** Makes a request until it succeeds, or fails for good. */
  async call<T>(call: string, options: CallOptions, send: Send<T>): Promise<T> {
    const place = { name: this.name, call }
    this.#running += 1
    try {
      return await retrying(
        this.patience,
        options.signal,
        () => this.#attempt(place, options, send),
        options.reached ?? (() => 0),
      )
    } finally {
      this.#running -= 1
    }
  }

  /** Ends connections that idle, if they are ours and none is used. */
  rest(): void {
    if (this.#running > 0) return
    this.#own?.destroy()
    this.#own = undefined
  }

  async #attempt<T>(place: RequestPlace, options: CallOptions, send: Send<T>): Promise<T> {
    const { signal, silence = this.patience.silence, conflict = 'ERR_QCOW2_SOURCE_CHANGED' } = options
    const attempt = new Attempt(silence, signal)
    try {
      return await send(this.#client(), { abortSignal: attempt.signal }, attempt, place)
    } catch (error) {
      if (attempt.silent) throw silent(silence, place)
      if (error instanceof Qcow2Error || error instanceof Passing || signal?.aborted) throw error
      throw judge(error, place, conflict)
    } finally {
      attempt.end()
    }
  }

  #client(): Sdk.S3Client {
    const { client, region, endpoint, forcePathStyle, credentials } = this.#place
    if (client !== undefined) return client as unknown as Sdk.S3Client
    const where = region ?? (endpoint === undefined ? undefined : 'us-east-1')
    const config = {
      ...(where !== undefined && { region: where }),
      ...(endpoint !== undefined && { endpoint, forcePathStyle: true }),
      ...(forcePathStyle !== undefined && { forcePathStyle }),
      ...(credentials !== undefined && { credentials }),
      // What is tried again, and when, is the same for all that is remote.
      maxAttempts: 1,
    }
    this.#own ??= new this.sdk.S3Client(config)
    return this.#own
  }
}

/** What stores call failures that can pass, whatever status they give them. */
const PASSING: ReadonlySet<string> = new Set([
  'ConditionalRequestConflict',
  'OperationAborted',
  'RequestTimeout',
  'SlowDown',
  'ThrottlingException',
])

/** What an error of the SDK's means. */
function judge(error: unknown, place: RequestPlace, conflict: Conflict): Error {
  if (!(error instanceof Error)) return badConnection(error, place, true)
  const status = statusOf(error)
  if (PASSING.has(error.name)) return passing('ERR_QCOW2_IO', wordsOf(error), place, { cause: error })
  if (error.name === 'CredentialsProviderError') return failed('EACCES', error.message, place, error)
  // The SDK's own limits; of a connection that was lost, too, which has a code then.
  if (error.name === 'TimeoutError' && !('code' in error)) {
    return passing('ETIMEDOUT', error.message, place, { cause: error })
  }
  if (status === undefined) return badConnection(error, place, true)
  if (status === 412) {
    const what = conflict === 'EEXIST' ? 'the object exists: say overwrite: true' : 'it changed while it was read'
    return failed(conflict, what, place, error)
  }
  if (status < 300) return passing('ERR_QCOW2_IO', wordsOf(error), place, { cause: error })
  return badStatus(status, place, { cause: error, words: wordsOf(error) })
}

const wordsOf = ({ name, message }: Error): string => `the store says ${name}: ${message}`

/** The status of an answer that the SDK took for an error. */
export function statusOf(error: unknown): number | undefined {
  if (typeof error !== 'object' || error === null || !('$metadata' in error)) return undefined
  const { $metadata: metadata } = error
  if (typeof metadata !== 'object' || metadata === null || !('httpStatusCode' in metadata)) return undefined
  return typeof metadata.httpStatusCode === 'number' ? metadata.httpStatusCode : undefined
}
