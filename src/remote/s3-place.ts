/** Where an object of an S3-compatible store is, and who asks for it: options of sources and targets. */

import { invalidArgument } from '../errors.js'
import { flag, type Reader, text } from '../options.js'
import { describe } from '../units.js'

/** What is needed of a client: a `S3Client` of `@aws-sdk/client-s3`. */
export interface S3ClientLike {
  /** Makes a request. */
  send(command: never, options?: never): Promise<unknown>
}

/** Who asks. */
export interface S3Credentials {
  /** The name of the key. */
  readonly accessKeyId: string
  /** The key. */
  readonly secretAccessKey: string
  /** What goes with a key that is good for some time only. */
  readonly sessionToken?: string
}

/** An object of an S3-compatible store. */
export interface S3Place {
  /** The bucket. */
  bucket: string
  /** The name of the object in it. */
  key: string
  /** A `S3Client` of the caller's, which stays the caller's. Without it one is made of what follows, and of what the SDK finds in the environment. */
  client?: S3ClientLike | undefined
  /** Default: the SDK's, and with an `endpoint` `us-east-1`. */
  region?: string | undefined
  /** The address of a store that is not Amazon's. Buckets are then named in paths, unless `forcePathStyle` says otherwise. */
  endpoint?: string | undefined
  /** Whether buckets are named in paths, and not in the names of hosts. */
  forcePathStyle?: boolean | undefined
  /** Default: what the SDK finds: environment, profile, the machine's role. */
  credentials?: S3Credentials | (() => Promise<S3Credentials>) | undefined
}

const client: Reader<S3ClientLike> = (value, name) => {
  const can = typeof value === 'object' && value !== null && 'send' in value && typeof value.send === 'function'
  if (can) return value as S3ClientLike
  throw invalidArgument(name, `${name} must be a S3Client of @aws-sdk/client-s3, not ${describe(value)}`)
}

/** Those of the SDK have more in them, some of it written there by the SDK. No message shows any. */
const credentials: Reader<NonNullable<S3Place['credentials']>> = (value, name) => {
  if (typeof value === 'function') return value as () => Promise<S3Credentials>
  const given: Partial<Record<keyof S3Credentials, unknown>> = typeof value === 'object' && value !== null ? value : {}
  const { accessKeyId, secretAccessKey, sessionToken } = given
  const whole = isSecret(accessKeyId) && isSecret(secretAccessKey)
  if (!whole || !(sessionToken === undefined || isSecret(sessionToken))) {
    throw invalidArgument(name, `${name} must have accessKeyId and secretAccessKey, or be a function that gives them`)
  }
  return { accessKeyId, secretAccessKey, ...(sessionToken !== undefined && { sessionToken }) }
}

const isSecret = (value: unknown): value is string => typeof value === 'string' && value !== ''

/** The table entries of {@link S3Place}. */
export const S3_PLACE = {
  bucket: text,
  key: text,
  client,
  region: text,
  endpoint: text,
  forcePathStyle: flag,
  credentials,
} as const

/** {@link S3Place}, read. */
export interface ReadS3Place {
  readonly bucket: string
  readonly key: string
  readonly client: S3ClientLike | undefined
  readonly region: string | undefined
  readonly endpoint: string | undefined
  readonly forcePathStyle: boolean | undefined
  readonly credentials: S3Place['credentials']
}

/** Checks what options demand of each other. */
export function toS3Place(
  read: { readonly [K in keyof ReadS3Place]: ReadS3Place[K] | undefined },
  owner: string,
): ReadS3Place {
  const { bucket, key, client, region, endpoint, forcePathStyle, credentials } = read
  for (const [name, value] of Object.entries({ bucket, key })) {
    if (value === undefined) throw invalidArgument(name, `${owner}: ${name} is needed`)
  }
  for (const [name, value] of Object.entries({ region, endpoint, forcePathStyle, credentials })) {
    if (client === undefined || value === undefined) continue
    throw invalidArgument(name, `${owner}: ${name} is the client's to say, where there is a client`)
  }
  return { bucket: bucket ?? '', key: key ?? '', client, region, endpoint, forcePathStyle, credentials }
}

/** What errors call an object. */
export const nameOf = ({ bucket, key }: Pick<ReadS3Place, 'bucket' | 'key'>): string => `s3://${bucket}/${key}`
