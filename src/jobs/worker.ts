/** A worker: takes jobs off a queue and does them, on the machine where it runs. */

import { hostname } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import type { Job, Processor, Worker, WorkerOptions } from 'bullmq'
import { AbortError } from '../errors.js'
import { readOptions, throwIfAborted } from '../options.js'
import { answer, onAbort } from '../support/signals.js'
import { answered, DEFAULT_PREFIX, DEFAULT_QUEUE, DEFAULT_TIMEOUT, needed } from './connection.js'
import { CANCELLED, isFinal, reasonOf } from './failure.js'
import { cancelledBecause, fenceOf } from './fence.js'
import { type JobKind, jobKind, readJob } from './kinds.js'
import { loadBullMq, type Queues } from './peers.js'
import { type Means, perform } from './perform.js'
import { Reports } from './progress.js'
import { Roots } from './roots.js'
import { Running } from './running.js'
import { LockLost } from './target.js'
import {
  CLOSE,
  DEFAULT,
  type JobWorker,
  type JobWorkerOptions,
  type ReadWorker,
  WORKER,
  type WorkerEvent,
} from './worker-options.js'

/** Milliseconds between two looks for jobs that are cancelled, or lost. */
const LOOK = 500

/**
 * Starts a worker on a queue of {@link openQueue}: `convert`, `check`, `inspect`, `compact` and `upload`, on files below its `roots`. Resolves
 * when it is connected; a connection that is lost later is made again.
 *
 * Every job is done by whoever takes it, and begun again by another when that one is lost. A target appears once, whole: an attempt makes a
 * file beside it, asks for its lock, and renames the file only then; whoever took the job over has removed that file before.
 *
 * @throws `Qcow2Error` `ERR_QCOW2_PEER_MISSING` without BullMQ; `ENOENT` for a root that is not there; the system's code (`ECONNREFUSED`,
 *   `ETIMEDOUT`) where the queue does not answer within `timeout`
 * @example
 * const worker = await startWorker({ connection: 'redis://queue.internal', roots: '/srv/images', concurrency: 2 })
 * process.once('SIGTERM', () => worker.close())
 * await worker.closed
 */
export async function startWorker(options: JobWorkerOptions): Promise<JobWorker> {
  const read = readOptions(options, 'startWorker', WORKER)
  needed(read.connection, 'startWorker', 'connection')
  const roots = await Roots.of(needed(read.roots, 'startWorker', 'roots'))
  throwIfAborted(read.signal)
  const worker = new QueueWorker(loadBullMq(), read, toMeans(read, roots, options))
  await worker.connected(read.timeout, read.signal)
  onAbort(read.signal, () => void worker.close())
  return worker
}

function toMeans(read: ReadWorker, roots: Roots, { limits }: JobWorkerOptions): Means {
  const { uploadHeaders, concurrency = DEFAULT.concurrency } = read
  return {
    roots,
    references: read.references ?? 'deny',
    secret: read.secret,
    // As they were given: the call reads them again.
    limits,
    threads: read.threads,
    rate: read.rate === undefined ? undefined : Math.max(1, Math.floor(read.rate / concurrency)),
    uploads: read.uploads ?? [],
    uploadHeaders: uploadHeaders && (async url => uploadHeaders(url)),
    progressInterval: read.progressInterval ?? DEFAULT.progressInterval,
  }
}

interface EndableWorker extends Worker {
  /** Ends all that would keep the process alive. What it asked the queue for fails. */
  abandon(): Promise<void>
}

/** BullMQ's worker: its `close` waits for a queue that is away. */
function workerOf(queues: Queues): new (name: string, work: Processor, options: WorkerOptions) => EndableWorker {
  return class extends queues.Worker {
    async abandon(): Promise<void> {
      await this.pause(true)
      await this.lockManager.close()
      await this.backend.close(true).catch(() => {})
    }
  }
}

class QueueWorker implements JobWorker {
  readonly name = `${hostname()}:${process.pid}`
  readonly closed: Promise<void>
  readonly #queues: Queues
  readonly #worker: EndableWorker
  readonly #means: Means
  readonly #read: ReadWorker
  readonly #lockDuration: number
  readonly #attempts = new Map<string, Running>()
  readonly #timer: NodeJS.Timeout
  #lastError: unknown
  #looking = false
  #closing: Promise<void> | undefined
  #setClosed = (): void => {}

  constructor(queues: Queues, read: ReadWorker, means: Means) {
    this.#queues = queues
    this.#read = read
    this.#means = means
    this.#lockDuration = read.lockDuration ?? DEFAULT.lockDuration
    this.closed = new Promise(resolve => {
      this.#setClosed = resolve
    })
    const Ours = workerOf(queues)
    this.#worker = new Ours(read.queue ?? DEFAULT_QUEUE, (job: Job, token = '') => this.#process(job, token), {
      connection: { ...read.connection },
      prefix: read.prefix ?? DEFAULT_PREFIX,
      name: this.name,
      concurrency: read.concurrency ?? DEFAULT.concurrency,
      lockDuration: this.#lockDuration,
      stalledInterval: this.#lockDuration,
      maxStalledCount: read.maxStalled ?? DEFAULT.maxStalled,
      runRetryDelay: LOOK,
      // Seconds of a wait for the next job, which outlives a queue that goes away meanwhile.
      drainDelay: 2,
      autorun: false,
    })
    this.#listen()
    this.#timer = setInterval(() => void this.#look(), Math.min(LOOK, this.#lockDuration / 4))
  }

  get running(): number {
    return this.#attempts.size
  }

  async connected(timeout: number | undefined, signal: AbortSignal | undefined): Promise<void> {
    try {
      const ready = answered(this.#worker.waitUntilReady(), timeout, () => this.#lastError)
      await answer(() => ready, signal)
    } catch (error) {
      await this.#abandon()
      throw error
    }
    // It ends when the worker closes; what fails in between is an event, and tried again.
    this.#worker.run().catch(error => this.#tell({ type: 'error', error }))
  }

  close(options?: { grace?: number | undefined }): Promise<void> {
    const { grace = this.#read.grace ?? DEFAULT.grace } = readOptions(options, 'JobWorker.close', CLOSE)
    this.#closing ??= this.#drain(grace)
    return this.#closing
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #drain(grace: number): Promise<void> {
    const timer = setTimeout(() => {
      for (const attempt of this.#attempts.values()) attempt.giveBack()
    }, grace)
    try {
      await this.#end(grace)
    } finally {
      clearTimeout(timer)
    }
  }

  /** Closes, however the queue is: one that is away takes nothing back, and gives its jobs to others when it comes again. */
  async #end(grace: number): Promise<void> {
    const limit = new AbortController()
    const closed = this.#worker.close().then(
      () => true,
      () => false,
    )
    const ended = await Promise.race([closed, this.#late(grace, limit.signal)])
    limit.abort()
    if (!ended) await this.#abandon()
    clearInterval(this.#timer)
    this.#setClosed()
  }

  /** Resolves when the jobs have had their time, or have ended, and the queue had its own to hear of that. */
  async #late(grace: number, signal: AbortSignal): Promise<false> {
    const begin = performance.now()
    const waits = { signal }
    try {
      while (this.#attempts.size > 0 && performance.now() - begin < grace) await delay(LOOK / 10, undefined, waits)
      await delay(this.#read.timeout ?? DEFAULT_TIMEOUT, undefined, waits)
    } catch {
      // It closed in time.
    }
    return false
  }

  /** Leaves a queue that does not answer. */
  async #abandon(): Promise<void> {
    clearInterval(this.#timer)
    for (const attempt of this.#attempts.values()) attempt.lose()
    await this.#worker.abandon()
  }

  #listen(): void {
    this.#worker.on('error', error => {
      this.#lastError = error
      this.#tell({ type: 'error', error })
    })
    this.#worker.on('completed', ({ id = '', name: kind, finishedOn = 0, processedOn = 0 }) =>
      this.#tell({ type: 'completed', id, kind, durationMs: finishedOn - processedOn }),
    )
    this.#worker.on('failed', (job, { message: reason, name }) => {
      if (job === undefined) return
      const { id = '', name: kind, attemptsMade, opts } = job
      if (reason.startsWith(CANCELLED)) {
        this.#tell({ type: 'cancelled', id, kind })
        return
      }
      const final = name === 'UnrecoverableError' || attemptsMade >= (opts.attempts ?? 1)
      this.#tell({ type: 'failed', id, kind, reason, final })
    })
    this.#worker.on('stalled', id => this.#tell({ type: 'stalled', id }))
    this.#worker.on('locksRenewed', ({ jobIds }) => {
      for (const id of jobIds) this.#attempts.get(id)?.renewed()
    })
    this.#worker.on('lockRenewalFailed', ids => {
      for (const id of ids) this.#attempts.get(id)?.lose()
    })
  }

  #tell(event: WorkerEvent): void {
    try {
      const returned = this.#read.onEvent?.(event)
      Promise.resolve(returned).catch(warn)
    } catch (error) {
      warn(error)
    }
  }

  /** Looks which of the attempts are not to go on. */
  async #look(): Promise<void> {
    for (const attempt of this.#attempts.values()) {
      if (attempt.silentFor > this.#lockDuration) attempt.lose()
    }
    // A queue that is away is asked once.
    if (this.#looking) return
    this.#looking = true
    try {
      for (const [id, attempt] of this.#attempts) await this.#lookAt(id, attempt)
    } catch {
      // It is asked again.
    } finally {
      this.#looking = false
    }
  }

  async #lookAt(id: string, attempt: Running): Promise<void> {
    const reason = await cancelledBecause(this.#worker, id)
    if (reason !== undefined) attempt.cancel(reason)
  }

  async #process(job: Job, token: string): Promise<unknown> {
    const { id = '', name, attemptsStarted } = job
    const attempt = new Running()
    this.#attempts.set(id, attempt)
    this.#tell({ type: 'started', id, kind: name, attempt: attemptsStarted })
    const reports = new Reports(progress => job.updateProgress(progress))
    try {
      const kind: JobKind = jobKind(name, 'the kind of the job')
      const data = readJob(kind, job.data)
      // One that was cancelled while no worker had it begins all the same: what attempts before it left is removed.
      await this.#lookAt(id, attempt)
      const result = await perform(kind, data, {
        means: this.#means,
        job: this.#worker.toKey(id),
        again: attemptsStarted > 1,
        fence: fenceOf(this.#worker, job, token, this.#lockDuration),
        signal: attempt.signal,
        onProgress: reports.report,
      })
      await Promise.race([reports.finished(), attempt.ended])
      return result
    } catch (error) {
      throw await this.#failed(job, token, attempt, error)
    } finally {
      this.#attempts.delete(id)
    }
  }

  /** What BullMQ is to make of an attempt that ended early. */
  async #failed(job: Job, token: string, { end }: Running, error: unknown): Promise<Error> {
    const { UnrecoverableError, WaitingError } = this.#queues
    const { id = '', name: kind } = job
    if (end?.type === 'cancelled') {
      job.opts.removeOnFail = true
      return new UnrecoverableError(`${CANCELLED}: ${end.reason}`)
    }
    if (end?.type === 'returned') {
      const back = await answered(job.moveToWait(token), this.#read.timeout, () => this.#lastError).catch(
        () => undefined,
      )
      this.#tell({ type: back === undefined ? 'lost' : 'returned', id, kind })
      return new WaitingError()
    }
    if (end?.type === 'lost' || (error instanceof AbortError && error.cause instanceof LockLost)) {
      this.#tell({ type: 'lost', id, kind })
      // It is not this worker's: nothing is said of it to the queue.
      return new WaitingError()
    }
    const reason = reasonOf(error)
    return isFinal(error) ? new UnrecoverableError(reason) : new Error(reason)
  }
}

function warn(error: unknown): void {
  const reason = error instanceof Error ? error.message : String(error)
  process.emitWarning(`onEvent of a worker failed: ${reason}`, { code: 'QCOW2_CALLBACK' })
}
