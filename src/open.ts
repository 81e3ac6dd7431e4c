/** Opening images. */

import { ACCESS, type AccessOptions, toAccess } from './access.js'
import { type Need, openChain } from './backing/chain.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { AbortError, invalidArgument } from './errors.js'
import { can, type Format } from './formats/table.js'
import { Image } from './image.js'
import { ABORTABLE, type Abortable, bytes, type Limits, limits, name, readOptions, throwIfAborted } from './options.js'
import { forgetting, type Secrets, secrets } from './secret.js'
import { detach, format, type ImageSource, release, toLocated } from './source.js'
import type { Name } from './text.js'
import type { Size } from './units.js'

/** Options of {@link open}. */
export interface OpenOptions extends AccessOptions, Abortable {
  /** Default: by its magic. Raw has none, and must be said: a guest can write any header into its raw disk. */
  format?: Format | undefined
  /** What the image may pull in. Default `'deny'`. */
  references?: ReferencePolicy | undefined
  /** What opens encrypted layers. */
  secret?: Secrets | undefined
  /** Id or name of an internal snapshot: the handle is a read-only view of it. */
  snapshot?: Name | undefined
  /** Most bytes of L2 tables kept in memory, for each layer. Default: enough for the whole image, 32 MiB at most. */
  l2CacheSize?: Size | undefined
  /** What the image may claim before it is refused. */
  limits?: Limits | undefined
}

const OPEN = {
  ...ABORTABLE,
  ...ACCESS,
  format,
  references: referencePolicy,
  secret: secrets,
  snapshot: name,
  l2CacheSize: bytes,
  limits,
} as const

/**
 * Opens an image, for reading unless `flags` says more. It is refused if it names a backing file or data file, unless
 * `references` says what to do about it.
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_FORMAT_UNKNOWN`, `ERR_QCOW2_INVALID_HEADER`, `ERR_QCOW2_UNSUPPORTED_FEATURE`,
 *   `ERR_QCOW2_BAD_SECRET` (a secret that does not open the image; for writing also a missing one),
 *   `ERR_QCOW2_CORRUPT`, `ERR_QCOW2_LIMIT`, `ERR_QCOW2_REFERENCE_DENIED`, `ERR_QCOW2_CHAIN`, `ERR_QCOW2_NO_SNAPSHOT`,
 *   `ERR_QCOW2_LOCKED` if another process uses the image in a way that excludes this one, or the system's code (`ENOENT`,
 *   `EACCES`). For writing also `ERR_QCOW2_CORRUPT` for an image that is marked corrupt, or that was not
 *   closed cleanly and cannot be repaired
 *
 * @example
 * ```js
 * import { open } from 'qcow2'
 *
 * const image = await open('disk.qcow2')
 * const { buffer } = await image.read(Buffer.alloc(512), { position: 0 })
 * await image.close()
 * ```
 */
export async function open(source: ImageSource, options?: OpenOptions): Promise<Image> {
  return openFor(undefined, source, options)
}

/** As {@link open}, for a job that needs something of the image. */
export async function openFor(needs: Need | undefined, source: ImageSource, options?: OpenOptions): Promise<Image> {
  return await forgetting(() => openImage(needs, source, options))
}

/** As {@link open}, for a program that lays out what it writes as QEMU does: the first free clusters, one behind the other. */
export async function openFirstFit(source: ImageSource, options?: OpenOptions): Promise<Image> {
  return await forgetting(() => openImage(undefined, source, options, true))
}

async function openImage(
  needs: Need | undefined,
  source: ImageSource,
  options: OpenOptions | undefined,
  firstFit?: boolean,
): Promise<Image> {
  const located = toLocated(source, 'source')
  const read = readOptions(options, 'open', OPEN)
  const given = toAccess('open', read)
  const access = { ...given, write: given.write && { ...given.write, firstFit } }
  if (access.write !== undefined && read.snapshot !== undefined) {
    throw invalidArgument('snapshot', "open: a snapshot is a read-only view: it cannot be opened with flags: 'r+'")
  }
  if (read.format !== undefined && read.snapshot !== undefined && !can(read.format, 'snapshots')) {
    throw invalidArgument('snapshot', `open: a ${read.format} image has no snapshots`)
  }
  throwIfAborted(read.signal)
  const { format, references, secret, snapshot, l2CacheSize, limits, signal } = read
  const opening = { format, needs, references, secret, snapshot, l2CacheSize, limits, signal, access }
  const chain = await openChain(located, opening)
  detach(chain.image)
  if (read.signal?.aborted) {
    await release(chain.image)
    throw new AbortError(read.signal.reason)
  }
  return new Image(chain)
}
