/** The shape of new images, and how they are compressed: what everything that makes one has in common. */

import { readDataFileName } from './backing/filename.js'
import { invalidArgument } from './errors.js'
import {
  can,
  creationOf,
  type Format,
  type FormatOption,
  isCompressed,
  quoted,
  type ShapeOption,
  type TargetFormat,
} from './formats/table.js'
import type { NativeCloneOrder, NativeShape } from './native.js'
import { flag, integer, oneOf, type Read, type Reader, readOptions, storedName, text } from './options.js'
import { type Encrypt, encrypt } from './secret.js'
import { format, toTargetFormat } from './source.js'
import { fileStat } from './support/files.js'
import { type Name, toName } from './text.js'
import { describe } from './units.js'

/**
 * How much of a new image is allocated at once: nothing, its tables (`'metadata'`, qcow2 only), its space too, or its space
 * written with zeroes.
 */
export type Preallocation = 'off' | 'metadata' | 'falloc' | 'full'

/** The shape of a qcow2 image: what `create`, `convert` and `measure` have in common. Defaults are what most readers can read. */
export interface Qcow2Shape {
  /** Format version: 3 by default. Spec: "Header", `version`. */
  version?: 2 | 3 | undefined
  /** Bytes, a power of two of 512 to 2097152. Default 65536. */
  clusterSize?: number | undefined
  /** Subclusters: needs version 3 and clusters of 16 KiB or more. Spec: "Extended L2 Entries". */
  extendedL2?: boolean | undefined
  /** How clusters are compressed when they are. Default `'zlib'`; `'zstd'` needs version 3. */
  compressionType?: 'zlib' | 'zstd' | undefined
  /** What has its place in the file from the start. Default `'off'`. */
  preallocation?: Preallocation | undefined
  /** Width of a refcount. Default 16; others need version 3. */
  refcountBits?: 1 | 2 | 4 | 8 | 16 | 32 | 64 | undefined
  /** Refcount updates may be postponed; needs version 3. */
  lazyRefcounts?: boolean | undefined
  /** Recorded as it is written here: a relative name starts from the directory of the new image. Needs `backingFormat`. */
  backingFile?: Name | undefined
  /** Format of the backing file, which the image names with it. */
  backingFormat?: Format | undefined
  /**
   * Keep the guest's data in this file, which is created too. Recorded as it is written here: a relative name starts from the working
   * directory of the process that opens the image. Needs version 3.
   */
  dataFile?: Name | undefined
  /** The data file is to be a valid raw image by itself. */
  dataFileRaw?: boolean | undefined
  /**
   * The data file is there already and is not overwritten: its bytes are the new disk's, and it only grows where it is shorter. A conversion
   * writes its disk over them, in place, so that a failure leaves a part of it there. Needs `dataFileRaw` or `preallocation: 'metadata'`, so
   * that all of it is mapped. Default false.
   */
  keepDataFile?: boolean | undefined
  /**
   * Encrypt the guest's data. Compressed clusters cannot be; a raw data file cannot be either. Default: not. An image of format `'luks'` has
   * this option and `preallocation` alone, and is not made without it.
   */
  encrypt?: Encrypt | undefined
}

/** The shape of a raw image: its file is the disk. */
export interface RawShape {
  /** What has its place in the file from the start. Default `'off'`. */
  preallocation?: Exclude<Preallocation, 'metadata'> | undefined
}

/**
 * The shape of a qcow image, version 1 of the format. It is written once: empty, or by {@link convert}, which can compress it. Clusters have 4 KiB,
 * and 512 bytes with a backing file, as QEMU makes them.
 */
export interface QcowShape {
  /** Recorded as it is written here: a relative name starts from the directory of the new image. Needs `backingFormat`. */
  backingFile?: Name | undefined
  /** The format of the backing file now. The image does not store it: whoever opens it looks at the file's first bytes. */
  backingFormat?: Format | undefined
}

/** The shape of a LUKS file, of version 1. */
export interface LuksShape {
  /** What has its place in the file from the start. Default `'off'`. */
  preallocation?: Preallocation | undefined
  /** A LUKS file is not made without it. */
  encrypt: Encrypt
}

/** The shape of a VirtualBox disk image. */
export interface VdiShape {
  /** What VirtualBox takes: a dynamic image, as without it. The other options are stronger. */
  preset?: 'virtualbox' | undefined
  /** All blocks have their place from the start. Default false. */
  static?: boolean | undefined
  /**
   * Backing file: a `vdi` image, of which the new one is a child of the same size. The format stores no name, only the UUID: who opens the
   * child says by a function as {@link OpenOptions.references} which file has it; its `filename` is `uuid:` and the UUID.
   */
  backingFile?: Name | undefined
  /** That of the image itself: no other can be below it. */
  backingFormat?: 'vdi' | undefined
  /** Anything but `'off'` makes the image static. */
  preallocation?: Preallocation | undefined
}

/** The shape of a VHD. */
export interface VpcShape {
  /** Default `'dynamic'`: blocks have a place when they are written to. `'fixed'`: the file is the disk, and a footer. */
  subformat?: 'dynamic' | 'fixed' | undefined
  /**
   * The disk has exactly the size that is asked for, as Hyper-V and Azure have it. Default false: it is as large as the next geometry of
   * cylinders, heads and sectors, as Virtual PC and `qemu-img` have it.
   */
  forceSize?: boolean | undefined
  /** Anything but `'off'` gives every block of a dynamic one its place. */
  preallocation?: Preallocation | undefined
  /**
   * What a product takes: `'azure'` is fixed, of whole MiB, 20 MiB to 32 TiB (`qemu-img` reads 2040 GiB at most); `'xenserver'` is dynamic, of
   * whole blocks of 2 MiB. Both have the size that they say. The other options are stronger.
   */
  preset?: 'azure' | 'xenserver' | undefined
  /**
   * Backing file, as the image names it: relative to its own directory. It is a `vpc` image, the new one is a differencing disk of the same
   * size. Products know it by its UUID and the time of its last change. `qemu-img` reads such an image without its parent, which is wrong.
   */
  backingFile?: Name | undefined
  /** That of the image itself: no other can be below it. */
  backingFormat?: 'vpc' | undefined
}

/** The shape of a Parallels image, an expanding one. */
export interface ParallelsShape {
  /** There is none. */
  preallocation?: 'off' | undefined
  /** Bytes, a multiple of 512 up to 2097152. Default 1048576. */
  clusterSize?: number | undefined
}

/** The shape of a VHDX image. */
export interface VhdxShape {
  /** There is none. */
  preallocation?: 'off' | undefined
  /** What a product takes: `'hyper-v'` is dynamic, with blocks of 32 MiB. The other options are stronger. */
  preset?: 'hyper-v' | undefined
  /** Bytes of a sector as the guest sees it. Default 512. QEMU reads no other. */
  logicalSectorSize?: 512 | 4096 | undefined
  /** `'dynamic'` takes blocks as they are written to, `'fixed'` has all of them from the start. Default `'dynamic'`. */
  subformat?: 'dynamic' | 'fixed' | undefined
  /** Bytes, a power of two of 1 MiB to 256 MiB. Default 8 MiB, and more for disks of more than 1 GiB, as `qemu-img` chooses. */
  blockSize?: number | undefined
  /** Bytes of the log, a multiple of 1 MiB. Default 1 MiB. */
  logSize?: number | undefined
  /** Blocks that were never written to are zero, and not just absent. Default true, as for `qemu-img`; not with a backing file. */
  blockStateZero?: boolean | undefined
  /**
   * Backing file, as the image names it: relative to its own directory. It is a `vhdx` image, of which the new one is a child of the same
   * size, with blocks of 2 MiB unless `blockSize` says otherwise. It knows it by its DataWriteGuid. QEMU reads no such image.
   */
  backingFile?: Name | undefined
  /** That of the image itself: no other can be below it. */
  backingFormat?: 'vhdx' | undefined
}

/** The shape of a VMDK image. */
export interface VmdkShape {
  /**
   * What a product takes: `'esxi'`, and `'ovf'` for packages (`.ova`), is streamOptimized, for hardware version 10 with an LSI Logic
   * controller. The other options are stronger.
   */
  preset?: 'esxi' | 'ovf' | undefined
  /**
   * One file that grows (`'monolithicSparse'`, the default) or is written once, compressed (`'streamOptimized'`); or a descriptor with files
   * beside it, named after it: one that is the disk (`'monolithicFlat'`), or some of 2 GiB each.
   */
  subformat?:
    | 'monolithicSparse'
    | 'monolithicFlat'
    | 'twoGbMaxExtentSparse'
    | 'twoGbMaxExtentFlat'
    | 'streamOptimized'
    | undefined
  /** Controller that the guest sees. Default `'ide'`. */
  adapterType?: 'ide' | 'buslogic' | 'lsilogic' | 'legacyESX' | undefined
  /** Version of the virtual hardware. Default `'4'`. */
  hardwareVersion?: string | undefined
  /** Version of VMware's tools for the guest. Default: managed by the guest. */
  toolsVersion?: string | undefined
  /** Version 6 of the virtual hardware. Default false. */
  compat6?: boolean | undefined
  /** Zeroes have entries of their own in the tables: for images with a backing file. Default false. */
  zeroedGrain?: boolean | undefined
  /** Backing file, as the image names it: relative to its own directory. It is a `vmdk` image. */
  backingFile?: Name | undefined
  /** That of the image itself: no other can be below it. */
  backingFormat?: 'vmdk' | undefined
}

/** The shape of a new image of each format. */
export interface Shapes {
  /** Of qcow2 images. */
  qcow2: Qcow2Shape
  /** Of raw files. */
  raw: RawShape
  /** Of qcow version 1 images. */
  qcow: QcowShape
  /** Of LUKS images. */
  luks: LuksShape
  /** Of VDI images. */
  vdi: VdiShape
  /** Of VHD images. */
  vpc: VpcShape
  /** Of Parallels images. */
  parallels: ParallelsShape
  /** Of VHDX images. */
  vhdx: VhdxShape
  /** Of VMDK images. */
  vmdk: VmdkShape
}

/** The shape of a new image; which options it has depends on the format. */
export type Shape = Shapes[TargetFormat]

/** The shape of an image whose format is not known here, as options are collected. */
export interface AnyShape extends Qcow2Shape, Partial<Record<FormatOption, string | number | boolean | undefined>> {}

/** The table entries of those options that a format reads by itself. */
const FORMAT_OPTIONS = {
  preset: text,
  subformat: text,
  static: flag,
  forceSize: flag,
  blockSize: integer(0, 2 ** 32),
  logSize: integer(0, 2 ** 32),
  blockStateZero: flag,
  logicalSectorSize: oneOf(512, 4096),
  adapterType: text,
  hardwareVersion: text,
  toolsVersion: text,
  compat6: flag,
  zeroedGrain: flag,
} as const satisfies Readonly<Record<FormatOption, Reader<string | number | boolean>>>

/** The table entries of {@link Shape}. */
export const SHAPE = {
  ...FORMAT_OPTIONS,
  version: oneOf(2, 3),
  clusterSize: integer(512, 2 ** 21),
  extendedL2: flag,
  compressionType: oneOf('zlib', 'zstd'),
  preallocation: oneOf('off', 'metadata', 'falloc', 'full'),
  refcountBits: oneOf(1, 2, 4, 8, 16, 32, 64),
  lazyRefcounts: flag,
  backingFile: storedName,
  backingFormat: format,
  dataFile: storedName,
  dataFileRaw: flag,
  keepDataFile: flag,
  encrypt,
} as const satisfies Readonly<Record<ShapeOption, Reader<unknown>>>

/** {@link Shape}, checked. */
export type ReadShape = Omit<NativeShape, 'format' | 'options'> & Partial<Read<typeof FORMAT_OPTIONS>>

/** Reads a {@link Shape} that is an option of its own. */
export const shape: Reader<ReadShape> = (value, name) => readOptions(value, name, SHAPE)

/** Checks what the options of a shape demand of each other; the rules of the format are the engine's. `exists`: nothing is made. */
export function toNativeShape(owner: string, format: TargetFormat, read: ReadShape, exists = false): NativeShape {
  const { backingFile, backingFormat, dataFile, dataFileRaw, keepDataFile } = read
  const own = creationOf(format).shape
  const foreign = Object.entries(read).find(
    ([name, value]) => value !== undefined && !own.some(option => option === name),
  )
  if (foreign !== undefined) throw invalidArgument(foreign[0], `${owner}: a ${format} image has no ${foreign[0]}`)
  const { needs, subformats = [], presets = [], backingFormat: ofBacking } = creationOf(format)
  for (const [name, known] of [
    ['subformat', subformats],
    ['preset', presets],
  ] as const) {
    const given = read[name]
    if (given !== undefined && !known.includes(given)) {
      throw invalidArgument(name, `${owner}: the ${name} of a ${format} image is ${quoted(known)}, not '${given}'`)
    }
  }
  if (ofBacking !== undefined && read.backingFormat !== undefined && read.backingFormat !== ofBacking) {
    const message = `${owner}: the backing file of a ${format} image is a ${ofBacking} image, not ${read.backingFormat}`
    throw invalidArgument('backingFormat', message)
  }
  if (!exists && needs !== undefined && read[needs] === undefined) {
    throw invalidArgument(needs, `${owner}: a ${format} image needs the option ${needs}`)
  }
  if (backingFile !== undefined && backingFormat === undefined) {
    const message = `${owner}: backingFile needs backingFormat: guessing it is not safe`
    throw invalidArgument('backingFormat', message)
  }
  if (backingFile === undefined && backingFormat !== undefined) {
    throw invalidArgument('backingFormat', `${owner}: backingFormat needs backingFile`)
  }
  if (dataFileRaw && dataFile === undefined) {
    throw invalidArgument('dataFileRaw', `${owner}: dataFileRaw needs dataFile`)
  }
  if (keepDataFile && dataFile === undefined) {
    throw invalidArgument('keepDataFile', `${owner}: keepDataFile needs dataFile`)
  }
  const given = Object.entries(read).filter(([, value]) => value !== undefined)
  const of = (wanted: boolean) => Object.fromEntries(given.filter(([name]) => isFormatOption(name) === wanted))
  const options = of(true) as NonNullable<NativeShape['options']>
  return {
    ...(of(false) as Omit<NativeShape, 'format' | 'options'>),
    format,
    ...(dataFile !== undefined && { dataPath: dataPathOf(owner, dataFile) }),
    ...(Object.keys(options).length > 0 && { options }),
  }
}

/** The shape with what it stores of its backing file, where the format is one that knows that again. */
export async function withParent(
  owner: string,
  shape: NativeShape,
  backing: { readonly contentId?: string | undefined; readonly absolutePath?: string | undefined } | undefined,
): Promise<NativeShape> {
  const format = toTargetFormat(owner, shape.format as TargetFormat)
  const { backingFormat, datesBacking } = creationOf(format)
  if (shape.backingFile === undefined || backingFormat === undefined) return shape
  const parentId = backing?.contentId
  if (parentId === undefined) {
    const message = `${owner}: a ${format} image stores what its backing file is: it must be opened for that`
    throw invalidArgument('backingFile', message)
  }
  const path = datesBacking ? backing?.absolutePath : undefined
  // One that is no file of this system has no time.
  const found = path === undefined ? undefined : await fileStat(toName(path)).catch(() => undefined)
  const parentChanged = found && { parentChanged: Math.max(0, Math.floor(found.mtimeMs / 1000)) }
  return { ...shape, options: { ...shape.options, parentId, ...parentChanged } }
}

const isFormatOption = (name: string): boolean => Object.hasOwn(FORMAT_OPTIONS, name)

/** The file that the name of a data file means to those who will open the image. */
function dataPathOf(owner: string, dataFile: string): string {
  const name = readDataFileName(dataFile)
  if ('path' in name) return name.path
  throw invalidArgument('dataFile', `${owner}: the data file '${dataFile}' cannot be made: ${name.refused}`)
}

/** How to compress. */
export interface Compression {
  /** Default: the compression type of `create`, which is zlib unless it says otherwise. */
  type?: 'zlib' | 'zstd' | undefined
  /** zlib 1 to 12, zstd 1 to 22. The default is made for speed, with files no larger than `qemu-img`'s. */
  level?: number | undefined
  /**
   * How far back a zlib stream may refer: `'full'`, deflate's 32 KiB, which QEMU and every reader that inflates a cluster at once
   * accept; or `'small'`, the 4 KiB that QEMU writes, for readers that stream with a window of that size. Default `'full'`.
   */
  window?: 'full' | 'small' | undefined
}

/** Levels by codec; which codec it is may be said elsewhere. */
const MAX_LEVEL = { zlib: 12, zstd: 22 } as const

const wholeNumber: Reader<number> = (value, name) => {
  if (typeof value === 'number' && Number.isInteger(value)) return value
  throw invalidArgument(
    name,
    `${name} must be a whole number: zlib has 1 to ${MAX_LEVEL.zlib}, zstd 1 to ${MAX_LEVEL.zstd}, not ${describe(value)}`,
  )
}

function checkLevel(owner: string, level: number, named: string): void {
  const type = named === 'zstd' ? 'zstd' : 'zlib'
  if (level >= 1 && level <= MAX_LEVEL[type]) return
  const other = type === 'zlib' ? 'zstd' : 'zlib'
  throw invalidArgument(
    'level',
    `${owner}: compress.level must be 1 to ${MAX_LEVEL[type]} for ${type}, not ${level} (${other} has 1 to ${MAX_LEVEL[other]})`,
  )
}

const COMPRESSION = {
  type: SHAPE.compressionType,
  level: wholeNumber,
  window: oneOf('full', 'small'),
} as const

/** Reads `true`, `false` or a {@link Compression}. */
export const compression: Reader<Read<typeof COMPRESSION> | undefined> = (value, name) => {
  if (value === false) return undefined
  if (typeof value !== 'object') {
    if (value === true) return readOptions({}, name, COMPRESSION)
    throw invalidArgument(name, `${name} must be true, false or { type, level, window }, not ${describe(value)}`)
  }
  return readOptions(value, name, COMPRESSION)
}

/** How a new image is made, and what is written to it. */
export type Target = Pick<NativeCloneOrder, 'shape' | 'compress' | 'level' | 'smallWindow'>

/** Checks what format, shape and compression of an image demand of each other, which is made unless it `exists`. */
export function toTarget(
  owner: string,
  to: TargetFormat | undefined,
  create: ReadShape | undefined,
  compress: Read<typeof COMPRESSION> | undefined,
  exists = false,
): Target {
  const made = toTargetFormat(owner, to)
  if (compress && !(exists ? can(made, 'compress') : isCompressed(made))) {
    throw invalidArgument('compress', `${owner}: a ${made} image cannot be compressed`)
  }
  const type = compress?.type
  if (type !== undefined && create?.compressionType !== undefined && type !== create.compressionType) {
    const message = `${owner}: compress.type '${type}' contradicts create.compressionType '${create.compressionType}'`
    throw invalidArgument('compress', message)
  }
  if (compress?.level !== undefined) checkLevel(owner, compress.level, type ?? create?.compressionType ?? 'zlib')
  return {
    shape: toNativeShape(owner, made, { ...create, ...(type !== undefined && { compressionType: type }) }, exists),
    compress: compress !== undefined,
    level: compress?.level,
    smallWindow: compress?.window === 'small',
  }
}
