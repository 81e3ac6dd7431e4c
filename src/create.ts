/** Creating images. */

import { READING, WRITING } from './access.js'
import { openChain } from './backing/chain.js'
import { readFileName } from './backing/filename.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { AbortError, invalidArgument } from './errors.js'
import { Image } from './image.js'
import type { NativeShape } from './native.js'
import {
  bytes,
  flag,
  integer,
  LONG_RUNNING,
  type LongRunning,
  oneOf,
  type Reader,
  readOptions,
  text,
  throwIfAborted,
} from './options.js'
import { type Format, type PathLike, release, toPath } from './source.js'
import { runJob } from './support/jobs.js'
import type { Size } from './units.js'

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
  preallocation?: Preallocation | undefined
  /** Width of a refcount. Default 16; others need version 3. */
  refcountBits?: 1 | 2 | 4 | 8 | 16 | 32 | 64 | undefined
  /** Refcount updates may be postponed; needs version 3. */
  lazyRefcounts?: boolean | undefined
  /** Recorded as it is written here: a relative name starts from the directory of the new image. Needs `backingFormat`. */
  backingFile?: string | undefined
  backingFormat?: Format | undefined
  /**
   * Keep the guest's data in this file, which is created too. Recorded as it is written here: a relative name starts from the working
   * directory of the process that opens the image. Needs version 3.
   */
  dataFile?: string | undefined
  /** The data file is to be a valid raw image by itself. */
  dataFileRaw?: boolean | undefined
}

/** Options of {@link create}. */
export interface CreateOptions extends Qcow2Shape, LongRunning {
  /** Default `'qcow2'`. A raw image takes only `size`, and `preallocation` other than `'metadata'`. */
  format?: Format | undefined
  /** Virtual size in bytes, rounded up to a multiple of 512. Default: the backing file's. */
  size?: Size | undefined
  /** Replace existing files, the data file's too. Default false: `EEXIST`. */
  overwrite?: boolean | undefined
  /**
   * What the backing file may pull in itself. The backing file is named by the caller, so it is opened in any case, except with
   * `'layer'`, which records the name unchecked and returns the new layer alone, for reading. Default `'deny'`.
   */
  references?: ReferencePolicy | undefined
}

const SHAPE = {
  version: oneOf(2, 3),
  clusterSize: integer(512, 2 ** 21),
  extendedL2: flag,
  compressionType: oneOf('zlib', 'zstd'),
  preallocation: oneOf('off', 'metadata', 'falloc', 'full'),
  refcountBits: oneOf(1, 2, 4, 8, 16, 32, 64),
  lazyRefcounts: flag,
  backingFile: text,
  backingFormat: oneOf('qcow2', 'raw'),
  dataFile: text,
  dataFileRaw: flag,
} as const

const CREATE = {
  ...LONG_RUNNING,
  ...SHAPE,
  format: oneOf('qcow2', 'raw'),
  size: bytes,
  overwrite: flag,
  references: referencePolicy,
} as const

/** {@link Qcow2Shape}, checked. */
export type ReadShape = Omit<NativeShape, 'format'>

/** Reads a {@link Qcow2Shape} that is an option of its own. */
export const shape: Reader<ReadShape> = (value, name) => readOptions(value, name, SHAPE)

/** Checks what the options of a shape demand of each other; the rules of the format are the engine's. */
export function toNativeShape(owner: string, format: Format, read: ReadShape): NativeShape {
  const { backingFile, backingFormat, dataFile, dataFileRaw } = read
  if (format === 'raw') {
    const foreign = Object.entries(read).find(([name, value]) => name !== 'preallocation' && value !== undefined)
    if (foreign !== undefined) throw invalidArgument(foreign[0], `${owner}: a raw image has no ${foreign[0]}`)
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
  return { ...read, format }
}

/**
 * Creates an image and opens it, for writing too. The file has its name only when it is complete: nothing is left of a failure or abort.
 *
 * @throws {@link Qcow2Error} `EEXIST` unless `overwrite` is set; `ERR_QCOW2_INVALID_ARGUMENT` for options that contradict each
 *   other or the format; `ERR_QCOW2_LIMIT` for a size that the geometry cannot address; the system's code (`ENOSPC`, `EACCES`)
 */
export async function create(path: PathLike, options: CreateOptions): Promise<Image> {
  const target = toPath(path, 'path')
  const read = readOptions(options, 'create', CREATE)
  const {
    format = 'qcow2',
    size,
    overwrite,
    references = 'deny',
    signal,
    onProgress,
    progressInterval,
    concurrency,
  } = read
  const { version, clusterSize, extendedL2, compressionType, preallocation, refcountBits, lazyRefcounts } = read
  const { backingFile, backingFormat, dataFile, dataFileRaw } = read
  const wanted = toNativeShape('create', format, {
    ...{ version, clusterSize, extendedL2, compressionType, preallocation, refcountBits, lazyRefcounts },
    ...{ backingFile, backingFormat, dataFile, dataFileRaw },
  })
  throwIfAborted(signal)
  const backing = await lookAtBacking(String(target), backingFile, backingFormat, references, signal)
  const bytesInAll = size ?? backing?.virtualSize
  if (bytesInAll === undefined) {
    const why = backingFile === undefined ? 'without a backing file' : "where references: 'layer' leaves it unopened"
    throw invalidArgument('size', `create: size is needed ${why}`)
  }
  const job = { signal, onProgress, progressInterval, concurrency }
  await runJob<void>('create', job, (request, number, addon) =>
    addon.createImage(request, number, target, bytesInAll, wanted, overwrite ?? false, backing?.identities ?? []),
  )
  // A layer alone cannot be written to: what surrounds a write comes from its backing file.
  const writable = references !== 'layer' || (backingFile === undefined && dataFile === undefined)
  const access = writable ? WRITING : READING
  const chain = await openChain({ path: target }, { format, references, trustTop: true, signal, access })
  if (signal?.aborted) {
    await release(chain.image)
    throw new AbortError(signal.reason)
  }
  return new Image(chain)
}

/** Opens the backing file before anything is made: whether it is there, how large it is, and what it stands on. */
async function lookAtBacking(
  target: string,
  backingFile: string | undefined,
  format: Format | undefined,
  references: ReferencePolicy,
  signal: AbortSignal | undefined,
): Promise<{ virtualSize: number; identities: readonly string[] } | undefined> {
  if (backingFile === undefined || references === 'layer') return undefined
  const name = readFileName(backingFile, target)
  if ('refused' in name) {
    const message = `create: the backing file '${backingFile}' cannot be opened: ${name.refused}`
    throw invalidArgument('backingFile', message)
  }
  const { image, virtualSize, identities } = await openChain({ path: name.path }, { format, references, signal })
  await release(image)
  return { virtualSize, identities }
}
