/** What an image says about itself, in QAPI's terms (`ImageInfo`, `ImageInfoSpecificQCow2`), in camelCase. */

import { readFileName } from './backing/filename.js'
import type { Qcow2Error } from './errors.js'
import type { NativeLayerInfo } from './native.js'
import type { Format } from './source.js'
import { request, toError } from './support/requests.js'

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
  /** That name from the directory of this image. A name that is no file name stands as it is. */
  readonly fullBackingFilename?: string
  readonly backingFilenameFormat?: string
  /** In the order of the snapshot table. */
  readonly snapshots: readonly SnapshotInfo[]
  /**
   * Why there are snapshots or bitmaps that are not listed: their tables are damaged. The disk itself can be read, but not written to;
   * `check` with `repair: 'all'` keeps what is left of them. Absent where nothing is wrong.
   */
  readonly damaged?: readonly Qcow2Error[]
  /** Absent for raw. */
  readonly formatSpecific?: Qcow2SpecificInfo
}

type NativeQcow2Info = NonNullable<NativeLayerInfo['qcow2']>

/** Describes every layer of an open image, top first. */
export async function layersInfo(image: number): Promise<ImageInfo[]> {
  const layers = await request<NativeLayerInfo[]>((number, addon) => addon.layersInfo(number, image))
  return layers.map(toImageInfo)
}

function toImageInfo({ qcow2, ...layer }: NativeLayerInfo): ImageInfo {
  return {
    ...layer,
    dirtyFlag: qcow2?.dirty ?? false,
    encrypted: qcow2?.encryption !== undefined,
    snapshots: qcow2?.snapshots ?? [],
    ...(qcow2 && {
      clusterSize: qcow2.clusterSize,
      ...backingInfo(qcow2, layer.filename),
      formatSpecific: specificInfo(qcow2),
      ...(qcow2.damaged.length > 0 && { damaged: qcow2.damaged.map(failure => toError(failure) as Qcow2Error) }),
    }),
  }
}

function backingInfo({ backingFilename, backingFormat }: NativeQcow2Info, filename: string): Partial<ImageInfo> {
  if (backingFilename === undefined) return {}
  const name = readFileName(backingFilename, filename === '' ? undefined : filename)
  return {
    backingFilename,
    fullBackingFilename: 'path' in name ? name.path : backingFilename,
    ...(backingFormat !== undefined && { backingFilenameFormat: backingFormat }),
  }
}

function specificInfo(qcow2: NativeQcow2Info): Qcow2SpecificInfo {
  const { extendedL2, lazyRefcounts, corrupt, hasDataFile, dataFile, dataFileRaw, encryption, bitmaps } = qcow2
  return {
    type: 'qcow2',
    compat: qcow2.version === 2 ? '0.10' : '1.1',
    refcountBits: qcow2.refcountBits,
    compressionType: qcow2.compressionType,
    ...(qcow2.version > 2 && { extendedL2, lazyRefcounts, corrupt }),
    ...(hasDataFile && { dataFileRaw }),
    ...(dataFile !== undefined && { dataFile }),
    ...(encryption !== undefined && { encrypt: { format: encryption } }),
    ...(bitmaps.length > 0 && { bitmaps }),
  }
}
