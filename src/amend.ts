/** Changing the options of an existing image. */

import { SHARING, type SharingOptions, toReadAccess } from './access.js'
import { withChain } from './backing/chain.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { invalidArgument, Qcow2Error } from './errors.js'
import type { Format } from './formats/table.js'
import type { NativeAmendChanges } from './native.js'
import { openFor } from './open.js'
import {
  bytes,
  flag,
  type Limits,
  LONG_RUNNING,
  type LongRunning,
  limits,
  type Read,
  type Reader,
  readOptions,
  storedName,
  throwIfAborted,
} from './options.js'
import { SHAPE } from './shape.js'
import { type ImageSource, toLocated } from './source.js'
import { runJob } from './support/jobs.js'
import type { Name } from './text.js'
import type { Size } from './units.js'

/** Options of {@link amend}: what is not named stays as it is. */
export interface AmendOptions extends LongRunning, SharingOptions {
  /**
   * Version of the format. Going back to 2 turns zero clusters into data where there is a backing file, and is refused for what
   * version 2 does not have.
   */
  version?: 2 | 3 | undefined
  /** Width of the refcounts. Refused where a cluster has more references than the width can count. */
  refcountBits?: 1 | 2 | 4 | 8 | 16 | 32 | 64 | undefined
  /** Whether programs that write to the image may postpone refcount updates. This library does with the option of `open` only. */
  lazyRefcounts?: boolean | undefined
  /** Gives the disk this size. A new part reads as zeroes. */
  size?: Size | undefined
  /** A smaller size is meant: what lies behind the new end is lost. Default false. */
  shrink?: boolean | undefined
  /** Name of the external data file of an image that has one; `''` removes the name. */
  dataFile?: Name | undefined
  /** `false` gives up that the external data file is a raw image on its own; it cannot be promised later. */
  dataFileRaw?: boolean | undefined
  /** Only what is there already: another backing file takes a rebase. */
  backingFile?: Name | undefined
  /** See `backingFile`. */
  backingFormat?: Format | undefined
  /** What the image names is opened only to change the size. Default `'deny'`. */
  references?: ReferencePolicy | undefined
  /** What the image may claim before it is refused. */
  limits?: Limits | undefined
}

/** A name, or `''` for none. */
const textOrNone: Reader<string> = (value, name) => (value === '' ? value : storedName(value, name))

const AMEND = {
  ...LONG_RUNNING,
  ...SHARING,
  version: SHAPE.version,
  refcountBits: SHAPE.refcountBits,
  lazyRefcounts: SHAPE.lazyRefcounts,
  size: bytes,
  shrink: flag,
  dataFile: textOrNone,
  dataFileRaw: SHAPE.dataFileRaw,
  backingFile: SHAPE.backingFile,
  backingFormat: SHAPE.backingFormat,
  references: referencePolicy,
  limits,
} as const

/**
 * Changes the options of a qcow2 image in place. The image is locked for that: nobody else has it open. What the disk and its
 * snapshots read as does not change, but for its size. Each change is whole: interrupted at any point, the image has some of them, and
 * leaked clusters at worst. Unknown header fields and extensions are kept.
 *
 * @throws {@link Qcow2Error} as `open`; `ERR_QCOW2_INVALID_ARGUMENT` for what the format or the image does not allow, before anything is
 *   changed; `ERR_QCOW2_DATA_LOSS` for a smaller size without `shrink`; `ERR_QCOW2_CORRUPT` for an image that must be repaired first;
 *   `ERR_QCOW2_LIMIT` for refcounts that do not fit
 *
 * @example
 * ```js
 * import { amend } from 'qcow2'
 *
 * await amend('disk.qcow2', { lazyRefcounts: true })
 * ```
 */
export async function amend(source: ImageSource, options?: AmendOptions): Promise<void> {
  const located = toLocated(source, 'source')
  const {
    size,
    shrink = false,
    version,
    references,
    refcountBits,
    lazyRefcounts,
    ...read
  } = readOptions(options, 'amend', AMEND)
  const { dataFile, dataFileRaw, backingFile, backingFormat } = read
  throwIfAborted(read.signal)
  if (read.forceShare) throw invalidArgument('forceShare', 'amend: forceShare is for reading')
  const changes = { refcountBits, lazyRefcounts, dataFile, dataFileRaw, backingFile, backingFormat }
  const run = async (these: NativeAmendChanges): Promise<void> => {
    const access = { ...toReadAccess(read), write: {} }
    const { limits, signal } = read
    const opening = { needs: 'amend', references: 'layer', limits, signal, access, forCheck: true } as const
    await withChain(located, opening, async ({ image, path, virtualSize }) => {
      if (size !== undefined && size < virtualSize && !shrink) throw shrinks(path, size, virtualSize)
      return runJob<void>('amend', read, (request, job, addon) => addon.amendImage(request, job, image, these))
    })
  }
  if (size === undefined) return run({ ...changes, version })
  // A new size may need what only version 3 has, so going back to version 2 is last.
  await run({ ...changes, version: version === 2 ? undefined : version })
  await resize(source, size, shrink, references, read)
  if (version === 2) await run({ version })
}

function shrinks(path: string | undefined, size: number, now: number): Qcow2Error {
  const message =
    `${path === undefined ? '' : `${path}: `}a size of ${size} bytes cuts off a disk of ${now} bytes, and what lies behind is lost: ` +
    'say shrink: true if that is meant'
  return new Qcow2Error('ERR_QCOW2_DATA_LOSS', message, { path, field: 'size' })
}

type Rest = Pick<Read<typeof AMEND>, 'limits' | 'signal' | 'locking'>

async function resize(
  source: ImageSource,
  size: number,
  shrink: boolean,
  references: ReferencePolicy | undefined,
  { limits, signal, locking }: Rest,
): Promise<void> {
  const image = await openFor('amend', source, { flags: 'r+', references, limits, signal, locking })
  try {
    await image.truncate(size, { shrink, signal })
  } finally {
    await image.close()
  }
}
