/** Comparing what two images read as. */

import type { ReferencePolicy } from './backing/policy.js'
import type { Limits, LongRunning } from './options.js'
import type { Format, ImageSource } from './source.js'

/** Options of {@link compare}. */
export interface CompareOptions extends LongRunning {
  /** Different virtual sizes, and different allocation, count as a difference. */
  strict?: boolean | undefined
  /** Formats of the two. Default: qcow2 by its magic; raw must be said. */
  formatA?: Format | undefined
  formatB?: Format | undefined
  references?: ReferencePolicy | undefined
  limits?: Limits | undefined
}

/** What a comparison found. */
export interface CompareResult {
  readonly identical: boolean
  /** Guest offset of the first byte that differs. Absent where only the sizes differ. */
  readonly firstDifference?: number
  /** What differs: the bytes, the virtual size, or (strict) where data is allocated. */
  readonly reason?: 'content' | 'size' | 'allocation'
  /** The virtual sizes differ, and what the longer one has beyond reads as zeroes. */
  readonly sizesDiffer: boolean
}

export declare function compare(a: ImageSource, b: ImageSource, options?: CompareOptions): Promise<CompareResult>
