/** Sizes of images before they are made. */

import type { SourceOptions } from './convert.js'
import type { Preallocation, Qcow2Shape } from './create.js'
import type { LongRunning } from './options.js'
import type { Format, ImageSource } from './source.js'
import type { Size } from './units.js'

/** Options of {@link measure}. */
export interface MeasureOptions extends SourceOptions, LongRunning {
  /** Format of the planned target. */
  to: Format
  create?: Qcow2Shape | undefined
  preallocation?: Preallocation | undefined
}

/** Bytes, as QAPI's `BlockMeasureInfo`. */
export interface MeasureResult {
  /** What a target needs for this source. */
  readonly required: number
  /** What it can grow to when the guest has written everything. */
  readonly fullyAllocated: number
  /** More, for the source's persistent bitmaps. Absent where they cannot be copied. */
  readonly bitmaps?: number
}

export declare function measure(source: ImageSource | { size: Size }, options: MeasureOptions): Promise<MeasureResult>
