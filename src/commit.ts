/** Committing: what an overlay has goes into a layer below it. */

import { ACCESS, type CacheMode, SHARING, type SharingOptions, toReadAccess } from './access.js'
import { type ChainOptions, lookAtChain, withChain } from './backing/chain.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { invalidArgument, Qcow2Error } from './errors.js'
import {
  bytes,
  flag,
  type Limits,
  LONG_RUNNING,
  type LongRunning,
  limits,
  type Read,
  readOptions,
  throwIfAborted,
} from './options.js'
import { forgetting, type Secrets, secrets } from './secret.js'
import { type ImageSource, type Located, openFile, release, toLocated } from './source.js'
import { runJob } from './support/jobs.js'
import type { Size } from './units.js'

/** Options of {@link commit}. */
export interface CommitOptions extends LongRunning, Pick<SharingOptions, 'locking'> {
  /** What the image and its chain may pull in. Default `'deny'`; a commit opens the backing file, so it needs more. */
  references?: ReferencePolicy | undefined
  /** The layer to commit into: a file of the image's backing chain. Default: the backing file itself. */
  base?: ImageSource | undefined
  /**
   * Leave the image as it is. By default it is emptied once the backing file has everything. A commit into a deeper base always
   * leaves it: the layers between would show through.
   */
  drop?: boolean | undefined
  /** What opens encrypted layers. */
  secret?: Secrets | undefined
  /** Default `'writeback'`. */
  cache?: CacheMode | undefined
  /** At most this many bytes a second; 0, the default, for as fast as it goes. */
  rate?: Size | undefined
  /** What the image may claim before it is refused. */
  limits?: Limits | undefined
}

const COMMIT = {
  ...LONG_RUNNING,
  locking: SHARING.locking,
  references: referencePolicy,
  secret: secrets,
  base: toLocated,
  drop: flag,
  cache: ACCESS.cache,
  rate: bytes,
  limits,
} as const

type ReadCommit = Read<typeof COMMIT>

/**
 * Writes what a qcow2 image and the layers between have into a base below them, which grows if it is smaller, and empties the image.
 * The image reads the same all the while: interrupted at any point, it reads as before, and the commit can be run again. The
 * image's internal snapshots keep what they have; what they read from the base is what the base has now. Persistent bitmaps of the base are kept current. Other images on the base, and the layers between after a
 * commit into a deeper base, do not read as before.
 *
 * @throws {@link Qcow2Error} as `open`; `ERR_QCOW2_CHAIN` for an image without a backing file; `ERR_QCOW2_INVALID_ARGUMENT` for a base
 *   that is not in its chain; `ERR_QCOW2_LOCKED` while somebody else uses a file of the chain
 *
 * @example
 * ```js
 * import { commit } from 'qcow2'
 *
 * // What the overlay has is in its backing file then, and the overlay is empty.
 * await commit('overlay.qcow2', { references: 'allow' })
 * ```
 */
export async function commit(top: ImageSource, options?: CommitOptions): Promise<void> {
  return await forgetting(() => commitImage(top, options))
}

async function commitImage(top: ImageSource, options?: CommitOptions): Promise<void> {
  const located = toLocated(top, 'top')
  const read = readOptions(options, 'commit', COMMIT)
  if (read.references === 'layer') {
    throw invalidArgument(
      'references',
      "commit: references: 'layer' leaves out the backing file, which is to be written",
    )
  }
  throwIfAborted(read.signal)
  const depth = read.base === undefined ? 1 : await depthOf(located, read.base, read)
  const empty = depth === 1 && !read.drop
  if (depth > 1 && read.drop === false) {
    const message =
      'commit: after a commit into a deeper base the image cannot be emptied: the layers between would show through'
    throw invalidArgument('drop', message)
  }
  const write = { cache: read.cache }
  const access = { ...toReadAccess(read), cache: read.cache, write }
  const opening = { ...chainOptions(read), secret: read.secret, access, base: depth, keepTop: !empty }
  await withChain(located, opening, async ({ image, base }) => {
    if (base === undefined) return
    const { concurrency, rate } = read
    await runJob<void>('commit', read, (request, job, addon) =>
      addon.commitImage(request, job, image, base, { empty, concurrency, rate }),
    )
  })
}

const chainOptions = ({ references, limits, signal }: ReadCommit): ChainOptions => ({
  needs: 'commit',
  references,
  limits,
  signal,
})

/** How deep in the chain the base is. */
async function depthOf(top: Located, base: Located, read: ReadCommit): Promise<number> {
  const file = await openFile(base, {}, read.signal)
  await release(file.file)
  const chain = await lookAtChain(top, { ...chainOptions(read), access: toReadAccess(read) })
  const depth = file.identity === undefined ? -1 : chain.layers.indexOf(file.identity)
  if (depth >= 1) return depth
  const name = file.path === undefined ? 'the base' : `'${file.path}'`
  const of = chain.path === undefined ? 'the image' : `'${chain.path}'`
  throw new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', `commit: ${name} is not in the backing chain of ${of}`, {
    path: file.path,
    field: 'base',
  })
}
