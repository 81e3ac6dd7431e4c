/** Converting between formats and shapes. */

import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import type { Preallocation, Qcow2Shape } from './create.js'
import { type Limits, type LongRunning, limits, oneOf, text } from './options.js'
import type { Format, ImageSource, PathLike } from './source.js'

/** How to compress: the type of the new image by default, and the codec's own level. */
export interface Compression {
  type?: 'zlib' | 'zstd' | undefined
  /** zlib 1 to 12, zstd 1 to 19. */
  level?: number | undefined
}

/** What `convert` and `measure` read. */
export interface SourceOptions {
  /** Format of the source. Default: qcow2 by its magic; raw must be said. */
  from?: Format | undefined
  references?: ReferencePolicy | undefined
  /** Read this internal snapshot, by id or name. */
  snapshot?: string | undefined
  limits?: Limits | undefined
}

/** The table entries of {@link SourceOptions}. */
export const SOURCE = {
  from: oneOf('qcow2', 'raw'),
  references: referencePolicy,
  snapshot: text,
  limits,
} as const

/** Options of {@link convert}. */
export interface ConvertOptions extends SourceOptions, LongRunning {
  /** Format of the target. */
  to: Format
  /** Compress every cluster that shrinks. qcow2 targets only. */
  compress?: boolean | Compression | undefined
  /** Shape of a qcow2 target. */
  create?: Qcow2Shape | undefined
  preallocation?: Preallocation | undefined
  /** Zeroes of at least this many bytes become a hole; 0 stores everything. Default 4096. */
  sparseSize?: number | undefined
  /** Write into a target that exists and is at least as large, instead of making one. */
  existingTarget?: boolean | undefined
  /** With `existingTarget`: the target reads as zeroes everywhere, so zeroes need not be written. */
  targetIsZero?: boolean | undefined
  /** Replace an existing file. Default false: `EEXIST`. */
  overwrite?: boolean | undefined
  /** Write only what differs from this image: the target gets it as its backing file (`create.backingFile`). */
  base?: ImageSource | undefined
}

/** What a conversion did. */
export interface ConvertResult {
  readonly virtualSize: number
  /** Bytes of guest data read. */
  readonly bytesRead: number
  /** Bytes written to the target. */
  readonly bytesWritten: number
  readonly durationMs: number
}

export declare function convert(source: ImageSource, target: PathLike, options: ConvertOptions): Promise<ConvertResult>
