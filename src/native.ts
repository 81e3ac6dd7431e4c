/**
 * The addon: found, loaded, and typed. The one module that loads it.
 *
 * Looked for in this order: the file that `NAPI_RS_NATIVE_LIBRARY_PATH` names, the local build beside the compiled
 * library, the platform's own package (`qcow2-linux-x64-gnu` and so on), which npm installs as an optional dependency.
 */

import { join } from 'node:path'
import { Qcow2Error } from './errors.js'
import type { Plan } from './snapshot/types.js'

/** An error as the addon hands it over. */
export interface NativeFailure {
  readonly code: string
  readonly message: string
  readonly path?: string
  readonly offset?: number
  readonly field?: string
  /** Positive. */
  readonly errno?: number
  readonly syscall?: string
  readonly transient: boolean
  /** What caused it, and what caused that. */
  readonly causes: readonly string[]
}

/** A file that an image names. */
export interface NativeNamedFile {
  readonly filename: string
  readonly format?: string
}

export interface NativeFile {
  readonly file: number
  readonly path?: string
  readonly absolutePath?: string
  readonly length: number
  /** Equal strings are the same file. */
  readonly identity?: string
  /** The first bytes, 1024 at most. */
  readonly head: Buffer
}

/** How to reach an NBD server, in milliseconds. */
export interface NativeNbdConnect {
  readonly writable?: boolean | undefined
  readonly connectTime?: number | undefined
  readonly silenceTime?: number | undefined
  readonly reconnectTime?: number | undefined
  /** Number of what encrypts the connection. */
  readonly tls?: number | undefined
}

/** An export that a server tells of. */
export interface NativeListedExport {
  readonly name: string
  readonly description: string
  readonly size?: number
  /** Transmission flags of the protocol. */
  readonly flags?: number
  /** Least, best and largest, in bytes. */
  readonly blockSizes?: readonly number[]
  readonly contexts: readonly string[]
  readonly extendedHeaders: boolean
}

export interface NativeLayer {
  readonly layer: number
  readonly virtualSize: number
  readonly clusterSize?: number
  readonly encryption?: 'aes' | 'luks'
  readonly backing?: NativeNamedFile
  readonly dataFile?: NativeNamedFile
  /** The files that its disk is made of beside its own. */
  readonly extents: readonly { readonly filename: string; readonly writable: boolean }[]
  /** What an image that is made on it stores to know it again. */
  readonly contentId?: string
}

/** A compressed file as a layer. */
export interface NativeStream {
  readonly layer: number
  readonly virtualSize: number
  /** The first bytes of its disk, 1024 at most. */
  readonly head: Buffer
}

/** A disk that an OVF descriptor lists. */
export interface NativeOvfDisk {
  readonly id: string
  readonly href?: string
  readonly fileSize?: number | bigint
  readonly compression?: string
  readonly capacity?: number | bigint
  readonly format?: string
  readonly populatedSize?: number | bigint
  readonly parent?: string
}

/** Limits; what is absent has the engine's default. */
export interface NativeLimits {
  maxVirtualSize?: number | undefined
  maxMetadataBytes?: number | undefined
  maxSnapshots?: number | undefined
  maxBitmaps?: number | undefined
  maxMemory?: number | undefined
}

/** How to open a file. */
export interface NativeFileOptions {
  readonly writable?: boolean | undefined
  readonly cache?: string | undefined
  /** The part of the file that is meant: it is only read. */
  readonly offset?: number | undefined
  readonly length?: number | undefined
}

/** How to lock a file. */
export interface NativeLock {
  readonly locking: 'auto' | 'on'
  readonly forceShare?: boolean | undefined
  readonly writable?: boolean | undefined
}

/** How to write to an image; what is absent has the engine's default. */
export interface NativeWriting {
  readonly cache?: string | undefined
  readonly discard?: string | undefined
  readonly detectZeroes?: string | undefined
  readonly lazyRefcounts?: boolean | undefined
  readonly firstFit?: boolean | undefined
}

export interface NativeLayerOptions {
  /** Not locked without it. */
  lock?: NativeLock | undefined
  snapshot?: string | undefined
  l2CacheSize?: number | undefined
  /** Open an image whose active L1 table is not whole. */
  salvage?: boolean | undefined
  limits?: NativeLimits | undefined
  /** Number of the file with the header, where that is another one. */
  header?: number | undefined
}

/** Seven numbers for each extent: see `crates/node/src/map.rs`. */
export interface NativeExtents {
  readonly numbers: Float64Array
  readonly files: readonly string[]
}

export interface NativeLayerInfo {
  readonly filename: string
  readonly format: string
  readonly virtualSize: number
  readonly actualSize?: number
  readonly fileLength: number | bigint
  readonly limits: {
    readonly requestAlignment: number
    readonly memoryAlignment: number
    readonly pageSize: number
    readonly maxTransfer?: number
    readonly maxSegments?: number
    readonly discardAlignment?: number
    readonly zeroesAlignment?: number
  }
  readonly protocol: 'file' | 'host_device' | 'nbd'
  readonly clusterSize?: number
  readonly encryption?: 'aes' | 'luks'
  readonly backing?: NativeNamedFile
  readonly vmdk?: {
    readonly createType: string
    readonly cid: number
    readonly parentCid: number
    readonly extents: readonly {
      readonly filename?: string
      readonly opened: boolean
      readonly format?: string
      readonly virtualSize: number
      readonly fileLength?: number
      readonly actualSize?: number
      readonly compressed: boolean
      readonly clusterSize?: number
    }[]
  }
  readonly qcow2?: {
    readonly version: 2 | 3
    readonly refcountBits: number
    readonly compressionType: 'zlib' | 'zstd'
    readonly extendedL2: boolean
    readonly lazyRefcounts: boolean
    readonly corrupt: boolean
    readonly dirty: boolean
    readonly hasDataFile: boolean
    readonly dataFile?: string
    readonly dataFileRaw: boolean
    readonly snapshots: readonly {
      readonly id: string
      readonly name: string
      readonly vmStateSize: number | bigint
      readonly dateSec: number
      readonly dateNsec: number
      readonly vmClockSec: number
      readonly vmClockNsec: number
      readonly icount?: number
    }[]
    readonly bitmaps: readonly {
      readonly name: string
      readonly granularity: number
      readonly flags: readonly ('in-use' | 'auto')[]
    }[]
    readonly damaged: readonly NativeFailure[]
    readonly luks?: NativeLuksInfo
    readonly luksDamage?: NativeFailure
  }
  /** Of LUKS files. */
  readonly luks?: NativeLuksInfo
}

/** What a LUKS header says. */
export interface NativeLuksInfo {
  readonly version: 1 | 2
  readonly detachedHeader: boolean
  readonly cipherAlg: string
  readonly cipherMode: string
  readonly ivgenAlg?: string
  readonly ivgenHashAlg?: string
  readonly hashAlg?: string
  readonly uuid: string
  readonly payloadOffset: number
  readonly masterKeyIters?: number
  readonly sectorSize: number
  readonly slots: readonly {
    readonly slot: number
    readonly active: boolean
    readonly iters?: number
    readonly stripes?: number
    readonly keyOffset: number
  }[]
}

export interface NativeInspection {
  readonly header?: {
    readonly version?: 2 | 3
    readonly virtualSize: number | bigint
    readonly clusterSize?: number
    readonly backingFilename?: string
    readonly backingFormat?: string
    readonly dataFile?: string
    readonly encryption?: 'aes' | 'luks'
    readonly compressionType?: 'zlib' | 'zstd'
    readonly extendedL2?: boolean
    readonly incompatible: readonly string[]
    readonly compatible: readonly string[]
    readonly autoclear: readonly string[]
  }
  /** Where the header could not be read as a whole. */
  readonly backingFilename?: string
  readonly unknownIncompatible: readonly number[]
  readonly findings: readonly { readonly code: string; readonly message: string }[]
}

/** A secret: its bytes, or the file that has them. */
export interface NativeSecret {
  readonly allowWeak?: boolean | undefined
  readonly bytes?: Uint8Array | undefined
  readonly file?: string | undefined
}

/** How a new image is encrypted; what is absent has the engine's default. */
export interface NativeEncrypt {
  readonly secret: NativeSecret
  readonly format?: string | undefined
  readonly cipherAlg?: string | undefined
  readonly cipherMode?: string | undefined
  readonly ivgenAlg?: string | undefined
  readonly ivgenHashAlg?: string | undefined
  readonly hashAlg?: string | undefined
  /** Milliseconds. */
  readonly iterTime?: number | undefined
  readonly allowWeak?: boolean | undefined
}

/** A secret that is to open an image, and one that does already. */
export interface NativeKeyOrder {
  readonly secret: NativeSecret
  readonly newSecret: NativeSecret
  readonly slot?: number | undefined
  readonly force?: boolean | undefined
  readonly iterTime?: number | undefined
  /** The old one goes. */
  readonly replaces: boolean
}

/** Which key slots are to go. */
export interface NativeKeyRemovalOrder {
  readonly slot?: number | undefined
  readonly secret?: NativeSecret | undefined
  readonly force?: boolean | undefined
}

/** The shape of a new image; what is absent has the engine's default. */
export interface NativeShape {
  format: string
  version?: number | undefined
  clusterSize?: number | undefined
  extendedL2?: boolean | undefined
  compressionType?: string | undefined
  preallocation?: string | undefined
  refcountBits?: number | undefined
  lazyRefcounts?: boolean | undefined
  backingFile?: string | undefined
  backingFormat?: string | undefined
  dataFile?: string | undefined
  /** The file that `dataFile` means. */
  dataPath?: string | undefined
  dataFileRaw?: boolean | undefined
  keepDataFile?: boolean | undefined
  encrypt?: NativeEncrypt | undefined
  /** What only some formats have, by its name in the API. */
  options?: Record<string, boolean | number | string> | undefined
}

export interface NativeConvertJob {
  shape: NativeShape
  compress: boolean
  level?: number | undefined
  smallWindow: boolean
  sparseSize?: number | undefined
  concurrency?: number | undefined
  /** Layers of the source above the base. */
  deltaLayers?: number | undefined
  baseSize?: number | undefined
  existing: boolean
  bitmaps?: 'all' | 'consistent' | undefined
  targetIsZero: boolean
  overwrite: boolean
  durable: boolean
  countData: boolean
  /** The image to write into. */
  target?: number | undefined
  /** The file to make the target in. */
  targetFile?: number | undefined
  start?: number | undefined
  length?: number | undefined
  salvage: boolean
  /** Bytes a second. */
  rate?: number | undefined
  inUse: readonly string[]
}

export interface NativeCloneOrder {
  shape: NativeShape
  compress: boolean
  level?: number | undefined
  smallWindow: boolean
  overwrite: boolean
  inUse: readonly string[]
}

export interface NativeCloned {
  readonly virtualSize: number
  readonly bytesRead: number
  readonly bytesWritten: number
}

export interface NativeConverted {
  readonly virtualSize: number
  readonly bytesRead: number
  readonly bytesWritten: number
  readonly skippedBitmaps?: readonly string[]
  readonly unreadable?: readonly { readonly start: number; readonly length: number; readonly message: string }[]
}

export interface NativeCompared {
  /** Absent for identical disks. */
  readonly reason?: 'size' | 'allocation' | 'content'
  readonly offset?: number | bigint
  readonly sizesDiffer: boolean
}

export interface NativeMeasured {
  readonly required: number
  readonly fullyAllocated: number
  readonly bitmaps?: number
}

export interface NativeCompacted {
  readonly fileLengthBefore: number
  readonly fileLengthAfter: number
  readonly actualSizeBefore: number
  readonly actualSizeAfter: number
  readonly reclaimedBytes: number
  readonly leakedClusters: number
  readonly zeroClusters: number
  readonly movedClusters: number
}

/** What to amend; what is absent stays. */
export interface NativeAmendChanges {
  readonly version?: number | undefined
  readonly refcountBits?: number | undefined
  readonly lazyRefcounts?: boolean | undefined
  readonly dataFile?: string | undefined
  readonly dataFileRaw?: boolean | undefined
  readonly backingFile?: string | undefined
  readonly backingFormat?: string | undefined
}

/** How to commit. */
export interface NativeCommitOrder {
  readonly empty: boolean
  readonly concurrency?: number | undefined
  /** Bytes a second. */
  readonly rate?: number | undefined
}

/** How to put an overlay on top. */
export interface NativeOverlayOrder {
  readonly shape: NativeShape
  readonly inUse: readonly string[]
  readonly write: NativeWriting
  readonly lock: NativeLock | undefined
  readonly l2CacheSize: number | undefined
}

/** How to serve images. */
export interface NativeNbdOrder {
  /** Of a unix socket; else TCP. */
  readonly path?: string | undefined
  readonly host?: string | undefined
  readonly port: number
  readonly persistent: boolean
  readonly maxConnections: number
  /** Milliseconds. */
  readonly handshakeTime?: number | undefined
  /** Number of what encrypts connections. */
  readonly tls?: number | undefined
  readonly exports: readonly NativeNbdExportOrder[]
}

/** How to serve one of them. */
export interface NativeNbdExportOrder {
  readonly image: number
  readonly exportName: string
  readonly description: string
  readonly offset: number
  readonly readOnly: boolean
  readonly allocationDepth: boolean
  readonly bitmaps: readonly string[]
}

/** A connection to encrypt: descriptors, to be closed by who gets them. */
export interface NativeTlsConnection {
  /** The other side's. */
  readonly outer: number
  /** To write to the engine. */
  readonly input: number
  /** To read from the engine. */
  readonly output: number
}

/** A server that runs. */
export interface NativeNbdStarted {
  readonly server: number
  readonly path?: string
  readonly host?: string
  readonly port?: number
}

/** The new top. */
export interface NativeOverlaid {
  readonly path: string
  readonly absolutePath?: string
  readonly clusterSize: number
  readonly identity?: string
}

/** A backing file as the header is to name it. */
export interface NativeBacking {
  readonly filename: string
  readonly format?: string | undefined
}

export interface NativeCheckOutcome {
  readonly imageEndOffset: number
  readonly totalClusters: number
  readonly allocatedClusters: number
  readonly fragmentedClusters: number
  readonly compressedClusters: number
  readonly corruptions: number
  readonly leaks: number
  readonly checkErrors: number
  readonly corruptionsFixed: number
  readonly leaksFixed: number
  readonly findings: readonly {
    readonly severity: 'corruption' | 'leak' | 'check-error' | 'note'
    readonly repaired: boolean
    readonly code: string
    readonly message: string
    readonly offset?: number
  }[]
  readonly omittedFindings: number
  readonly failure?: NativeFailure
}

/**
 * The addon's functions. Names and paths are strings that have every byte: see `text.ts`. Those that take a `request` number return at once; what comes of it is delivered under that
 * number (`support/requests.ts`). Arguments are checked here in TypeScript: the addon trusts them.
 */
export interface Addon {
  start(deliver: (count: number, others: readonly unknown[] | undefined) => void, numbers: Uint32Array): void
  /** Calls `deliver` with what is done. True: call this again in the next round of the event loop, nothing wakes the thread before. */
  look(deliver: (count: number, others: readonly unknown[] | undefined) => void): boolean
  /** Ends all work and closes all images, now. Nothing is delivered any more. */
  stop(): void
  openFile(request: number, path: string, options: NativeFileOptions): void
  /** Absent on Windows. */
  openDescriptor?(request: number, descriptor: number, options: NativeFileOptions): void
  /** The URI of an export, or why its name is none. */
  nbdLocation(name: string): string | NativeFailure
  /** The job ends the connection, whenever it is cancelled. */
  openNbd(request: number, job: number, name: string, options: NativeNbdConnect): void
  listNbd(request: number, job: number, name: string, options: NativeNbdConnect): void
  /** `format` is QEMU's name of it. */
  openLayer(request: number, file: number, format: string, options: NativeLayerOptions): void
  /** `format` is a compression's. Where the file does not say how much it holds, all of it is read. */
  openStream(request: number, job: number, file: number, format: string, options: NativeLayerOptions): void
  inspectStream(request: number, file: number, format: string, limits: NativeLimits | undefined): void
  unlockLayer(request: number, job: number, layer: number, secret: NativeSecret): void
  /** Tells the new secret's key slot. */
  addKey(request: number, job: number, image: number, order: NativeKeyOrder): void
  /** Tells the key slots that are free now. */
  removeKeys(request: number, job: number, image: number, order: NativeKeyRemovalOrder): void
  setDataFile(request: number, layer: number, file: number, lock: NativeLock | undefined): void
  /** The layer has another number then. */
  attachExtents(request: number, layer: number, files: readonly number[], lock: NativeLock | undefined): void
  /** The top layer is read only without `write`. */
  assemble(request: number, layers: readonly number[], write: NativeWriting | undefined): void
  release(request: number, number: number): void
  /** True: `look` is to be called in the next round of the event loop. */
  read(
    request: number,
    image: number,
    buffer: Uint8Array,
    offset: number,
    length: number,
    position: number,
    watch?: number,
  ): boolean
  /** Of the state of a virtual machine, behind the disk. */
  readVmState(request: number, image: number, buffer: Uint8Array, position: number): void
  writeVmState(request: number, image: number, buffer: Uint8Array, position: number): void
  /** As `read`. `watch`, here and below, is the number by which the request is cancelled. */
  write(
    request: number,
    image: number,
    buffer: Uint8Array,
    offset: number,
    length: number,
    position: number,
    compressed: boolean,
    watch?: number,
  ): boolean
  writeZeroes(
    request: number,
    image: number,
    position: number,
    length: number,
    unmap: boolean,
    watch: number | undefined,
  ): void
  discard(request: number, image: number, position: number, length: number, watch: number | undefined): void
  flush(request: number, image: number): void
  /** Tells the disk's size afterwards. */
  resize(
    request: number,
    job: number,
    image: number,
    size: number,
    shrink: boolean,
    preallocation: string | undefined,
  ): void
  extents(request: number, image: number, start: number, length: number, watch: number | undefined): void
  layersInfo(request: number, image: number): void
  inspectFile(request: number, file: number, format: string, limits: NativeLimits | undefined): void
  inspectPrefix(request: number, bytes: Buffer, format: string, limits: NativeLimits | undefined): void
  /** Reads an OVF descriptor. */
  readOvf(request: number, bytes: Buffer): void
  amendImage(request: number, job: number, image: number, changes: NativeAmendChanges): void
  createOverlay(request: number, job: number, image: number, path: string, order: NativeOverlayOrder): void
  commitImage(request: number, job: number, above: number, base: number, order: NativeCommitOrder): void
  rebaseImage(
    request: number,
    job: number,
    image: number,
    next: number | undefined,
    backing: NativeBacking | undefined,
    compress: boolean,
    detectZeroes: boolean,
    concurrency: number | undefined,
  ): void
  setBackingFile(request: number, job: number, image: number, backing: NativeBacking | undefined): void
  checkImage(
    request: number,
    job: number,
    image: number,
    readers: number | undefined,
    maxFindings: number,
    repair: 'leaks' | 'all' | undefined,
  ): void
  createImage(
    request: number,
    job: number,
    path: string,
    size: number,
    shape: NativeShape,
    overwrite: boolean,
    inUse: readonly string[],
  ): void
  convertImage(request: number, job: number, images: readonly number[], path: string, order: NativeConvertJob): void
  /** Makes the target and takes the point in time; tells the clone's number. */
  beginClone(request: number, job: number, image: number, path: string, order: NativeCloneOrder): void
  /** Copies the rest. The clone's number is gone, however it ends. */
  runClone(request: number, job: number, clone: number, concurrency: number | undefined): void
  compactImage(request: number, job: number, image: number, rewrite: boolean, zeroes: boolean, dryRun: boolean): void
  compareImages(request: number, job: number, a: number, b: number, strict: boolean, workers: number | undefined): void
  measureImage(request: number, job: number, image: number | undefined, size: number, shape: NativeShape): void
  /** `granularity` 0 is the default. */
  addBitmap(request: number, image: number, name: string, granularity: number, enabled: boolean): void
  removeBitmap(request: number, image: number, name: string): void
  removeAllBitmaps(request: number, image: number): void
  clearBitmap(request: number, image: number, name: string): void
  enableBitmap(request: number, image: number, name: string, enabled: boolean): void
  mergeBitmaps(
    request: number,
    image: number,
    target: string,
    sources: readonly { readonly image: number; readonly name: string }[],
    watch: number | undefined,
  ): void
  /** Start and length in turn. */
  bitmapExtents(request: number, image: number, name: string): void
  /** The snapshot table of an image: a `SnapshotTable`. */
  snapshotTable(request: number, image: number): void
  /** The snapshots of a layer, in the table's order. */
  layerSnapshots(request: number, layer: number): void
  /** Executes a snapshot plan; tells the disk's size afterwards. */
  executePlan(request: number, image: number, plan: Plan, watch: number | undefined): void
  startNbd(request: number, order: NativeNbdOrder): void
  /** Delivered when the server has ended. */
  awaitNbd(request: number, server: number): void
  endNbd(server: number): void
  nbdConnections(server: number): number
  /** The number of a place to which connections come that are to be encrypted; `release` ends it. */
  startTls(): number
  /** The next one: a `NativeTlsConnection`, or undefined where no more come. */
  nextTls(request: number, tls: number): void
  /** Whether one of the requests that are waited for keeps the event loop alive. Taken back when it was delivered. */
  referenceRequest(holds: boolean): void
  cancelRequest(watch: number): void
  /** Forgets a request that could be cancelled; tells how many bytes it has done. */
  endRequest(watch: number): number
  cancelJob(job: number): void
  /** The steps are those since the last call: `Progress.steps`. */
  jobProgress(job: number): [current: number, total: number, ...steps: number[]]
  /** Forgets a job that has delivered what it had to say. */
  endJob(job: number): void
  /** How many jobs run at the same time, from now on as many as given. */
  maxJobs(most: number | undefined): number
}

/** The packages for each platform. On Linux the one for the C library that is there loads, the other is not installed or fails. */
const PACKAGES: Readonly<Record<string, readonly string[]>> = {
  'linux-x64': ['linux-x64-gnu', 'linux-x64-musl'],
  'linux-arm64': ['linux-arm64-gnu', 'linux-arm64-musl'],
  'darwin-x64': ['darwin-x64'],
  'darwin-arm64': ['darwin-arm64'],
  'win32-x64': ['win32-x64-msvc'],
  'win32-arm64': ['win32-arm64-msvc'],
}

function load(): Addon {
  const explicit = process.env['NAPI_RS_NATIVE_LIBRARY_PATH']
  if (explicit) {
    const loaded = attempt(explicit)
    if ('addon' in loaded) return loaded.addon
    throw failed(`${explicit} (NAPI_RS_NATIVE_LIBRARY_PATH)`, loaded.error)
  }
  const platform = `${process.platform}-${process.arch}`
  const suffixes = PACKAGES[platform]
  if (suffixes === undefined) {
    const known = Object.keys(PACKAGES).join(', ')
    throw new Qcow2Error('ERR_QCOW2_ADDON_MISSING', `qcow2 has no addon for ${platform}; it has one for ${known}`)
  }
  const local = suffixes.map(suffix => join(__dirname, `qcow2.${suffix}.node`))
  const packages = suffixes.map(suffix => `qcow2-${suffix}`)
  let broken: Qcow2Error | undefined
  for (const name of [...local, ...packages]) {
    const loaded = attempt(name)
    if ('addon' in loaded) return loaded.addon
    if (!isMissing(loaded.error, name)) broken ??= failed(name, loaded.error)
  }
  throw broken ?? notInstalled(packages.join(' or '))
}

function attempt(name: string): { readonly addon: Addon } | { readonly error: unknown } {
  try {
    return { addon: require(name) as Addon }
  } catch (error) {
    return { error }
  }
}

const isMissing = (error: unknown, name: string): boolean =>
  error instanceof Error && 'code' in error && error.code === 'MODULE_NOT_FOUND' && error.message.includes(name)

const failed = (name: string, cause: unknown): Qcow2Error => {
  const reason = cause instanceof Error ? cause.message : String(cause)
  return new Qcow2Error('ERR_QCOW2_ADDON_MISSING', `the addon ${name} cannot be loaded: ${reason}`, { cause })
}

const notInstalled = (name: string): Qcow2Error =>
  new Qcow2Error(
    'ERR_QCOW2_ADDON_MISSING',
    `the package ${name} with the addon for this platform is not installed. npm installs it with qcow2 unless optional ` +
      'dependencies are left out (--omit=optional), or node_modules came from another platform: run npm install here',
  )

export const native: Addon = load()
