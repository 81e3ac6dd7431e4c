/** Copies of an open disk as it is at one moment, made while it is written to. */

import { invalidArgument, Qcow2Error } from './errors.js'
import type { TargetFormat } from './formats/table.js'
import type { NativeCloned, NativeCloneOrder } from './native.js'
import type { NbdSource } from './nbd-source.js'
import { callback, flag, LONG_RUNNING, type LongRunning, type Read, readOptions } from './options.js'
import type { RandomAccessSource } from './random-access.js'
import { nameOf, openTargetFile, refuseNew, type TargetPlace, toPlace } from './remote-target.js'
import { type Compression, compression, type Shape, shape, toTarget } from './shape.js'
import { type PathLike, release, targetFormat } from './source.js'
import { runJob } from './support/jobs.js'
import { answer, onAbort } from './support/signals.js'
import { type BigIntResults, sizesIn } from './units.js'

/** Options of {@link Image.clone}. */
export interface CloneOptions extends LongRunning {
  /** Format of the copy. */
  to: TargetFormat
  /** Compress every cluster that shrinks. qcow2 only. Requests that have to copy first compress, too. */
  compress?: boolean | Compression | undefined
  /** Shape of the copy. It is whole: it has no backing file. */
  create?: Shape | undefined
  /** Replace an existing file, as {@link ConvertOptions.overwrite} has it. Default false: `EEXIST`. */
  overwrite?: boolean | undefined
  /**
   * Called once, when the point in time has passed: what is written from now on is not in the copy, what was written before is.
   * The moment to let a guest go on that was told to be quiet. What it returns is awaited before the rest is copied. If it throws or
   * rejects, the clone ends, leaves no file, and rejects with that. One that never settles holds the clone up until `signal` or closing the
   * image ends it.
   */
  onPointInTime?: (() => unknown) | undefined
}

/** What a clone did. */
export interface CloneResult<N extends number | bigint = number> {
  /** Size of the disk in bytes. */
  readonly virtualSize: N
  /** Bytes of guest data read. */
  readonly bytesRead: N
  /** Bytes of guest data written to the copy; zeroes are left out. */
  readonly bytesWritten: N
  /** Milliseconds from the call to the end. */
  readonly durationMs: number
}

const CLONE = {
  ...LONG_RUNNING,
  to: targetFormat,
  compress: compression,
  create: shape,
  overwrite: flag,
  onPointInTime: callback<() => unknown>(),
  bigint: flag,
} as const

/** What cloning needs of the image. */
interface Source {
  /** The addon's number of the image. */
  readonly image: number
  path(): string | undefined
  /** Files that are no target. */
  identities(): readonly string[]
}

/** The clones of one image that are under way. */
export class Clones {
  readonly #source: Source
  readonly #closing = new AbortController()

  constructor(source: Source) {
    this.#source = source
  }

  /** Ends them: the image is closing. */
  end(): void {
    this.#closing.abort()
  }

  /** Makes one. The caller keeps the image open meanwhile. */
  async make(target: TargetPlace, options: ReadClone): Promise<CloneResult<number | bigint>> {
    const { signal } = options
    const begin = performance.now()
    // Two may end it: the caller's signal, and closing the image.
    const ending = new AbortController()
    const forgetSignal = onAbort(signal, () => ending.abort(signal?.reason))
    const forgetClosing = onAbort(this.#closing.signal, () => ending.abort())
    try {
      const cloned = await this.#run(target, { ...options, signal: ending.signal })
      return { ...resultIn(cloned, options.bigint), durationMs: performance.now() - begin }
    } catch (error) {
      if (!this.#closing.signal.aborted || signal?.aborted || !ending.signal.aborted) throw error
      const path = this.#source.path()
      const what = path === undefined ? 'the image' : `the image '${path}'`
      const message = `${what} was closed before its clone was complete`
      throw new Qcow2Error('ERR_QCOW2_CLOSED', message, { path, cause: error })
    } finally {
      forgetSignal()
      forgetClosing()
    }
  }

  async #run(target: TargetPlace, options: ReadClone): Promise<NativeCloned> {
    if ('path' in target) return await this.#copy(target.path, undefined, options)
    const file = await openTargetFile('Image.clone', target, this.#source.identities(), options.signal)
    let cloned: NativeCloned
    try {
      cloned = await this.#copy(nameOf(target), file, options)
    } catch (error) {
      // Why it failed is said already.
      await release(file).catch(() => undefined)
      throw error
    }
    await release(file)
    return cloned
  }

  async #copy(path: string, targetFile: number | undefined, options: ReadClone): Promise<NativeCloned> {
    const { image } = this.#source
    const { signal, concurrency, onPointInTime } = options
    const order: NativeCloneOrder = { ...toOrder(options), inUse: this.#source.identities(), targetFile }
    const clone = await runJob<number>('clone', { signal }, (request, job, addon) =>
      addon.beginClone(request, job, image, path, order),
    )
    try {
      if (onPointInTime !== undefined) await answer(onPointInTime, signal)
      return await runJob<NativeCloned>('clone', options, (request, job, addon) =>
        addon.runClone(request, job, clone, concurrency),
      )
    } finally {
      // Nothing if it ran.
      await release(clone)
    }
  }
}

/** Sizes of what was done as the caller wants them. */
function resultIn(cloned: NativeCloned, big: boolean | undefined): Omit<CloneResult<number | bigint>, 'durationMs'> {
  const size = sizesIn(big)
  return {
    virtualSize: size(cloned.virtualSize, 'virtualSize'),
    bytesRead: size(cloned.bytesRead, 'bytesRead'),
    bytesWritten: size(cloned.bytesWritten, 'bytesWritten'),
  }
}

type ReadClone = Read<typeof CLONE>

/** Reads the options, and checks what they demand of each other. */
export function readCloneOptions(
  target: PathLike | NbdSource | RandomAccessSource,
  options: CloneOptions & BigIntResults,
): { target: TargetPlace; options: ReadClone } {
  const place = toPlace(target)
  const read = readOptions(options, 'Image.clone', CLONE)
  if (!('path' in place)) refuseNew('Image.clone', place, read)
  toOrder(read)
  return { target: place, options: read }
}

function toOrder({ to, compress, create, overwrite = false }: ReadClone): Omit<NativeCloneOrder, 'inUse'> {
  if (create?.backingFile !== undefined || create?.backingFormat !== undefined) {
    throw invalidArgument('backingFile', 'Image.clone: a clone holds the whole disk: it has no backing file')
  }
  return { ...toTarget('Image.clone', to, create, compress), overwrite }
}
