/** Inspection of untrusted images: looks at the header, opens nothing else, promises nothing. */

import { type ApplianceDisk, applianceIn, type OvfDisk, readDescriptor } from './backing/appliance.js'
import { prefixBytes, withFileBytes } from './backing/file-bytes.js'
import { Qcow2Error } from './errors.js'
import { ArchiveLimit, isOva, isOvf } from './formats/ova.js'
import { describeKnown, detectFormat } from './formats/probe.js'
import type { FileBytes } from './formats/sizes.js'
import { DEFAULT_FORMAT, type Format, isFormat, isStream } from './formats/table.js'
import type { NativeInspection, NativeLimits } from './native.js'
import {
  ABORTABLE,
  type Abortable,
  flag,
  type Limits,
  limits,
  type ReadLimits,
  readOptions,
  throwIfAborted,
} from './options.js'
import { type ImageSource, isRemote, type Located, openFile, release, toLocated } from './source.js'
import { toBytesView } from './support/buffers.js'
import { request } from './support/requests.js'
import { shown, shownText } from './text.js'
import type { BigIntResults } from './units.js'

/** Options of {@link inspect}. */
export interface InspectOptions extends Abortable {
  /** What the image may claim before it is refused. */
  limits?: Limits | undefined
}

/**
 * Why an image is not safe to open, or not as it should be. `'LIMIT'`: beyond one of the caller's `limits`, or those of the format.
 * `'VIRTUAL_SIZE'`: within them, but larger than 16 TiB and than a thousand times its file, so that reading the disk takes very long, and
 * a copy that is not sparse fits nowhere.
 */
export type FindingCode =
  | 'BACKING_FILE'
  | 'DATA_FILE'
  | 'UNKNOWN_FEATURE'
  | 'CORRUPT_BIT'
  | 'DIRTY_BIT'
  | 'HEADER_INVALID'
  | 'TABLE_OUT_OF_BOUNDS'
  | 'LIMIT'
  | 'VIRTUAL_SIZE'

/** One finding of {@link inspect}. */
export interface Finding {
  /** What it is: part of the API. */
  readonly code: FindingCode
  /** One sentence for a person. */
  readonly message: string
}

/** What the first bytes of a file say. Spec: "Header", "Header extensions". */
export interface Inspection<N extends number | bigint = number> {
  /** The images in an appliance, which `detected` calls `'ova'`. Each can be opened as it is: the option `file` and these two. */
  readonly disks?: readonly ApplianceDisk[]
  /** The disks that the OVF descriptor of an appliance lists; or, detected as `'ovf'`, the descriptor that the file is. */
  readonly descriptor?: readonly OvfDisk<N>[]
  /** The name of the manifest (`.mf`) of an appliance, if it has one: `verifyManifest` compares its digests. */
  readonly manifest?: string
  /** By its magic, where that is one of a format that is opened; `'unknown'` otherwise: raw is never guessed. */
  readonly format: Format | 'unknown'
  /**
   * Another format that the file has the structures of (`'qed'`), if any: at its start, or (`'vpc'`, `'dmg'`) at its end; or how the file
   * is compressed (`'gzip'`, `'xz'`, `'zstd'`), which only `convert` reads.
   */
  readonly detected?: string
  /**
   * Bytes, also of a detected format; 0 where the header does not say, as of gzip, and, with a finding `'LIMIT'`, where it says more than 2^53 - 1 and
   * no bigints were asked for.
   */
  readonly virtualSize: N
  /** Bytes; absent for formats without clusters. */
  readonly clusterSize?: number
  /** Of qcow2. */
  readonly version?: 2 | 3
  /** The backing file, as the image names it. It was not looked at. */
  readonly backingFilename?: string
  /** The bytes of `backingFilename`, where they are not UTF-8: it then has replacement characters. */
  readonly backingFilenameBytes?: Buffer
  /** Its format, where the image says it. */
  readonly backingFilenameFormat?: string
  /** The external data file, as the image names it. */
  readonly dataFile?: string
  /** The bytes of `dataFile`, where they are not UTF-8. */
  readonly dataFileBytes?: Buffer
  /** How guest data is encrypted, if it is. */
  readonly encryption?: 'aes' | 'luks'
  /** How clusters are compressed where they are, of qcow2. */
  readonly compressionType?: 'zlib' | 'zstd'
  /** Whether clusters have subclusters, of qcow2. */
  readonly extendedL2?: boolean
  /** What the header says is used, by the names of the specification. */
  readonly features: {
    /** Features that a reader must know. */
    readonly incompatible: readonly string[]
    /** Features that a reader need not know. */
    readonly compatible: readonly string[]
    /** Features that whoever writes without knowing them ends. */
    readonly autoclear: readonly string[]
    /** Bit numbers of incompatible features without a known meaning. */
    readonly unknownIncompatible: readonly number[]
  }
  /**
   * A valid header without any finding: opening it with the same `limits` reads this file and no other, and its disk is of a size
   * that its file makes likely; no key slot asks for more work than this library does. Says nothing about what is behind the header (`check` does), nor about what the disk holds.
   */
  readonly safe: boolean
  /** What speaks against it. */
  readonly findings: readonly Finding[]
}

/** No header is longer than one cluster. */
const LARGEST_CLUSTER = 2 ** 21

const INSPECT = { ...ABORTABLE, limits, bigint: flag } as const

/**
 * Says what an untrusted image claims, without opening anything that it names: from a file (its first cluster is read, and its
 * LUKS header), or from the first bytes of one. 512 bytes are enough for most images without a backing file, 4096 for nearly all, its first cluster (2 MiB
 * at most) for every image; where the header goes beyond the bytes, that is a finding. A LUKS
 * header is judged where it is among the bytes. What is wrong with the image is a finding, never
 * an error.
 *
 * A file name is a `string`, `URL` or `FileHandle` here: a `Buffer` is bytes of an image.
 *
 * @throws {@link Qcow2Error} the system's code where the file cannot be read
 *
 * @example
 * ```js
 * import { inspect } from 'qcow2'
 *
 * const { format, virtualSize, safe, findings } = await inspect('upload.qcow2', { limits: { maxVirtualSize: 2 ** 40 } })
 * if (!safe) console.log(findings.map(({ code, message }) => `${code}: ${message}`).join('\n'))
 * ```
 */
export function inspect(
  source: Exclude<ImageSource, Buffer> | Uint8Array,
  options: InspectOptions & { bigint: true },
): Promise<Inspection<bigint>>
export function inspect(
  source: Exclude<ImageSource, Buffer> | Uint8Array,
  options?: InspectOptions & BigIntResults,
): Promise<Inspection>
export async function inspect(
  source: Exclude<ImageSource, Buffer> | Uint8Array,
  options?: InspectOptions & BigIntResults,
): Promise<Inspection<number | bigint>> {
  const located = source instanceof Uint8Array ? toBytesView(source, 'inspect: source') : toLocated(source, 'source')
  const { signal, limits: given, bigint = false } = readOptions(options, 'inspect', INSPECT)
  throwIfAborted(signal)
  const bounds = bigint ? given : withinNumbers(given)
  const found = await (located instanceof Uint8Array
    ? inspectBytes(located, bounds)
    : inspectLocated(located, bounds, signal))
  throwIfAborted(signal)
  return sized(found, bigint)
}

/** What the first bytes of an image say: as {@link inspect}. */
export async function inspectPrefix(
  bytes: Uint8Array,
  given: ReadLimits | undefined,
  big: boolean,
): Promise<Inspection<number | bigint>> {
  return sized(await inspectBytes(bytes, big ? given : withinNumbers(given)), big)
}

/** With sizes as the caller wants them. */
function sized(found: Inspection<number | bigint>, bigint: boolean): Inspection<number | bigint> {
  const { virtualSize } = found
  const descriptor = found.descriptor && { descriptor: found.descriptor.map(disk => ovfDiskIn(disk, bigint)) }
  if (bigint) return { ...found, ...descriptor, virtualSize: BigInt(virtualSize) }
  return { ...found, ...descriptor, virtualSize: virtualSize <= Number.MAX_SAFE_INTEGER ? Number(virtualSize) : 0 }
}

/** Sizes of a descriptor as the caller wants them; one that no number has is left out. */
function ovfDiskIn(disk: OvfDisk<number | bigint>, big: boolean): OvfDisk<number | bigint> {
  const { fileSize, capacity, populatedSize, ...rest } = disk
  const sizes = Object.entries({ fileSize, capacity, populatedSize }).flatMap(([name, size]) => {
    if (size === undefined || (!big && size > Number.MAX_SAFE_INTEGER)) return []
    return [[name, big ? BigInt(size) : Number(size)] as const]
  })
  return { ...rest, ...Object.fromEntries(sizes) }
}

/** Where sizes are numbers, one that cannot be is a finding. */
const withinNumbers = (given: ReadLimits | undefined): NativeLimits => ({
  ...given,
  maxVirtualSize: Math.min(given?.maxVirtualSize ?? Number.MAX_SAFE_INTEGER, Number.MAX_SAFE_INTEGER),
})

async function inspectBytes(view: Uint8Array, bounds: NativeLimits | undefined): Promise<Inspection<number | bigint>> {
  const bytes = Buffer.from(view.buffer, view.byteOffset, Math.min(view.byteLength, LARGEST_CLUSTER))
  const format = formatOf(detectFormat(bytes))
  const found = await request<NativeInspection>((number, addon) =>
    addon.inspectPrefix(number, bytes, format ?? DEFAULT_FORMAT, bounds),
  )
  return toInspection(format, found, found.header === undefined ? prefixBytes(bytes) : undefined)
}

async function inspectLocated(
  located: Located,
  bounds: NativeLimits | undefined,
  signal: AbortSignal | undefined,
): Promise<Inspection<number | bigint>> {
  const { file, head, path } = await openFile(located.header ?? located, {}, signal)
  try {
    const detected = detectFormat(head)
    if (isStream(detected)) {
      const said = await request<NativeInspection>((number, addon) =>
        addon.inspectStream(number, file, detected, bounds),
      )
      return { ...(await toInspection(undefined, said)), detected }
    }
    const format = formatOf(detected)
    // Bytes without the magic of a format are judged as the commonest one's.
    const found = await request<NativeInspection>((number, addon) =>
      addon.inspectFile(number, file, format ?? DEFAULT_FORMAT, bounds),
    )
    if (found.header !== undefined) return await toInspection(format, found)
    if (isRemote(located)) return await toInspection(format, found, prefixBytes(head))
    // What is read is the file of a folder, where that was named.
    const whole = 'path' in located && path !== undefined ? { ...located, path } : located
    return await withFileBytes(whole, async bytes => {
      const inspection = await toInspection(format, found, bytes)
      if (isOva(head)) return { ...inspection, ...(await appliance(bytes, inspection.findings)) }
      return isOvf(head) ? { ...inspection, ...(await bareDescriptor(bytes, inspection.findings)) } : inspection
    })
  } finally {
    await release(file)
  }
}

/** What is said of what is no image. */
type Described = Pick<Inspection<number | bigint>, 'detected' | 'disks' | 'descriptor' | 'manifest' | 'findings'>

/** What is said of an appliance beside that it is no image. */
async function appliance(bytes: FileBytes, findings: readonly Finding[]): Promise<Described> {
  try {
    const { disks, descriptor, manifest, damage } = await applianceIn(bytes)
    const has = manifest === undefined ? {} : { manifest }
    return { detected: 'ova', disks, descriptor, ...has, findings: damage ? [...findings, damageOf(damage)] : findings }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error
    return { detected: 'ova', findings: [...findings, damageOf(error)] }
  }
}

/** What is said of a descriptor by itself. */
async function bareDescriptor(bytes: FileBytes, findings: readonly Finding[]): Promise<Described> {
  try {
    return { detected: 'ovf', descriptor: await readDescriptor(bytes), findings }
  } catch (error) {
    if (!(error instanceof Qcow2Error)) throw error
    return { detected: 'ovf', findings: [...findings, damageOf(error)] }
  }
}

/** What reading it met: a limit, or damage. */
function damageOf(error: Error): Finding {
  const limit = error instanceof ArchiveLimit || (error instanceof Qcow2Error && error.code === 'ERR_QCOW2_LIMIT')
  return { code: limit ? 'LIMIT' : 'HEADER_INVALID', message: error.message }
}

/** What was detected, where it is a format that is opened. */
const formatOf = (detected: string | undefined): Format | undefined => (isFormat(detected) ? detected : undefined)

async function toInspection(
  format: Format | undefined,
  { header, ...found }: NativeInspection,
  file?: FileBytes,
): Promise<Inspection<number | bigint>> {
  const known = file && (await describeKnown(file))
  const backingFilename = header?.backingFilename ?? found.backingFilename
  return {
    format: format ?? 'unknown',
    ...(known !== undefined && { detected: known.format }),
    virtualSize: header?.virtualSize ?? known?.virtualSize ?? 0,
    ...(backingFilename !== undefined && shown('backingFilename', backingFilename)),
    ...(header && {
      ...(header.clusterSize !== undefined && { clusterSize: header.clusterSize }),
      ...(header.version !== undefined && { version: header.version }),
      ...(header.compressionType !== undefined && { compressionType: header.compressionType }),
      ...(header.extendedL2 !== undefined && { extendedL2: header.extendedL2 }),
      ...(header.backingFormat !== undefined && { backingFilenameFormat: shownText(header.backingFormat) }),
      ...(header.dataFile !== undefined && shown('dataFile', header.dataFile)),
      ...(header.encryption !== undefined && { encryption: header.encryption }),
    }),
    features: {
      incompatible: header?.incompatible ?? [],
      compatible: header?.compatible ?? [],
      autoclear: header?.autoclear ?? [],
      unknownIncompatible: found.unknownIncompatible,
    },
    safe: found.findings.length === 0,
    findings: found.findings as Inspection['findings'],
  }
}
