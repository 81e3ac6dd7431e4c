/** Rebasing: another backing file under the same disk. */

import { ACCESS, type CacheMode, READING, SHARING, type SharingOptions, toReadAccess } from './access.js'
import { type Chain, type ChainOptions, lookAtChain, withChain } from './backing/chain.js'
import { decide, type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { invalidArgument, Qcow2Error } from './errors.js'
import { type Format, isFormat, quoted, SOURCE_FORMATS } from './formats/table.js'
import type { NativeBacking, NativeFile } from './native.js'
import {
  flag,
  type Limits,
  LONG_RUNNING,
  type LongRunning,
  limits,
  type Read,
  readOptions,
  storedName,
  text,
  throwIfAborted,
} from './options.js'
import { forgetting, type Secrets, secrets } from './secret.js'
import { type ImageSource, type Located, openFile, release, toLocated } from './source.js'
import { runJob } from './support/jobs.js'
import type { Name } from './text.js'
import { describe } from './units.js'

/** Options of {@link rebase}. */
export interface RebaseOptions extends LongRunning, Pick<SharingOptions, 'locking'> {
  /**
   * Format of the new backing file, which the image then names with it; with `unsafe`, any name that QEMU has for a format. Needed unless there is no backing file.
   */
  backingFormat?: Format | (string & {}) | undefined
  /**
   * What the old chain may pull in, and what the new backing file names in turn. Default `'deny'`. With `unsafe`, `'layer'` looks at no other
   * file at all, also not whether the chain would contain itself.
   */
  references?: ReferencePolicy | undefined
  /** What opens encrypted layers: of the image, its chain and the new one. */
  secret?: Secrets | undefined
  /** Store the clusters that are copied compressed. */
  compress?: boolean | undefined
  /** What is copied and reads as zeroes becomes zero clusters, the default; `false` stores it as data, as QEMU does. */
  detectZeroes?: boolean | undefined
  /**
   * Only change the name: nothing is compared or copied, and neither backing file has to be there. For a backing file that was moved. The
   * disk reads as before only if the new one has the same contents; so this needs `acknowledgeDataLoss`.
   */
  unsafe?: boolean | undefined
  /** What `unsafe` needs, so that nobody says that by mistake. */
  acknowledgeDataLoss?: boolean | undefined
  /** Default `'writeback'`. */
  cache?: CacheMode | undefined
  /** What the image may claim before it is refused. */
  limits?: Limits | undefined
}

const REBASE = {
  ...LONG_RUNNING,
  locking: SHARING.locking,
  backingFormat: text,
  references: referencePolicy,
  secret: secrets,
  compress: flag,
  detectZeroes: flag,
  unsafe: flag,
  acknowledgeDataLoss: flag,
  cache: ACCESS.cache,
  limits,
} as const

type ReadRebase = Read<typeof REBASE>

/**
 * Gives a qcow2 image another backing file, or none (`null`: the image then has all of its disk itself). The disk reads the same: what
 * the image does not have and the two backing files differ in is copied first, and only when that is durable does the image name
 * the new one. Interrupted before that moment, it reads as before over the old one. What internal snapshots read from the backing file is
 * not copied: they then read the new one.
 *
 * `backing` is stored as it is given: a relative name is relative to the directory of the image.
 *
 * @throws {@link Qcow2Error} as `open`; `ERR_QCOW2_CHAIN` for a new backing chain that contains the image;
 *   `ERR_QCOW2_DATA_LOSS` for `unsafe` without `acknowledgeDataLoss`; `ERR_QCOW2_LIMIT` for a name that does not fit into the header.
 *   Nothing is changed by any of these
 *
 * @example
 * ```js
 * import { rebase } from 'qcow2'
 *
 * // What the two backing files have differently is copied: the disk reads as before.
 * await rebase('overlay.qcow2', 'new-base.qcow2', { backingFormat: 'qcow2', references: 'allow' })
 * ```
 */
export async function rebase(top: ImageSource, backing: Name | null, options?: RebaseOptions): Promise<void> {
  return await forgetting(() => rebaseImage(top, backing, options))
}

async function rebaseImage(top: ImageSource, backing: Name | null, options?: RebaseOptions): Promise<void> {
  const located = toLocated(top, 'top')
  const read = readOptions(options, 'rebase', REBASE)
  const named = toBacking(backing, read)
  throwIfAborted(read.signal)
  if (read.unsafe && !read.acknowledgeDataLoss) {
    const message =
      'rebase: unsafe changes what the disk reads as unless the new backing file has the contents of the old one: say acknowledgeDataLoss: true'
    throw new Qcow2Error('ERR_QCOW2_DATA_LOSS', message, { field: 'acknowledgeDataLoss' })
  }
  const file = await openFile(located, {}, read.signal)
  await release(file.file)
  await (read.unsafe ? setName(located, file, named, read) : copyAndSetName(located, file, named, read))
}

function toBacking(backing: Name | null, read: ReadRebase): NativeBacking | undefined {
  if (read.unsafe && read.compress) throw invalidArgument('compress', 'rebase: an unsafe rebase copies nothing')
  if (!read.unsafe && read.references === 'layer') {
    throw invalidArgument('references', "rebase: references: 'layer' leaves out the backing files, which are compared")
  }
  if (backing === null) {
    if (read.backingFormat === undefined) return undefined
    throw invalidArgument('backingFormat', 'rebase: there is no format where there is no backing file')
  }
  const filename = storedName(backing, 'rebase: backing')
  if (read.backingFormat === undefined) {
    const message = `rebase: backingFormat is needed with a backing file: ${quoted(SOURCE_FORMATS)}`
    throw invalidArgument('backingFormat', message)
  }
  if (!read.unsafe && !isFormat(read.backingFormat)) {
    throw invalidArgument(
      'backingFormat',
      `rebase: backingFormat must be ${quoted(SOURCE_FORMATS)}, not ${describe(read.backingFormat)}`,
    )
  }
  if (read.backingFormat === '') throw invalidArgument('backingFormat', 'rebase: backingFormat must not be empty')
  return { filename, format: read.backingFormat }
}

async function copyAndSetName(
  located: Located,
  file: NativeFile,
  named: NativeBacking | undefined,
  read: ReadRebase,
): Promise<void> {
  const { references, secret, limits, signal, cache, concurrency, compress = false, detectZeroes = true } = read
  const access = { ...toReadAccess(read), cache, write: { cache } }
  const opening = { needs: 'rebase', references, secret, limits, signal, access } as const
  const change = (next?: Chain): Promise<void> =>
    withChain(located, opening, ({ image }) =>
      runJob<void>('rebase', read, (request, job, addon) =>
        addon.rebaseImage(request, job, image, next?.image, named, compress, detectZeroes, concurrency),
      ),
    )
  if (named === undefined) return change()
  const place = await locate(file, named, read)
  if (place === undefined) throw invalidArgument('references', 'rebase: the new backing file is not opened')
  await refuseItself(file, place, named)
  // Before the image is locked: a chain that contains it could not be opened then.
  return withChain(place, { ...nextOptions(read), secret, access: toReadAccess(read) }, async next => {
    refuseInside(file, next, named)
    return change(next)
  })
}

async function setName(
  located: Located,
  file: NativeFile,
  named: NativeBacking | undefined,
  read: ReadRebase,
): Promise<void> {
  if (named !== undefined && read.references !== 'layer') await refuseLoop(file, named, read)
  const { limits, signal, cache } = read
  const access = { ...toReadAccess(read), cache, write: { cache } }
  // A check needs no backing file.
  const opening = { needs: 'rebase', references: 'layer', limits, signal, access, forCheck: true } as const
  await withChain(located, opening, ({ image }) =>
    runJob<void>('rebase', read, (request, job, addon) => addon.setBackingFile(request, job, image, named)),
  )
}

/** Where the new backing file is: the caller named it, so it is followed unless a function decides. */
function locate(
  { path, absolutePath }: NativeFile,
  { filename, format }: NativeBacking,
  { references, signal }: ReadRebase,
): Promise<Located | undefined> {
  const policy = typeof references === 'function' ? references : 'allow'
  const named = { filename, ...(format !== undefined && { format }) }
  // What is no file of the system has no folder.
  const folder = absolutePath === undefined ? undefined : path
  return decide(policy, 'backing', named, path, folder, signal)
}

/** How the new backing chain is opened. */
const nextOptions = ({ references, limits, signal, backingFormat }: ReadRebase): ChainOptions => ({
  format: isFormat(backingFormat) ? backingFormat : undefined,
  references,
  limits,
  signal,
})

/** Refuses a name that makes the chain contain itself, as far as that can be seen: the files need not be there. */
async function refuseLoop(file: NativeFile, named: NativeBacking, read: ReadRebase): Promise<void> {
  try {
    const located = await locate(file, named, read)
    if (located === undefined) return
    await refuseItself(file, located, named)
    const next = await lookAtChain(located, { ...nextOptions(read), access: { ...READING, lock: undefined } })
    refuseInside(file, next, named)
  } catch (error) {
    throwIfAborted(read.signal)
    if (error instanceof Qcow2Error && error.code === 'ERR_QCOW2_CHAIN' && error.field === LOOP) throw error
  }
}

async function refuseItself(file: NativeFile, located: Located, named: NativeBacking): Promise<void> {
  const other = await openFile(located)
  await release(other.file)
  if (file.identity !== undefined && other.identity === file.identity) throw containsItself(file, named)
}

function refuseInside(file: NativeFile, next: Pick<Chain, 'identities'>, named: NativeBacking): void {
  if (file.identity !== undefined && next.identities.includes(file.identity)) throw containsItself(file, named)
}

const LOOP = 'backing'

function containsItself({ path }: NativeFile, { filename }: NativeBacking): Qcow2Error {
  const image = path === undefined ? 'the image' : `'${path}'`
  const message = `rebase: with the backing file '${filename}', the backing chain of ${image} would contain itself`
  return new Qcow2Error('ERR_QCOW2_CHAIN', message, { path, field: LOOP })
}
