/** Consistency checks and repairs, with QAPI's `ImageCheck` counters. */

import { SHARING, type SharingOptions, toReadAccess } from './access.js'
import { type Chain, withChain } from './backing/chain.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { invalidArgument, type Qcow2Error } from './errors.js'
import type { Format } from './formats/table.js'
import type { NativeCheckOutcome } from './native.js'
import {
  type Limits,
  LONG_RUNNING,
  type LongRunning,
  limits,
  oneOf,
  type Read,
  readOptions,
  throwIfAborted,
} from './options.js'
import { format, type ImageSource, toLocated } from './source.js'
import { runJob } from './support/jobs.js'
import { toError } from './support/requests.js'
import { shown } from './text.js'

/** Options of {@link check}. */
export interface CheckOptions extends LongRunning, SharingOptions {
  /** Default: by its magic. A fixed VHD has none. */
  format?: Format | undefined
  /**
   * Only the top layer is checked, so what it names need not be opened. Default `'layer'`; with `'allow'`, a backing chain that does
   * not open is an error.
   */
  references?: ReferencePolicy | undefined
  /** What the image may claim before it is refused. */
  limits?: Limits | undefined
  /**
   * Repair what is found: leaked clusters only, or all that can be repaired. The image is locked for that: nobody else has it open.
   * What was repaired is checked once more; the counters are those of the second check.
   */
  repair?: 'leaks' | 'all' | undefined
}

/** One thing that is wrong. */
export interface CheckFinding {
  /** Which counter it adds to; a note to none. */
  readonly severity: 'corruption' | 'leak' | 'check-error' | 'note'
  /** It is not wrong any more: a repair removed it. */
  readonly repaired: boolean
  /** What is wrong, such as `'LEAK'` or `'REFCOUNT_TOO_LOW'`. Stable, unlike the message. */
  readonly code: string
  /** One sentence. */
  readonly message: string
  /** The byte offset in the image file that it is about. */
  readonly offset?: number
}

/** What a check found. Every counter is present: what does not occur is 0. */
export interface CheckResult {
  /** The file as it was opened. */
  readonly filename: string
  /** The bytes of `filename`, where they are not UTF-8. */
  readonly filenameBytes?: Buffer
  /** What it was checked as. */
  readonly format: Format
  /** No corruption, no leak, and no error kept the check from looking. */
  readonly ok: boolean
  /** Places that the check could not look at. */
  readonly checkErrors: number
  /** Errors: what reads as something else than was written, or may soon. */
  readonly corruptions: number
  /** Clusters whose refcount is higher than their references: wasted space, no danger. */
  readonly leaks: number
  /** Corruptions that were repaired; `corruptions` counts what is left. */
  readonly corruptionsFixed: number
  /** Leaked clusters that were freed; `leaks` counts what is left. */
  readonly leaksFixed: number
  /** Clusters of the disk. */
  readonly totalClusters: number
  /** Of those, how many have their own data in this image. */
  readonly allocatedClusters: number
  /** Of those, how many do not follow their neighbour in the file. */
  readonly fragmentedClusters: number
  /** Of the allocated clusters, those that are compressed. */
  readonly compressedClusters: number
  /** Byte behind the last cluster in use. */
  readonly imageEndOffset: number
  /** The first 10000 findings, in QEMU's order; behind those of a repair, those of the check that followed it. */
  readonly findings: readonly CheckFinding[]
  /** Findings that were counted and are not listed. */
  readonly omittedFindings: number
  /** The messages of the findings. */
  readonly messages: readonly string[]
  /** Why the check ended early: the counters then tell only what was seen before. */
  readonly failure?: Qcow2Error
}

const CHECK = {
  ...LONG_RUNNING,
  format,
  ...SHARING,
  references: referencePolicy,
  limits,
  repair: oneOf('leaks', 'all'),
} as const
const IMAGE_CHECK = LONG_RUNNING

const MAX_FINDINGS = 10_000

/** {@link LongRunning} for a check of an open image, read. */
export const readCheckOptions = (options: unknown): Read<typeof LONG_RUNNING> =>
  readOptions(options, 'Image.check', IMAGE_CHECK)

/**
 * Checks the metadata of an image against itself: of qcow2 refcounts, leaks, overlaps, COPIED flags, the snapshot table, the bitmap
 * directory; of formats with a table of blocks that, its header and its copies. Findings are a result, not an error; an image that is too damaged to be opened at all is one.
 *
 * Without `repair` nothing is changed. A repair never changes what the disk and its snapshots read as. It is safe to interrupt: it
 * leaves an image that is no worse than before, and that can be repaired again. Leaked clusters are kept while damage remains that
 * may hide what refers to them, but for what the repair itself replaced.
 *
 * `repair: 'all'` gives up what nothing leads to any more: snapshots whose entry or L1 table is not in the file, and all bitmaps where
 * their directory or a table of theirs is damaged. A finding names each.
 *
 * @throws {@link Qcow2Error} as `open`; `ERR_QCOW2_LIMIT` if the counters need more than `limits.maxMemory`
 *
 * @example
 * ```js
 * import { check } from 'qcow2'
 *
 * const { ok, leaks } = await check('disk.qcow2')
 * if (!ok) await check('disk.qcow2', { repair: leaks > 0 ? 'leaks' : 'all' })
 * ```
 */
export async function check(source: ImageSource, options?: CheckOptions): Promise<CheckResult> {
  const located = toLocated(source, 'source')
  const { format: given, references = 'layer', repair, ...read } = readOptions(options, 'check', CHECK)
  throwIfAborted(read.signal)
  const { limits, signal } = read
  if (repair !== undefined && read.forceShare) {
    throw invalidArgument('forceShare', 'check: forceShare is for reading: a repair excludes everybody else')
  }
  const access = { ...toReadAccess(read), ...(repair !== undefined && { write: {} }) }
  const opening = {
    format: given,
    needs: 'check',
    references,
    limits,
    signal,
    access,
    forCheck: true,
    salvage: true,
  } as const
  return withChain(located, opening, async chain => {
    const found = await checkImage(chain, read, repair)
    const { corruptionsFixed, leaksFixed } = found
    if (corruptionsFixed + leaksFixed === 0) return found
    const left = await checkImage(chain, read)
    return {
      ...left,
      corruptionsFixed,
      leaksFixed,
      findings: [...found.findings, ...left.findings],
      omittedFindings: found.omittedFindings + left.omittedFindings,
      messages: [...found.messages, ...left.messages],
    }
  })
}

/** Checks the top layer of an open image, which was opened for a repair if that is wanted. */
export async function checkImage(
  { image, path, format }: Pick<Chain, 'image' | 'path' | 'format'>,
  options: Read<typeof LONG_RUNNING>,
  repair?: 'leaks' | 'all',
): Promise<CheckResult> {
  const { failure, ...outcome } = await runJob<NativeCheckOutcome>('check', options, (request, job, addon) =>
    addon.checkImage(request, job, image, options.concurrency, MAX_FINDINGS, repair),
  )
  const { checkErrors, corruptions, leaks } = outcome
  return {
    ...shown('filename', path ?? ''),
    format,
    ok: failure === undefined && checkErrors === 0 && corruptions === 0 && leaks === 0,
    ...outcome,
    messages: outcome.findings.map(({ message }) => message),
    ...(failure !== undefined && { failure: toError(failure) as Qcow2Error }),
  }
}
