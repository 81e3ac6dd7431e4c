/** Creating images. */

import type { ReferencePolicy } from './backing/policy.js'
import type { Image } from './image.js'
import type { Abortable } from './options.js'
import type { Format, PathLike } from './source.js'
import type { Size } from './units.js'

/** How much of a new image is allocated at once. `falloc` and `full` allocate the data too. */
export type Preallocation = 'off' | 'metadata' | 'falloc' | 'full'

/** The shape of a new qcow2 image: what `create` and `convert` have in common. Defaults are the most portable. */
export interface Qcow2Shape {
  /** Format version: 3 by default. Spec: "Header", `version`. */
  version?: 2 | 3 | undefined
  /** Bytes, a power of two of 512 to 2097152. Default 65536. */
  clusterSize?: number | undefined
  /** Subclusters: needs version 3 and clusters of 16 KiB or more. Spec: "Extended L2 Entries". */
  extendedL2?: boolean | undefined
  /** How clusters are compressed when they are. Default `'zlib'`. */
  compressionType?: 'zlib' | 'zstd' | undefined
  preallocation?: Preallocation | undefined
  /** Width of a refcount. Default 16. */
  refcountBits?: 1 | 2 | 4 | 8 | 16 | 32 | 64 | undefined
  lazyRefcounts?: boolean | undefined
  /** Recorded as written here; a relative name is relative to the new image. With `backingFormat`. */
  backingFile?: string | undefined
  backingFormat?: Format | undefined
  /** Keep the guest's data in this file. It is created, or overwritten where `overwrite` is set. */
  dataFile?: string | undefined
  /** The data file is to be a valid raw image by itself. */
  dataFileRaw?: boolean | undefined
}

/** Options of {@link create}. */
export interface CreateOptions extends Qcow2Shape, Abortable {
  /** Default `'qcow2'`. */
  format?: Format | undefined
  /** Virtual size in bytes, a multiple of 512. Default: the backing file's. */
  size?: Size | undefined
  /** Replace an existing file. Default false: `EEXIST`. */
  overwrite?: boolean | undefined
  /**
   * What the backing file may pull in itself: the backing file is named by the caller and is opened in any case, except with
   * `'layer'`, which records the name unchecked. Default `'deny'`.
   */
  references?: ReferencePolicy | undefined
}

export declare function create(path: PathLike, options: CreateOptions): Promise<Image>
