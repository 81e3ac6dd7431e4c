/** Long work on threads of its own: progress is polled, cancellation cooperative. */

import { AbortError } from '../errors.js'
import { type Addon, native } from '../native.js'
import { type LongRunning, type Progress, throwIfAborted } from '../options.js'
import { isAborted, submit, toError } from './requests.js'

const PROGRESS_INTERVAL = 250

/** Jobs have numbers of their own: those of requests are used again as soon as they are delivered. */
let lastJob = 0

/** Hands a job to the addon: the number of the request that it answers, and its own. */
export type StartJob = (request: number, job: number, addon: Addon) => void

/**
 * Runs a job. Rejects with an `AbortError` if the signal cancelled it, with what `onProgress` threw if that did.
 */
export async function runJob<T>(phase: string, options: LongRunning, start: StartJob): Promise<T> {
  const { signal, onProgress, progressInterval } = options
  throwIfAborted(signal)
  lastJob += 1
  const job = lastJob
  const watch = new Watch(phase, job, onProgress)
  const timer = onProgress && setInterval(() => watch.look(), progressInterval ?? PROGRESS_INTERVAL).unref()
  const cancel = (): void => watch.cancel()
  signal?.addEventListener('abort', cancel, { once: true })
  try {
    const result = await submit<T>(request => start(request, job, native))
    watch.finish()
    watch.rethrow()
    return result
  } catch (failure) {
    watch.rethrow()
    if (isAborted(failure) && signal?.aborted) throw new AbortError(signal.reason)
    throw toError(failure)
  } finally {
    clearInterval(timer)
    signal?.removeEventListener('abort', cancel)
    watch.end()
  }
}

/**
 * What is asked of a job beside its outcome: in timers and in the signal's event, where nobody would catch what it throws.
 * The first exception, be it of `onProgress`, cancels the job and is what the job rejects with.
 */
class Watch {
  readonly #phase: string
  readonly #job: number
  readonly #onProgress: ((progress: Progress) => void) | undefined
  #thrown: { readonly error: unknown } | undefined

  constructor(phase: string, job: number, onProgress: ((progress: Progress) => void) | undefined) {
    this.#phase = phase
    this.#job = job
    this.#onProgress = onProgress
  }

  look(): void {
    this.#report((current, total) => [total > 0 ? Math.min(current, total) : current, total])
  }

  /** The last call: everything is done. */
  finish(): void {
    this.#report((current, total) => [Math.max(current, total), Math.max(current, total)])
  }

  cancel(): void {
    try {
      native.cancelJob(this.#job)
    } catch (error) {
      this.#thrown ??= { error: toError(error) }
    }
  }

  /** Waits for the job's thread, and forgets it. */
  end(): void {
    try {
      native.endJob(this.#job)
    } catch (error) {
      throw toError(error)
    }
  }

  rethrow(): void {
    if (this.#thrown !== undefined) throw this.#thrown.error
  }

  #report(shown: (current: number, total: number) => readonly [current: number, total: number]): void {
    if (this.#onProgress === undefined || this.#thrown !== undefined) return
    try {
      const [current, total] = shown(...this.#progress())
      this.#onProgress({ phase: this.#phase, current, total })
    } catch (error) {
      this.#thrown = { error }
      this.cancel()
    }
  }

  #progress(): [current: number, total: number] {
    try {
      return native.jobProgress(this.#job)
    } catch (error) {
      throw toError(error)
    }
  }
}
