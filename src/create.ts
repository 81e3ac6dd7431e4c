/** Creating images. */

import { READING, WRITING } from './access.js'
import { type Chain, type ChainOptions, lookAtChain, openChain } from './backing/chain.js'
import { readFileName } from './backing/filename.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { AbortError, invalidArgument, Qcow2Error } from './errors.js'
import { creationOf, DEFAULT_FORMAT, type Format, type TargetFormat } from './formats/table.js'
import { Image } from './image.js'
import { bytes, flag, LONG_RUNNING, type LongRunning, readOptions, throwIfAborted } from './options.js'
import { copyOf, forgetting, type ReadSecrets, type Secrets, secrets } from './secret.js'
import { SHAPE, type Shapes, toNativeShape, withParent } from './shape.js'
import { type Located, type PathLike, release, targetFormat, toPath } from './source.js'
import { exactStat } from './support/files.js'
import { runJob } from './support/jobs.js'
import { toName } from './text.js'
import type { Size } from './units.js'

/** Options of {@link create} for images of every format. */
export interface NewImageOptions extends LongRunning {
  /** Virtual size in bytes, rounded up to a multiple of 512. Default: the backing file's. */
  size?: Size | undefined
  /** Replace existing files, the data file's too, as {@link ConvertOptions.overwrite} has it. Default false: `EEXIST`. */
  overwrite?: boolean | undefined
  /**
   * What the backing file may pull in itself. The backing file is named by the caller, so it is opened in any case, except with
   * `'layer'`, which records the name unchecked and returns the new layer alone, for reading. Default `'deny'`.
   */
  references?: ReferencePolicy | undefined
  /** What opens encrypted layers below the new image. */
  secret?: Secrets | undefined
}

/**
 * Options of {@link create}: those of every image, and the shape of one of its format, `'qcow2'` unless it says otherwise. As QEMU makes it,
 * nothing is written to the disk of a luks image, which reads as noise until a guest writes to it.
 */
export type CreateOptions =
  | {
      [F in TargetFormat]: NewImageOptions &
        Shapes[F] & {
          /** What the image becomes. */
          format: F
        }
    }[TargetFormat]
  | (NewImageOptions &
      Shapes['qcow2'] & {
        /** Not said, it is qcow2. */
        format?: undefined
      })

const CREATE = {
  ...LONG_RUNNING,
  ...SHAPE,
  format: targetFormat,
  size: bytes,
  overwrite: flag,
  references: referencePolicy,
  secret: secrets,
} as const

/**
 * Creates an image and opens it, for writing too, unless it is of a kind that is written once. The file has its name only when it is complete: nothing is left of a failure or abort.
 * Both are on stable storage then.
 *
 * @throws {@link Qcow2Error} `EEXIST` unless `overwrite` is set; `ERR_QCOW2_INVALID_ARGUMENT` for options that contradict each
 *   other or the format; `ERR_QCOW2_LIMIT` for a size that the geometry cannot address; the system's code (`ENOSPC`, `EACCES`)
 *
 * @example
 * ```js
 * import { create } from 'qcow2'
 *
 * const image = await create('new.qcow2', { size: 20 * 2 ** 30, compressionType: 'zstd' })
 * await image.write(Buffer.from('hello'), { position: 0 })
 * await image.close()
 * ```
 */
export async function create(path: PathLike, options: CreateOptions): Promise<Image> {
  return await forgetting(() => createImage(path, options))
}

async function createImage(path: PathLike, options: CreateOptions): Promise<Image> {
  const target = toPath(path, 'path')
  const read = readOptions(options, 'create', CREATE)
  const { format = DEFAULT_FORMAT, size, overwrite, references = 'deny', secret: below, ...rest } = read
  const { signal, onProgress, progressInterval, concurrency, ...shape } = rest
  const unaware = toNativeShape('create', format, shape)
  const { backingFile, dataFile } = shape
  throwIfAborted(signal)
  const backing = await lookAtBacking(target, backingFile, shape.backingFormat, references, signal)
  const bytesInAll = size ?? backing?.virtualSize
  if (bytesInAll === undefined) {
    const why = backingFile === undefined ? 'without a backing file' : "where references: 'layer' leaves it unopened"
    throw invalidArgument('size', `create: size is needed ${why}`)
  }
  const wanted = await withParent('create', unaware, backing)
  const job = { signal, onProgress, progressInterval, concurrency }
  await runJob<void>('create', job, (request, number, addon) =>
    addon.createImage(request, number, target, bytesInAll, wanted, overwrite ?? false, backing?.identities ?? []),
  )
  // A layer alone cannot be written to: what surrounds a write comes from its backing file.
  const writable = references !== 'layer' || (backingFile === undefined && dataFile === undefined)
  const access = writable ? WRITING : READING
  const own = shape.encrypt?.secret
  const secret: ReadSecrets = async layer => (layer.depth === 0 ? own && copyOf(own) : below?.(layer))
  const named = creationOf(format).namelessBacking ? backing?.located : undefined
  const chain = await openNew(target, { below: named, format, references, secret, trustTop: true, signal, access })
  if (signal?.aborted) {
    await release(chain.image)
    throw new AbortError(signal.reason)
  }
  return new Image(chain)
}

/** Opens what was made: for reading where it is of a kind that is written once. */
async function openNew(path: string, options: ChainOptions): Promise<Chain> {
  try {
    return await openChain({ path }, options)
  } catch (error) {
    const once = error instanceof Qcow2Error && error.code === 'ERR_QCOW2_UNSUPPORTED_FEATURE'
    if (!once || options.access?.write === undefined) throw error
    return openChain({ path }, { ...options, access: READING })
  }
}

/** What is known of a backing file. */
type Backing = Pick<Chain, 'identities'> &
  Partial<Pick<Chain, 'virtualSize' | 'contentId' | 'absolutePath'> & { readonly located: Located }>

/**
 * Looks at the backing file before anything is made: whether it is there, how large it is, and what it stands on. With `'layer'` it is
 * not opened; it is not replaced by the new image all the same.
 */
async function lookAtBacking(
  target: string,
  backingFile: string | undefined,
  format: Format | undefined,
  references: ReferencePolicy,
  signal: AbortSignal | undefined,
): Promise<Backing | undefined> {
  if (backingFile === undefined) return undefined
  const name = readFileName(backingFile, target)
  if (references === 'layer') return { identities: 'path' in name ? await identityOf(name.path) : [] }
  if ('refused' in name) {
    const message = `create: the backing file '${backingFile}' cannot be opened: ${name.refused}`
    throw invalidArgument('backingFile', message)
  }
  const located = { path: name.path }
  return { ...(await lookAtChain(located, { format, references, signal })), located }
}

/** What `NativeFile.identity` would be, of a file that is not to be opened; nothing where there is none. */
async function identityOf(path: string): Promise<readonly string[]> {
  const found = await exactStat(toName(path)).catch(() => undefined)
  return found === undefined || process.platform === 'win32' ? [] : [`file:${found.dev}:${found.ino}`]
}
