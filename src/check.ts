/** Consistency checks, with QAPI's `ImageCheck` counters. */

import type { Format } from './source.js'

/** What a check found. Every counter is present: what does not occur is 0. */
export interface CheckResult {
  readonly filename: string
  readonly format: Format
  /** No corruption, no leak, and no error kept the check from looking. */
  readonly ok: boolean
  /** Places that the check could not look at. */
  readonly checkErrors: number
  readonly corruptions: number
  /** Clusters whose refcount is higher than their references: wasted space, no danger. */
  readonly leaks: number
  readonly corruptionsFixed: number
  readonly leaksFixed: number
  /** Clusters of the disk. */
  readonly totalClusters: number
  /** Of those, how many have their own data in this image. */
  readonly allocatedClusters: number
  /** Of those, how many do not follow their neighbour in the file. */
  readonly fragmentedClusters: number
  readonly compressedClusters: number
  /** Byte behind the last cluster in use. */
  readonly imageEndOffset: number
  /** One line for each finding, the first 1000. */
  readonly messages: readonly string[]
}

/** Options of {@link Image.check}. */
export type { LongRunning as CheckOptions } from './options.js'
