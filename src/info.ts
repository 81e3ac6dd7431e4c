/** What an image says about itself, in QAPI's terms (`ImageInfo`, `ImageInfoSpecificQCow2`), in camelCase. */

import { readFileName } from './backing/filename.js'
import type { Qcow2Error } from './errors.js'
import { type Format, traitsOf } from './formats/table.js'
import type { NativeLayerInfo, NativeNamedFile } from './native.js'
import { request, toError } from './support/requests.js'
import { shown, shownText } from './text.js'
import { sizesIn } from './units.js'

/** An internal snapshot, as QAPI's `SnapshotInfo`. */
export interface SnapshotInfo<N extends number | bigint = number> {
  /** Unique in the image; a number, as QEMU counts them. */
  readonly id: string
  /** The bytes of `id`, where they are not UTF-8: it then has replacement characters. */
  readonly idBytes?: Buffer
  /** What a person called it; need not be unique. */
  readonly name: string
  /** The bytes of `name`, where they are not UTF-8: it then has replacement characters, and other names can be shown the same. */
  readonly nameBytes?: Buffer
  /** Size of the saved machine state in bytes; 0 for a snapshot of the disk alone. */
  readonly vmStateSize: N
  /** When it was made: seconds since 1970, and nanoseconds. */
  readonly dateSec: number
  /** Nanoseconds of `dateSec`. */
  readonly dateNsec: number
  /** The guest's clock when it was made. */
  readonly vmClockSec: number
  /** Nanoseconds of `vmClockSec`. */
  readonly vmClockNsec: number
  /** Instruction count, where record/replay stored one. */
  readonly icount?: number
}

/** A persistent dirty bitmap, as QAPI's `Qcow2BitmapInfo`. */
export interface BitmapInfo {
  /** Its name. */
  readonly name: string
  /** The bytes of `name`, where they are not UTF-8: it then has replacement characters, and other names can be shown the same. */
  readonly nameBytes?: Buffer
  /** Bytes of guest data that one bit stands for. */
  readonly granularity: number
  /** `in-use`: who wrote to the image last has not stored it, so that it is inconsistent; `auto`: it records. */
  readonly flags: readonly ('in-use' | 'auto')[]
}

/** A key slot of a LUKS header, as QAPI's `QCryptoBlockInfoLUKSSlot`. */
export interface LuksSlotInfo {
  /** Its number, from 0 on. */
  readonly slot: number
  /** Whether a secret opens it. */
  readonly active: boolean
  /** Of an active slot: iterations of PBKDF2 from the secret to its key; absent for argon2. */
  readonly iters?: number
  /** Of an active slot: stripes of the key material. */
  readonly stripes?: number
  /** Where the key material lies, in bytes from the LUKS header's start. */
  readonly keyOffset: number
}

/** What a LUKS header says, as QAPI's `QCryptoBlockInfoLUKS`. No secret is needed for it. */
export interface LuksInfo {
  /** The version of LUKS. */
  readonly version: 1 | 2
  /** The header lies in a file of its own. */
  readonly detachedHeader: boolean
  /** As `aes-256`. */
  readonly cipherAlg: string
  /** As `xts`. */
  readonly cipherMode: string
  /** As `plain64`; absent for a mode that goes without. */
  readonly ivgenAlg?: string
  /** The hash of `essiv`. */
  readonly ivgenHashAlg?: string
  /** As `sha256`: of version 1, where it is that of every slot. */
  readonly hashAlg?: string
  /** Of this header. */
  readonly uuid: string
  /** Where data begins, in bytes from the header's start. A qcow2 image says itself where its data is. */
  readonly payloadOffset: number
  /** Of version 1: iterations of the digest by which the key of the data is known. */
  readonly masterKeyIters?: number
  /** Bytes that are encrypted as one. */
  readonly sectorSize: number
  /** Of version 1 all eight, of version 2 those in use. */
  readonly slots: readonly LuksSlotInfo[]
}

/** How guest data is encrypted. `damaged` says why there is nothing about a LUKS header: then no secret opens the image. */
export type EncryptInfo =
  | {
      /** The legacy encryption of QEMU. */
      readonly format: 'aes'
      /** It has none. */
      readonly slots?: never
      /** It has no header that could be. */
      readonly damaged?: never
    }
  | ({
      /** LUKS, with what its header says. */
      readonly format: 'luks'
      /** The header was read. */
      readonly damaged?: never
    } & LuksInfo)
  | {
      /** LUKS, whose header cannot be read. */
      readonly format: 'luks'
      /** Nobody knows. */
      readonly slots?: never
      /** Why it cannot. */
      readonly damaged: Qcow2Error
    }

/** What only qcow2 images have, as QAPI's `ImageInfoSpecificQCow2`. Spec: "Header". */
export interface Qcow2SpecificInfo {
  /** Tells it from what other formats have. */
  readonly type: 'qcow2'
  /** `'0.10'` for version 2, `'1.1'` for version 3. */
  readonly compat: '0.10' | '1.1'
  /** Bits of a reference count: 1 to 64. */
  readonly refcountBits: number
  /** How clusters are compressed where they are. */
  readonly compressionType: 'zlib' | 'zstd'
  /** The external data file's name as the image has it. */
  readonly dataFile?: string
  /** The bytes of `dataFile`, where they are not UTF-8. */
  readonly dataFileBytes?: Buffer
  /** Version 3: whether the data file is a valid raw image by itself. Present with a data file only. */
  readonly dataFileRaw?: boolean
  /** Version 3 only. */
  readonly extendedL2?: boolean
  /** Version 3 only. */
  readonly lazyRefcounts?: boolean
  /** Version 3 only: the image is marked corrupt. */
  readonly corrupt?: boolean
  /** How guest data is encrypted, where it is. */
  readonly encrypt?: EncryptInfo
  /** Present where there is at least one. */
  readonly bitmaps?: readonly BitmapInfo[]
}

/** An extent of a VMDK image, as QAPI's `VmdkExtentInfo`. */
export interface VmdkExtentInfo<N extends number | bigint = number> {
  /** Its file as it was opened; where it was not, the name that the descriptor has. Absent of one without a file, which is zero. */
  readonly filename?: string
  /** The bytes of `filename`, where they are not UTF-8. */
  readonly filenameBytes?: Buffer
  /** Whether the file was opened: {@link ReferencePolicy}. */
  readonly opened: boolean
  /** Its type in the descriptor, as `FLAT` or `SPARSE`; absent where the image's own file holds it. */
  readonly format?: string
  /** Bytes of the disk that it holds. */
  readonly virtualSize: N
  /** Length of the file, and the space that it takes; of one in a file of its own that was opened. */
  readonly fileLength?: N
  /** Space that the file takes; as `fileLength`. */
  readonly actualSize?: N
  /** Whether its grains are. */
  readonly compressed: boolean
  /** Bytes of a grain, of an extent with grains that was opened. */
  readonly clusterSize?: number
}

/** What a VMDK image says, as QAPI's `ImageInfoSpecificVmdk`. */
export interface VmdkInfo<N extends number | bigint = number> {
  /** As `monolithicSparse`. */
  readonly createType: string
  /** Content identifier: another one whenever the disk changed. */
  readonly cid: number
  /** That of the backing file when this image was made on it; 0xffffffff without one. */
  readonly parentCid: number
  /** In guest order. */
  readonly extents: readonly VmdkExtentInfo<N>[]
}

/** What requests should look like, as QAPI's `BlockLimitsInfo`: bytes, absent where there is no such limit. */
export interface BlockLimits {
  /** Multiple that offsets and lengths must be of. */
  readonly requestAlignment: number
  /** Multiple at which discarding works best. */
  readonly discardAlignment?: number
  /** Multiple at which writing zeroes works best. */
  readonly writeZeroesAlignment?: number
  /** Most bytes that a device takes at once. */
  readonly maxHwTransfer?: number
  /** Most pieces of memory in one request: a number, not bytes. */
  readonly maxIov: number
  /** Most pieces of memory that a device takes at once: a number, not bytes. */
  readonly maxHwIov?: number
  /** Multiple that addresses of buffers must be of for the file to be read without a copy. */
  readonly minMemAlignment: number
  /** Multiple that addresses of buffers should be of. */
  readonly optMemAlignment: number
}

/** One layer of an image, as QAPI's `ImageInfo`. Sizes are bytes: numbers, or bigints where they were asked for. */
export interface ImageInfo<N extends number | bigint = number> {
  /** The file as it was opened; empty where only a descriptor is known. */
  readonly filename: string
  /** The bytes of `filename`, where they are not UTF-8: it then has replacement characters. */
  readonly filenameBytes?: Buffer
  /** The format it was opened as. */
  readonly format: Format
  /** Size of the disk. */
  readonly virtualSize: N
  /** Space that the file takes on its file system. Absent of an export, of which no server tells that. */
  readonly actualSize?: N
  /** Length of the file. */
  readonly fileLength: N
  /** What holds the image: a regular file, a block device, or an export of an NBD server. */
  readonly protocol: 'file' | 'host_device' | 'nbd'
  /** Absent for raw, which has no clusters. */
  readonly clusterSize?: number
  /** The image was not closed cleanly: refcounts may be out of date. */
  readonly dirtyFlag: boolean
  /** Whether reading guest data takes a secret. */
  readonly encrypted: boolean
  /** The backing file's name as the image has it. */
  readonly backingFilename?: string
  /** The bytes of `backingFilename`, where they are not UTF-8. */
  readonly backingFilenameBytes?: Buffer
  /** That name from the directory of this image. A name that is no file name stands as it is. */
  readonly fullBackingFilename?: string
  /** The bytes of `fullBackingFilename`, where they are not UTF-8. */
  readonly fullBackingFilenameBytes?: Buffer
  /** The format of the backing file, where the image says it. */
  readonly backingFilenameFormat?: string
  /** In the order of the snapshot table. */
  readonly snapshots: readonly SnapshotInfo<N>[]
  /**
   * Why there are snapshots or bitmaps that are not listed: their tables are damaged. The disk itself can be read, but not written to;
   * `check` with `repair: 'all'` keeps what is left of them. Absent where nothing is wrong.
   */
  readonly damaged?: readonly Qcow2Error[]
  /** Of qcow2 images. */
  readonly formatSpecific?: Qcow2SpecificInfo
  /** Of LUKS files. */
  readonly luks?: LuksInfo
  /** Of VMDK images. */
  readonly vmdk?: VmdkInfo<N>
  /** What requests on the disk should look like, and those on its file. They depend on how the image is opened: `cache`. */
  readonly limits: {
    /** Of requests of this image. */
    readonly disk: BlockLimits
    /** Of what it does with its file. */
    readonly file: BlockLimits
  }
}

type NativeQcow2Info = NonNullable<NativeLayerInfo['qcow2']>

/** A description whose sizes are not yet what its caller is to see. */
export type AnyImageInfo = ImageInfo<number | bigint>

/** Sizes of a description as the caller wants them: see {@link sizesIn}. */
export function infoIn(info: AnyImageInfo, big: boolean | undefined): AnyImageInfo {
  const size = sizesIn(big)
  return {
    ...info,
    virtualSize: size(info.virtualSize, 'virtualSize'),
    ...(info.actualSize !== undefined && { actualSize: size(info.actualSize, 'actualSize') }),
    fileLength: size(info.fileLength, 'fileLength'),
    snapshots: info.snapshots.map(snapshot => snapshotIn(snapshot, big)),
    ...(info.vmdk && { vmdk: { ...info.vmdk, extents: info.vmdk.extents.map(extent => extentIn(extent, big)) } }),
  }
}

function extentIn(extent: VmdkExtentInfo<number | bigint>, big: boolean | undefined): VmdkExtentInfo<number | bigint> {
  const size = sizesIn(big)
  return {
    ...extent,
    virtualSize: size(extent.virtualSize, 'virtualSize'),
    ...(extent.fileLength !== undefined && { fileLength: size(extent.fileLength, 'fileLength') }),
    ...(extent.actualSize !== undefined && { actualSize: size(extent.actualSize, 'actualSize') }),
  }
}

/** As {@link infoIn}, of a snapshot. */
export const snapshotIn = (
  snapshot: SnapshotInfo<number | bigint>,
  big: boolean | undefined,
): SnapshotInfo<number | bigint> => ({ ...snapshot, vmStateSize: sizesIn(big)(snapshot.vmStateSize, 'vmStateSize') })

/** Describes every layer of an open image, top first. */
export async function layersInfo(image: number): Promise<AnyImageInfo[]> {
  const layers = await request<NativeLayerInfo[]>((number, addon) => addon.layersInfo(number, image))
  return layers.map(toImageInfo)
}

function toImageInfo(native: NativeLayerInfo): AnyImageInfo {
  const { qcow2, luks, vmdk, filename, backing, encryption, ...layer } = native
  // The addon opens no others.
  const format = layer.format as Format
  return {
    ...layer,
    format,
    ...shown('filename', filename),
    limits: toLimits(layer, format, qcow2),
    dirtyFlag: qcow2?.dirty ?? false,
    encrypted: encryption !== undefined,
    snapshots: (qcow2?.snapshots ?? []).map(({ id, name, ...snapshot }) => ({
      ...shown('id', id),
      ...shown('name', name),
      ...snapshot,
    })),
    ...(backing && backingInfo(backing, native)),
    ...(luks && { luks: { ...luks, uuid: shownText(luks.uuid) } }),
    ...(vmdk && { vmdk: vmdkInfo(vmdk) }),
    ...(qcow2 && {
      formatSpecific: specificInfo(qcow2, encryption),
      ...(qcow2.damaged.length > 0 && { damaged: qcow2.damaged.map(failure => toError(failure) as Qcow2Error) }),
    }),
  }
}

const vmdkInfo = ({ createType, extents, ...vmdk }: NonNullable<NativeLayerInfo['vmdk']>): VmdkInfo => ({
  ...vmdk,
  createType: shownText(createType),
  extents: extents.map(({ filename, ...extent }) => ({
    ...extent,
    ...(filename !== undefined && shown('filename', filename)),
  })),
})

/** Pieces of memory that the system takes in one request. */
const MAX_IOV = 1024
/** A cluster with extended L2 entries has so many subclusters. */
const SUBCLUSTERS = 32

function toLimits(
  { limits: file, clusterSize }: Pick<NativeLayerInfo, 'limits' | 'clusterSize'>,
  format: Format,
  qcow2: NativeQcow2Info | undefined,
): ImageInfo['limits'] {
  const { maxTransfer, maxSegments, zeroesAlignment, requestAlignment, memoryAlignment } = file
  // A device's rule can be finer than what a request must be anyway.
  const discardAlignment =
    file.discardAlignment === undefined ? undefined : Math.max(file.discardAlignment, requestAlignment)
  const common = {
    ...(maxTransfer !== undefined && { maxHwTransfer: maxTransfer }),
    maxIov: MAX_IOV,
    ...(maxSegments !== undefined && { maxHwIov: maxSegments }),
    minMemAlignment: memoryAlignment,
    optMemAlignment: Math.max(memoryAlignment, file.pageSize),
  }
  const device = discardAlignment === undefined ? {} : { discardAlignment }
  const own =
    qcow2 === undefined || clusterSize === undefined
      ? device
      : {
          discardAlignment: clusterSize,
          writeZeroesAlignment: qcow2.extendedL2 ? clusterSize / SUBCLUSTERS : clusterSize,
        }
  return {
    disk: { requestAlignment: traitsOf(format).requestAlignment, ...own, ...common },
    file: {
      requestAlignment,
      ...device,
      ...(zeroesAlignment !== undefined && { writeZeroesAlignment: zeroesAlignment }),
      ...common,
    },
  }
}

function backingInfo(backing: NativeNamedFile, { filename, protocol }: NativeLayerInfo): Partial<ImageInfo> {
  // An export has a name, and no folder: a relative name is that of nothing.
  const exported = protocol === 'nbd'
  const name = readFileName(backing.filename, exported || filename === '' ? undefined : filename)
  const nowhere = exported && 'refused' in name && 'path' in readFileName(backing.filename, '')
  return {
    ...shown('backingFilename', backing.filename),
    ...(!nowhere && shown('fullBackingFilename', 'path' in name ? name.path : backing.filename)),
    ...(backing.format !== undefined && { backingFilenameFormat: shownText(backing.format) }),
  }
}

function specificInfo(qcow2: NativeQcow2Info, encryption: NativeLayerInfo['encryption']): Qcow2SpecificInfo {
  const { extendedL2, lazyRefcounts, corrupt, hasDataFile, dataFile, dataFileRaw, bitmaps } = qcow2
  return {
    type: 'qcow2',
    compat: qcow2.version === 2 ? '0.10' : '1.1',
    refcountBits: qcow2.refcountBits,
    compressionType: qcow2.compressionType,
    ...(qcow2.version > 2 && { extendedL2, lazyRefcounts, corrupt }),
    ...(hasDataFile && { dataFileRaw }),
    ...(dataFile !== undefined && shown('dataFile', dataFile)),
    ...(encryption !== undefined && { encrypt: encryptInfo(encryption, qcow2) }),
    ...(bitmaps.length > 0 && {
      bitmaps: bitmaps.map(({ name, ...bitmap }) => ({ ...shown('name', name), ...bitmap })),
    }),
  }
}

function encryptInfo(format: 'aes' | 'luks', { luks, luksDamage }: NativeQcow2Info): EncryptInfo {
  if (format === 'aes') return { format }
  // One of the two is there.
  if (luks === undefined) return { format, damaged: toError(luksDamage) as Qcow2Error }
  return { format, ...luks, uuid: shownText(luks.uuid) }
}
