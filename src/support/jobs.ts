/** Long work on threads of its own: progress is polled, cancellation cooperative. */

// Not the global one, which test runners replace by a fake that never fires by itself.
import { setImmediate } from 'node:timers'
import { AbortError } from '../errors.js'
import { type Addon, native } from '../native.js'
import { type LongRunning, throwIfAborted } from '../options.js'
import { isAborted, submit, toError } from './requests.js'
import { onAbort } from './signals.js'

const PROGRESS_INTERVAL = 250

/** Jobs have numbers of their own: those of requests are used again as soon as they are delivered. */
let lastJob = 0

/** Hands a job to the addon: the number of the request that it answers, and its own. */
export type StartJob = (request: number, job: number, addon: Addon) => void

/**
 * Runs a job. Rejects with an `AbortError` if the signal cancelled it, with the failure of `onProgress` if that failed.
 */
export async function runJob<T>(phase: string, options: LongRunning, start: StartJob): Promise<T> {
  const { signal, onProgress, progressInterval } = options
  throwIfAborted(signal)
  lastJob += 1
  const job = lastJob
  const watch = new Watch(phase, job, onProgress)
  const timer = onProgress && setInterval(() => watch.look(), progressInterval ?? PROGRESS_INTERVAL).unref()
  let forget = (): void => {}
  try {
    forget = onAbort(signal, () => watch.cancel())
    const result = await submit<T>(request => start(request, job, native))
    clearInterval(timer)
    await watch.finish()
    watch.rethrow()
    return result
  } catch (failure) {
    watch.rethrow()
    if (isAborted(failure) && signal?.aborted) throw new AbortError(signal.reason)
    throw toError(failure)
  } finally {
    clearInterval(timer)
    forget()
    watch.end()
  }
}

/** What a job left behind that goes on: a connection, which the job ends when it is cancelled. */
export interface Held<T> {
  readonly value: T
  /** The signal ends it no more. */
  detach(): void
  /** It is not used any more. */
  end(): void
  /** It is going to be ended: nobody waits for ever for what it stands on. */
  closing?(): void
  /** Resolves when what it stands on was closed. */
  readonly ended?: Promise<void>
}

/** What a job of this process left behind. */
export interface HeldJob<T> extends Held<T> {
  /** Does what the signal does. */
  cancel(): void
}

/** Runs a job of which something goes on until it is ended: the signal ends that, too. */
export async function runHeld<T>(signal: AbortSignal | undefined, start: StartJob): Promise<HeldJob<T>> {
  throwIfAborted(signal)
  lastJob += 1
  const job = lastJob
  const cancel = (): void => {
    // In the signal's event nobody would catch what it throws: an environment that ends, where the job has ended, too.
    try {
      native.cancelJob(job)
    } catch {}
  }
  const detach = onAbort(signal, cancel)
  const end = (): void => {
    detach()
    native.endJob(job)
  }
  try {
    return { value: await submit<T>(request => start(request, job, native)), detach, end, cancel }
  } catch (failure) {
    end()
    if (isAborted(failure) && signal?.aborted) throw new AbortError(signal.reason)
    throw toError(failure)
  }
}

/** A turn of the event loop. */
const turn = (): Promise<void> => new Promise(resolve => setImmediate(resolve))

/**
 * What is asked of a job beside its outcome: in timers and in the signal's event, where nobody would catch what it throws.
 * The first failure, be it of `onProgress` or of what that returned, cancels the job and is what the job rejects with.
 */
class Watch {
  readonly #phase: string
  readonly #job: number
  readonly #onProgress: LongRunning['onProgress']
  #failure: { readonly error: unknown } | undefined
  #ended = false
  #warned = false

  constructor(phase: string, job: number, onProgress: LongRunning['onProgress']) {
    this.#phase = phase
    this.#job = job
    this.#onProgress = onProgress
  }

  look(): void {
    this.#report((current, total) => [total > 0 ? Math.min(current, total) : current, total])
  }

  /** The last call: everything is done. A function that fails soon still fails its job. */
  async finish(): Promise<void> {
    if (this.#onProgress === undefined) return
    this.#report((current, total) => [Math.max(current, total), Math.max(current, total)])
    await turn()
  }

  cancel(): void {
    try {
      native.cancelJob(this.#job)
    } catch (error) {
      this.#failure ??= { error: toError(error) }
    }
  }

  /** Forgets the job. */
  end(): void {
    this.#ended = true
    try {
      native.endJob(this.#job)
    } catch (error) {
      throw toError(error)
    }
  }

  rethrow(): void {
    if (this.#failure !== undefined) throw this.#failure.error
  }

  #report(shown: (current: number, total: number) => readonly [current: number, total: number]): void {
    if (this.#onProgress === undefined || this.#failure !== undefined) return
    try {
      const [done, all, ...steps] = this.#progress()
      const [current, total] = shown(done, all)
      const returned = this.#onProgress({ phase: this.#phase, current, total, steps })
      Promise.resolve(returned).catch((error: unknown) => this.#fail(error))
    } catch (error) {
      this.#fail(error)
    }
  }

  #fail(error: unknown): void {
    if (this.#ended) {
      // Once: what is wrong with one call is wrong with all that are still under way.
      if (this.#warned) return
      this.#warned = true
      const reason = error instanceof Error ? error.message : String(error)
      const message = `onProgress failed when its job '${this.#phase}' had ended: ${reason}`
      process.emitWarning(message, { code: 'QCOW2_CALLBACK' })
      return
    }
    if (this.#failure !== undefined) return
    this.#failure = { error }
    this.cancel()
  }

  #progress(): ReturnType<Addon['jobProgress']> {
    try {
      return native.jobProgress(this.#job)
    } catch (error) {
      throw toError(error)
    }
  }
}
