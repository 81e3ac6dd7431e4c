/** Inspection of untrusted images: looks at the header, opens nothing else, promises nothing. */

import type { Abortable, Limits } from './options.js'
import type { Format, ImageSource } from './source.js'

/** Options of {@link inspect}. */
export interface InspectOptions extends Abortable {
  limits?: Limits | undefined
}

/** Why an image is not safe to open, or not as it should be. */
export type FindingCode =
  | 'BACKING_FILE'
  | 'DATA_FILE'
  | 'UNKNOWN_FEATURE'
  | 'CORRUPT_BIT'
  | 'DIRTY_BIT'
  | 'HEADER_INVALID'
  | 'TABLE_OUT_OF_BOUNDS'
  | 'LIMIT'

/** One finding of {@link inspect}. */
export interface Finding {
  readonly code: FindingCode
  readonly message: string
}

/** What the first bytes of a file say. Spec: "Header", "Header extensions". */
export interface Inspection {
  /** `'qcow2'` by its magic; `'unknown'` otherwise: raw is never guessed. */
  readonly format: Format | 'unknown'
  /** Another format whose magic the file has (`'vmdk'`, `'luks'`), if any. */
  readonly detected?: string
  /** Bytes; 0 where the header does not say. */
  readonly virtualSize: number
  readonly clusterSize?: number
  readonly version?: 2 | 3
  readonly backingFilename?: string
  readonly backingFilenameFormat?: string
  readonly dataFile?: string
  readonly encryption?: 'aes' | 'luks'
  readonly compressionType?: 'zlib' | 'zstd'
  readonly extendedL2?: boolean
  readonly features: {
    readonly incompatible: readonly string[]
    readonly compatible: readonly string[]
    readonly autoclear: readonly string[]
    /** Bit numbers of incompatible features without a known meaning. */
    readonly unknownIncompatible: readonly number[]
  }
  /** A valid qcow2 header without any finding. */
  readonly safe: boolean
  readonly findings: readonly Finding[]
}

export declare function inspect(source: ImageSource | Uint8Array, options?: InspectOptions): Promise<Inspection>
