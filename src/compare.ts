/** Comparing what two images read as. */

import { SHARING, type SharingOptions, toReadAccess } from './access.js'
import { withChain } from './backing/chain.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { type Format, PLAIN_FORMAT } from './formats/table.js'
import type { NativeCompared } from './native.js'
import { flag, type Limits, LONG_RUNNING, type LongRunning, limits, readOptions, throwIfAborted } from './options.js'
import { forgetting, type Secrets, secrets } from './secret.js'
import { format, type ImageSource, toLocated } from './source.js'
import { runJob } from './support/jobs.js'
import { type BigIntResults, sizesIn } from './units.js'

/** Options of {@link compare}. */
export interface CompareOptions extends LongRunning, SharingOptions {
  /** Different virtual sizes, and different allocation, count as a difference. */
  strict?: boolean | undefined
  /** Format of the first. Default: by its magic; raw, which has none, must be said. */
  formatA?: Format | undefined
  /** Format of the second. Default: by its magic; raw, which has none, must be said. */
  formatB?: Format | undefined
  /** What the two may pull in. Default `'deny'`. */
  references?: ReferencePolicy | undefined
  /** What opens encrypted layers of the first. */
  secretA?: Secrets | undefined
  /** What opens encrypted layers of the second. */
  secretB?: Secrets | undefined
  /** What the images may claim before they are refused. */
  limits?: Limits | undefined
}

/** What a comparison found. */
export interface CompareResult<N extends number | bigint = number> {
  /** Whether both disks read the same. */
  readonly identical: boolean
  /** Guest offset of the first byte, or allocation, that differs. Absent where only the sizes differ. */
  readonly firstDifference?: N
  /** What differs: the bytes, or (strict) the virtual size or where data is allocated. */
  readonly reason?: 'content' | 'size' | 'allocation'
  /** The virtual sizes differ. Without `strict` that alone is no difference if what the longer one has beyond reads as zeroes. */
  readonly sizesDiffer: boolean
}

const COMPARE = {
  ...LONG_RUNNING,
  ...SHARING,
  strict: flag,
  formatA: format,
  formatB: format,
  references: referencePolicy,
  secretA: secrets,
  secretB: secrets,
  limits,
  bigint: flag,
} as const

/**
 * Compares two disks byte by byte, through their backing chains. Ranges that both know to be zero are not read.
 *
 * @throws {@link Qcow2Error} as `open`, and as reading does where it fails before the first difference
 *
 * @example
 * ```js
 * import { compare } from 'qcow2'
 *
 * const { identical, firstDifference } = await compare('a.qcow2', 'b.raw', { formatB: 'raw' })
 * if (!identical) console.log(`they differ at byte ${firstDifference}`)
 * ```
 */
export function compare(
  a: ImageSource,
  b: ImageSource,
  options: CompareOptions & { bigint: true },
): Promise<CompareResult<bigint>>
export function compare(
  a: ImageSource,
  b: ImageSource,
  options?: CompareOptions & BigIntResults,
): Promise<CompareResult>
export async function compare(
  a: ImageSource,
  b: ImageSource,
  options?: CompareOptions & BigIntResults,
): Promise<CompareResult<number | bigint>> {
  return await forgetting(() => compareImages(a, b, options))
}

async function compareImages(
  a: ImageSource,
  b: ImageSource,
  options?: CompareOptions & BigIntResults,
): Promise<CompareResult<number | bigint>> {
  const locatedA = toLocated(a, 'a')
  const locatedB = toLocated(b, 'b')
  const read = readOptions(options, 'compare', COMPARE)
  throwIfAborted(read.signal)
  const { references, limits, signal } = read
  const chain = { references, limits, signal, access: toReadAccess(read) }
  const openingA = { ...chain, secret: read.secretA, format: read.formatA, sayRaw: `formatA: '${PLAIN_FORMAT}'` }
  const openingB = { ...chain, secret: read.secretB, format: read.formatB, sayRaw: `formatB: '${PLAIN_FORMAT}'` }
  return withChain(locatedA, openingA, first =>
    withChain(locatedB, openingB, async second => {
      const compared = await runJob<NativeCompared>('compare', read, (request, job, addon) =>
        addon.compareImages(request, job, first.image, second.image, read.strict ?? false, read.concurrency),
      )
      return toResult(compared, read.bigint)
    }),
  )
}

const toResult = (
  { reason, offset, sizesDiffer }: NativeCompared,
  big: boolean | undefined,
): CompareResult<number | bigint> => ({
  identical: reason === undefined,
  sizesDiffer,
  ...(reason !== undefined && { reason }),
  ...(offset !== undefined && { firstDifference: sizesIn(big)(offset, 'firstDifference') }),
})
