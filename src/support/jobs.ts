/** Long work on threads of its own: progress is polled, cancellation cooperative. */

import { AbortError } from '../errors.js'
import { type Addon, native } from '../native.js'
import { type LongRunning, type Progress, throwIfAborted } from '../options.js'
import { submit, toError } from './requests.js'

const PROGRESS_INTERVAL = 250

/** The engine's code for a job that was cancelled. */
const isAborted = (failure: unknown): boolean =>
  typeof failure === 'object' && failure !== null && 'code' in failure && failure.code === 'ERR_QCOW2_ABORTED'

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
  const cancel = (): void => native.cancelJob(job)
  const watch = onProgress && new Watch(phase, job, onProgress, cancel)
  const timer = watch && setInterval(() => watch.look(), progressInterval ?? PROGRESS_INTERVAL).unref()
  signal?.addEventListener('abort', cancel, { once: true })
  try {
    const result = await submit<T>(request => start(request, job, native))
    watch?.finish()
    watch?.rethrow()
    return result
  } catch (failure) {
    watch?.rethrow()
    if (isAborted(failure) && signal?.aborted) throw new AbortError(signal.reason)
    throw toError(failure)
  } finally {
    clearInterval(timer)
    signal?.removeEventListener('abort', cancel)
    native.endJob(job)
  }
}

/** Calls `onProgress`; its first exception cancels the job and is what the job rejects with. */
class Watch {
  readonly #phase: string
  readonly #job: number
  readonly #onProgress: (progress: Progress) => void
  readonly #cancel: () => void
  #thrown: { readonly error: unknown } | undefined

  constructor(phase: string, job: number, onProgress: (progress: Progress) => void, cancel: () => void) {
    this.#phase = phase
    this.#job = job
    this.#onProgress = onProgress
    this.#cancel = cancel
  }

  look(): void {
    const [current, total] = native.jobProgress(this.#job)
    this.#report(total > 0 ? Math.min(current, total) : current, total)
  }

  /** The last call: everything is done. */
  finish(): void {
    const [current, total] = native.jobProgress(this.#job)
    const all = Math.max(current, total)
    this.#report(all, all)
  }

  rethrow(): void {
    if (this.#thrown !== undefined) throw this.#thrown.error
  }

  #report(current: number, total: number): void {
    if (this.#thrown !== undefined) return
    try {
      this.#onProgress({ phase: this.#phase, current, total })
    } catch (error) {
      this.#thrown = { error }
      this.#cancel()
    }
  }
}
