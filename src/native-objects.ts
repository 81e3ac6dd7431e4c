/** The objects that cross to the addon and back, as JavaScript has them: plain data. `__test__/types/native.ts` holds them against the addon. */

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
  /** The number of what a caller's object threw. */
  readonly thrown?: number
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

/** What is known of a stream before it comes. Bytes. */
export interface NativeSpoolOptions {
  readonly length?: number | undefined
  /** Of a cluster of the image in it, where it has them. */
  readonly unit?: number | undefined
  /** All of it is kept, also what comes when all that was wanted was read. */
  readonly keep: boolean
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

/** What a caller's object is. Sizes are bytes. */
export interface NativeSourceOptions {
  readonly name: string
  readonly identity: string
  readonly size: number
  readonly writable: boolean
  readonly resizes: boolean
  readonly syncs: boolean
  /** It tells what is zero. */
  readonly tells: boolean
  readonly cache?: NativeSourceCache | undefined
}

/** How what was read is kept, in bytes. */
export interface NativeSourceCache {
  readonly blockSize: number
  readonly size: number
  readonly readAhead: number
}

/** What is asked of a caller's object. */
export interface NativeSourceQuestion {
  readonly id: number
  readonly operation: 'read' | 'write' | 'sync' | 'truncate' | 'extents' | 'forget'
  /** Bytes in front of the range; the new size to truncate to. */
  readonly position: number
  readonly length: number
  /** What is written. */
  readonly data?: Buffer
}

/** What a caller's object threw. */
export interface NativeSourceFailure {
  readonly message: string
  readonly code?: string | undefined
  /** See `support/thrown.ts`. */
  readonly number: number
  readonly transient: boolean
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
  /** Bytes of the disk in a compressed file, where that is known. */
  size?: number | undefined
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

/** What to make a stream of. */
export interface NativeStreamOrder {
  shape: NativeShape
  compress: boolean
  level?: number | undefined
  smallWindow: boolean
  concurrency?: number | undefined
  /** Bytes that the plan may take. */
  maxMemory?: number | undefined
}

/** A stream that is ready to be read. */
export interface NativePlannedStream {
  readonly stream: number
  readonly byteLength: number
  readonly virtualSize: number
  /** One request at a time. */
  readonly sequential: boolean
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
  /** Number of the open file that the copy is made in, if that is not a new one. */
  targetFile?: number | undefined
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
