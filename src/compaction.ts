/** Compacting an open image: giving back to the file system what it does not need. */

import type { NativeCompacted } from './native.js'
import { flag, LONG_RUNNING, type LongRunning, oneOf, type Read } from './options.js'
import { runJob } from './support/jobs.js'

/** Options of {@link Image.compact}. Its progress is told in bytes of the image file. */
export interface CompactOptions extends LongRunning {
  /**
   * `'in-place'`, the default: leaked clusters are freed, holes punched for all free host clusters, the file cut behind the last one in
   * use. `'rewrite'`: then clusters are moved from the end of the file into free ones further down, so that the file becomes short;
   * it needs no second copy of the data.
   */
  mode?: 'in-place' | 'rewrite' | undefined
  /** Give up clusters that hold nothing but zeroes, compressed ones and those of snapshots too. All data is read. Default false. */
  zeroes?: boolean | undefined
  /** Change nothing: tell what would be had. Needs no image that is open for writing. Default false. */
  dryRun?: boolean | undefined
}

/** What a compaction did, or would do. */
export interface CompactResult {
  /** Bytes given back to the file system; with `dryRun` about that many. */
  readonly reclaimedBytes: number
  /** Length of the image file before and afterwards, in bytes. */
  readonly fileLengthBefore: number
  /** Length of the file after it. */
  readonly fileLengthAfter: number
  /** Space that the image file, and an external data file, took before and take afterwards, in bytes. */
  readonly actualSizeBefore: number
  /** Space that the file takes after it. */
  readonly actualSizeAfter: number
  /** Clusters that nothing referred to. */
  readonly leakedClusters: number
  /** Clusters given up because they held nothing but zeroes. */
  readonly zeroClusters: number
  /** Host clusters that were moved. */
  readonly movedClusters: number
}

/** The table entries of {@link CompactOptions}. */
export const COMPACT = {
  ...LONG_RUNNING,
  mode: oneOf('in-place', 'rewrite'),
  zeroes: flag,
  dryRun: flag,
} as const

/** Compacts the top layer of the addon's image. */
export const compactImage = (image: number, read: Read<typeof COMPACT>): Promise<CompactResult> => {
  const { mode, zeroes = false, dryRun = false } = read
  return runJob<NativeCompacted>('compact', read, (request, job, addon) =>
    addon.compactImage(request, job, image, mode === 'rewrite', zeroes, dryRun),
  )
}
