/** Compacting an image file. */

import { SHARING, type SharingOptions } from './access.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { COMPACT, type CompactOptions, type CompactResult } from './compaction.js'
import { openFor } from './open.js'
import { type Limits, limits, readOptions } from './options.js'
import { forgetting, type Secrets, secrets } from './secret.js'
import type { ImageSource } from './source.js'

/** Options of {@link compact}. */
export interface CompactFileOptions extends CompactOptions, SharingOptions {
  /** What the image may pull in. Default `'deny'`. */
  references?: ReferencePolicy | undefined
  /** What opens the image, if it is encrypted. Only `zeroes` and `rewrite` need it. */
  secret?: Secrets | undefined
  /** What the image may claim before it is refused. */
  limits?: Limits | undefined
}

const COMPACT_FILE = { ...COMPACT, ...SHARING, references: referencePolicy, secret: secrets, limits } as const

/**
 * Compacts a qcow2 image that nobody else has open: {@link Image.compact}, between opening and closing it. A dry run opens it for
 * reading.
 *
 * @throws {@link Qcow2Error} as `open` and {@link Image.compact}
 *
 * @example
 * ```js
 * import { compact } from 'qcow2'
 *
 * const { reclaimedBytes } = await compact('disk.qcow2', { mode: 'rewrite', zeroes: true, dryRun: true })
 * if (reclaimedBytes > 2 ** 20) await compact('disk.qcow2', { mode: 'rewrite', zeroes: true })
 * ```
 */
export async function compact(source: ImageSource, options?: CompactFileOptions): Promise<CompactResult> {
  return await forgetting(() => compactFile(source, options))
}

async function compactFile(source: ImageSource, options?: CompactFileOptions): Promise<CompactResult> {
  const read = readOptions(options, 'compact', COMPACT_FILE)
  const { references, secret: _, locking, forceShare, limits: given, ...how } = read
  const flags = read.dryRun ? 'r' : 'r+'
  const { signal } = read
  // As it was given: opening reads it again.
  const secret = options?.secret
  const access = { flags, locking, forceShare } as const
  const image = await openFor('compact', source, { ...access, references, secret, limits: given, signal })
  try {
    return await image.compact(how)
  } finally {
    await image.close()
  }
}
