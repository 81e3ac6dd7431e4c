/** Waiting for jobs to end, wherever they run. */

import type { Queue, QueueEvents } from 'bullmq'
import { AbortError, Qcow2Error } from '../errors.js'
import { ABORTABLE, callback, readOptions, throwIfAborted } from '../options.js'
import { onAbort } from '../support/signals.js'
import { toFailure } from './failure.js'
import { type FinishOptions, type JobProgress, readProgress } from './progress.js'

const FINISH = { ...ABORTABLE, onProgress: callback<(progress: JobProgress) => unknown>() } as const

interface Waiter {
  readonly resolve: (result: unknown) => void
  readonly reject: (error: unknown) => void
  readonly onProgress: FinishOptions['onProgress']
}

/** Milliseconds between two looks at the jobs themselves: events can be missed while a connection is away. */
const LOOK = 5000

export class Finishes {
  readonly #listen: () => QueueEvents
  readonly #queue: Queue
  readonly #waiters = new Map<string, Set<Waiter>>()
  #events: QueueEvents | undefined
  #timer: NodeJS.Timeout | undefined

  constructor(listen: () => QueueEvents, queue: Queue) {
    this.#listen = listen
    this.#queue = queue
  }

  async of(id: string, options?: FinishOptions): Promise<unknown> {
    const { signal, onProgress } = readOptions(options, 'finished', FINISH)
    throwIfAborted(signal)
    let forget = (): void => {}
    try {
      return await new Promise((resolve, reject) => {
        const waiter = { resolve, reject, onProgress }
        const all = this.#waiters.get(id) ?? new Set()
        this.#waiters.set(id, all.add(waiter))
        const stop = onAbort(signal, () => reject(new AbortError(signal?.reason)))
        forget = () => {
          stop()
          all.delete(waiter)
          if (all.size === 0) this.#waiters.delete(id)
        }
        this.#begin(id).catch(reject)
      })
    } finally {
      forget()
      if (this.#waiters.size === 0) clearInterval(this.#timer)
    }
  }

  /** Ends the waiting. */
  async close(): Promise<void> {
    clearInterval(this.#timer)
    const closed = new Qcow2Error('ERR_QCOW2_CLOSED', 'the queue was closed while somebody waited for a job')
    for (const id of this.#waiters.keys()) this.#each(id, ({ reject }) => reject(closed))
    // Its connection waits for events, and for nothing else: nothing is lost by cutting it.
    await this.#events?.backend.close(true).catch(() => {})
    await this.#events?.close().catch(() => {})
  }

  /** It listens first, and then looks: what ends in between is heard of. */
  async #begin(id: string): Promise<void> {
    this.#events ??= this.#hear(this.#listen())
    this.#timer ??= setInterval(() => void this.#lookAtAll(), LOOK).unref()
    await this.#events.waitUntilReady()
    await this.#look(id)
  }

  #hear(events: QueueEvents): QueueEvents {
    // It connects again by itself.
    events.on('error', () => {})
    events.on('completed', ({ jobId, returnvalue }) => this.#each(jobId, ({ resolve }) => resolve(returnvalue)))
    events.on('failed', ({ jobId, failedReason }) => this.#fail(jobId, failedReason))
    events.on('removed', ({ jobId }) => this.#fail(jobId, undefined))
    events.on('progress', ({ jobId, data }) => {
      const progress = readProgress(data)
      if (progress !== undefined) this.#each(jobId, waiter => tell(waiter, progress))
    })
    return events
  }

  async #lookAtAll(): Promise<void> {
    for (const id of this.#waiters.keys()) await this.#look(id).catch(() => {})
  }

  async #look(id: string): Promise<void> {
    const job = await this.#queue.getJob(id)
    if (job === undefined) return this.#fail(id, undefined)
    if (await job.isCompleted()) {
      const { returnvalue } = (await this.#queue.getJob(id)) ?? job
      this.#each(id, ({ resolve }) => resolve(returnvalue))
    } else if (await job.isFailed()) {
      const { failedReason = '' } = (await this.#queue.getJob(id)) ?? job
      this.#fail(id, failedReason)
    }
  }

  #fail(id: string, reason: string | undefined): void {
    const gone = new AbortError(new Error(`the job '${id}' is not in the queue: it was cancelled or dropped`))
    const error = reason === undefined ? gone : toFailure(id, reason)
    this.#each(id, ({ reject }) => reject(error))
  }

  #each(id: string, act: (waiter: Waiter) => void): void {
    for (const waiter of this.#waiters.get(id) ?? []) act(waiter)
  }
}

function tell({ onProgress, reject }: Waiter, progress: JobProgress): void {
  try {
    Promise.resolve(onProgress?.(progress)).catch(reject)
  } catch (error) {
    reject(error)
  }
}
