/** An overlay under a running image: an external snapshot. */

import type { Chain } from './backing/chain.js'
import { readFileName } from './backing/filename.js'
import { invalidArgument } from './errors.js'
import { DEFAULT_FORMAT } from './formats/table.js'
import type { NativeOverlaid } from './native.js'
import { ABORTABLE, type Abortable, type Read, readOptions, storedName, throwIfAborted } from './options.js'
import { type Qcow2Shape, shape, toNativeShape } from './shape.js'
import { openFile, type PathLike, release, toPath } from './source.js'
import { runJob } from './support/jobs.js'
import type { Name } from './text.js'

/** Options of {@link Image.createOverlay}. */
export interface OverlayOptions extends Abortable {
  /**
   * The name by which the overlay refers to what becomes its backing file; a relative one is relative to the directory of the overlay.
   * Default: the image's absolute path.
   */
  backingFile?: Name | undefined
  /** Shape of the overlay. Its disk has the size of the image, and its data is in it. */
  create?: Omit<Qcow2Shape, 'backingFile' | 'backingFormat' | 'dataFile' | 'dataFileRaw' | 'keepDataFile'> | undefined
}

const OVERLAY = { ...ABORTABLE, backingFile: storedName, create: shape } as const

/** Reads the arguments. */
export function readOverlayOptions(path: PathLike, options: OverlayOptions | undefined): ReadOverlay {
  const read = readOptions(options, 'Image.createOverlay', OVERLAY)
  for (const name of ['backingFile', 'backingFormat', 'dataFile', 'dataFileRaw', 'keepDataFile'] as const) {
    if (read.create?.[name] !== undefined) {
      throw invalidArgument(name, `Image.createOverlay: create.${name} is not for an overlay of an open image`)
    }
  }
  return { ...read, path: toPath(path, 'path') }
}

type ReadOverlay = Read<typeof OVERLAY> & { readonly path: string }

/** Makes the overlay and puts it on top; tells the chain that there is then. The caller keeps the image open meanwhile. */
export async function putOverlay(chain: Chain, read: ReadOverlay): Promise<Chain> {
  const { path, signal } = read
  const backingFile = await nameOfTop(chain, read)
  throwIfAborted(signal)
  const wanted = { ...read.create, backingFile, backingFormat: chain.format }
  const order = {
    shape: toNativeShape('Image.createOverlay', DEFAULT_FORMAT, wanted),
    inUse: chain.identities,
    write: { ...chain.access.write, cache: chain.access.cache },
    lock: chain.access.lock,
    l2CacheSize: chain.l2CacheSize,
  }
  const made = await runJob<NativeOverlaid>('overlay', { signal }, (request, job, addon) =>
    addon.createOverlay(request, job, chain.image, path, order),
  )
  const { identity } = made
  return {
    ...chain,
    path: made.path,
    absolutePath: made.absolutePath,
    format: DEFAULT_FORMAT,
    clusterSize: made.clusterSize,
    depth: chain.depth + 1,
    hasDataFile: false,
    identities: identity === undefined ? chain.identities : [identity, ...chain.identities],
    layers: [identity, ...chain.layers],
  }
}

/** The name to store. It leads from the overlay to the image: the file may have been moved since it was opened. */
async function nameOfTop(chain: Chain, { backingFile = chain.absolutePath, path }: ReadOverlay): Promise<string> {
  if (backingFile === undefined) {
    throw invalidArgument(
      'backingFile',
      'Image.createOverlay: the image was opened without a path: say its backingFile',
    )
  }
  const name = readFileName(backingFile, path)
  if ('refused' in name) {
    throw invalidArgument('backingFile', `Image.createOverlay: '${backingFile}' cannot be followed: ${name.refused}`)
  }
  const { file, identity } = await openFile({ path: name.path })
  await release(file)
  const [top] = chain.layers
  if (top !== undefined && identity !== top) {
    const message = `Image.createOverlay: '${backingFile}' is '${name.path}', which is not the image`
    throw invalidArgument('backingFile', message)
  }
  return backingFile
}
