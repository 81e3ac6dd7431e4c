/** What an image says about itself, in QAPI's terms (`ImageInfo`, `ImageInfoSpecificQCow2`), in camelCase. */

import type { Format } from './source.js'

/** An internal snapshot, as QAPI's `SnapshotInfo`. */
export interface SnapshotInfo {
  readonly id: string
  readonly name: string
  /** Size of the saved machine state in bytes; 0 for a snapshot of the disk alone. */
  readonly vmStateSize: number
  /** When it was made: seconds since 1970, and nanoseconds. */
  readonly dateSec: number
  readonly dateNsec: number
  /** The guest's clock when it was made. */
  readonly vmClockSec: number
  readonly vmClockNsec: number
  /** Instruction count, where record/replay stored one. */
  readonly icount?: number
}

/** A persistent dirty bitmap, as QAPI's `Qcow2BitmapInfo`. */
export interface BitmapInfo {
  readonly name: string
  /** Bytes of guest data that one bit stands for. */
  readonly granularity: number
  readonly flags: readonly ('in-use' | 'auto')[]
}

/** What only qcow2 images have, as QAPI's `ImageInfoSpecificQCow2`. Spec: "Header". */
export interface Qcow2SpecificInfo {
  readonly type: 'qcow2'
  /** `'0.10'` for version 2, `'1.1'` for version 3. */
  readonly compat: '0.10' | '1.1'
  readonly refcountBits: number
  readonly compressionType: 'zlib' | 'zstd'
  /** The external data file's name as the image has it. */
  readonly dataFile?: string
  /** Version 3: whether the data file is a valid raw image by itself. Present with a data file only. */
  readonly dataFileRaw?: boolean
  /** Version 3 only. */
  readonly extendedL2?: boolean
  /** Version 3 only. */
  readonly lazyRefcounts?: boolean
  /** Version 3 only: the image is marked corrupt. */
  readonly corrupt?: boolean
  readonly encrypt?: { readonly format: 'aes' | 'luks' }
  /** Present where there is at least one. */
  readonly bitmaps?: readonly BitmapInfo[]
}

/** One layer of an image, as QAPI's `ImageInfo`. Sizes are bytes. */
export interface ImageInfo {
  /** The file as it was opened; empty where only a descriptor is known. */
  readonly filename: string
  readonly format: Format
  /** Size of the disk. */
  readonly virtualSize: number
  /** Space that the file takes on its file system. */
  readonly actualSize: number
  /** Length of the file. */
  readonly fileLength: number
  /** Absent for raw. */
  readonly clusterSize?: number
  /** The image was not closed cleanly: refcounts may be out of date. */
  readonly dirtyFlag: boolean
  readonly encrypted: boolean
  /** The backing file's name as the image has it. */
  readonly backingFilename?: string
  /** That name, resolved from the directory of this image. Absent where it is not the name of a file. */
  readonly fullBackingFilename?: string
  readonly backingFilenameFormat?: string
  /** In the order of the snapshot table. */
  readonly snapshots: readonly SnapshotInfo[]
  /** Absent for raw. */
  readonly formatSpecific?: Qcow2SpecificInfo
}
