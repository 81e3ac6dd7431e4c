/** The other end of the queue: where jobs are put in, watched and cancelled, and where the dead lie. */

import { randomUUID } from 'node:crypto'
import type { Job, Queue } from 'bullmq'
import { invalidArgument } from '../errors.js'
import { integer, type Read, type Reader, readOptions } from '../options.js'
import { describe } from '../units.js'
import { answered, DEFAULT_PREFIX, DEFAULT_QUEUE, needed, PLACE, type QueuePlace } from './connection.js'
import { readReason } from './failure.js'
import { forgetStalls, markCancelled } from './fence.js'
import { Finishes } from './finishes.js'
import { type JobData, type JobKind, type JobResults, jobKind, readJob } from './kinds.js'
import { loadBullMq, type Queues } from './peers.js'
import { type FinishOptions, type JobProgress, readProgress } from './progress.js'

/** Options of {@link JobQueue.add}. */
export interface AddOptions {
  /**
   * The job's name: letters, digits, `-`, `_` and `.`, not digits alone. While a job of that name is there, done or dead ones included, adding
   * it again changes nothing: so an `add` whose answer was lost can be made again. Default: a new one.
   */
  id?: string | undefined
  /** 0 to 2097151: jobs of smaller numbers first, of 0 before all others; equal ones in the order in which they came. Default 0. */
  priority?: number | undefined
  /** How often the job is begun before it counts as dead, 1 to 100; what cannot pass is not tried again at all. Default 3. */
  attempts?: number | undefined
  /** Milliseconds before the second attempt, 0 to 86400000; twice as many before each next one. Default 1000. */
  backoff?: number | undefined
  /** Milliseconds before the first attempt, 0 to 2^31 - 1. Default 0. */
  delay?: number | undefined
}

/** Where a job is: `'dead'` after its last attempt. */
export type JobState = 'waiting' | 'delayed' | 'active' | 'completed' | 'dead'

/** A job in the queue. */
export interface QueuedJob<K extends JobKind = JobKind> {
  /** Its name in the queue. */
  readonly id: string
  /** What it is. */
  readonly kind: K
  /** Where it is; undefined when it is gone: cancelled, dropped, or done long ago. */
  state(): Promise<JobState | undefined>
  /** What its worker said last of how far it is. */
  progress(): Promise<JobProgress | undefined>
  /**
   * Resolves to its result when it is done. Rejects when it is dead, with the code of what it failed with; with an `AbortError` when it is
   * cancelled, or the signal aborted, which ends the waiting alone.
   */
  finished(options?: FinishOptions): Promise<JobResults[K]>
  /** See {@link JobQueue.cancel}. */
  cancel(reason?: string): Promise<Cancelled>
}

/**
 * What became of a request to cancel: the job was `'removed'`; a worker has it and ends it within a second, `'aborting'`; or it had ended, or
 * was never there.
 */
export type Cancelled = 'removed' | 'aborting' | 'ended'

/** A job whose attempts are used up, or that cannot be done. */
export interface DeadJob<K extends JobKind = JobKind> {
  /** Its name in the queue. */
  readonly id: string
  /** What it is. */
  readonly kind: K
  /** What it was given. */
  readonly data: JobData[K]
  /** The code of the last failure; `ERR_QCOW2_IO` where workers were lost with it. */
  readonly code: string
  /** The message of the last failure, which begins with its code. */
  readonly reason: string
  /** How often it failed. */
  readonly attempts: number
  /** When it failed last. */
  readonly failedAt: Date
}

/** How many jobs are in each state. */
export type JobCounts = Readonly<Record<JobState, number>>

/** A queue of jobs. */
export interface JobQueue extends AsyncDisposable {
  /**
   * Puts a job in. Its data is read here as the worker reads it: what is wrong is refused at once.
   *
   * @throws `Qcow2Error` `ERR_QCOW2_INVALID_ARGUMENT`; the system's code, or `ETIMEDOUT`, where the queue does not answer: the job may have
   *   arrived
   */
  add<K extends JobKind>(kind: K, data: JobData[K], options?: AddOptions): Promise<QueuedJob<K>>
  /** The job of an id, if it is there. */
  job(id: string): Promise<QueuedJob | undefined>
  /** Takes a job that waits out of the queue; has one that runs aborted, on whatever machine that is. It leaves nothing. */
  cancel(id: string, reason?: string): Promise<Cancelled>
  /** The dead, the last ones first: at most `count` of them, 100 by default, behind the first `start`. */
  dead(options?: { start?: number | undefined; count?: number | undefined }): Promise<DeadJob[]>
  /** Gives a dead job all of its attempts again. False if it is not dead. */
  retry(id: string): Promise<boolean>
  /** Removes a dead job. False if it is not dead. */
  drop(id: string): Promise<boolean>
  /** How many jobs are where. */
  counts(): Promise<JobCounts>
  /** Ends the connections. Jobs stay. */
  close(): Promise<void>
}

const jobId: Reader<string> = (value, name) => {
  if (typeof value === 'string' && /^[\w.-]{1,100}$/.test(value) && /\D/.test(value)) return value
  const rule = "1 to 100 letters, digits, '-', '_' or '.', and not digits alone"
  throw invalidArgument(name, `${name} must be ${rule}: ${describe(value)}`)
}

const ADD = {
  id: jobId,
  priority: integer(0, 2 ** 21 - 1),
  attempts: integer(1, 100),
  backoff: integer(0, 86_400_000),
  delay: integer(0, 2 ** 31 - 1),
} as const

const DEAD = { start: integer(0, 2 ** 31 - 1), count: integer(1, 10_000) } as const

/** How many of those that are done are remembered, and for how long, in seconds. */
const REMEMBERED = { count: 10_000, age: 7 * 86_400 } as const

/** Bytes of a job's data. */
const LARGEST = 2 ** 16

const STATES: Readonly<Record<string, JobState>> = {
  waiting: 'waiting',
  prioritized: 'waiting',
  'waiting-children': 'waiting',
  paused: 'waiting',
  delayed: 'delayed',
  active: 'active',
  completed: 'completed',
  failed: 'dead',
}

/**
 * Opens a queue of jobs in Redis or Valkey, by BullMQ (`npm install bullmq ioredis`). {@link startWorker} does them.
 *
 * @throws `Qcow2Error` `ERR_QCOW2_PEER_MISSING` without BullMQ; the system's code (`ECONNREFUSED`, `ETIMEDOUT`) where the queue does not
 *   answer within `timeout`
 * @example
 * await using queue = await openQueue({ connection: 'redis://queue.internal' })
 * const job = await queue.add('convert', { source: 'upload.vmdk', target: 'disk.qcow2', to: 'qcow2', compress: true })
 * const { virtualSize } = await job.finished({ onProgress: ({ current, total }) => console.log(current, total) })
 */
export async function openQueue(options: QueuePlace): Promise<JobQueue> {
  const read = readOptions(options, 'openQueue', PLACE)
  needed(read.connection, 'openQueue', 'connection')
  const queue = new BullQueue(loadBullMq(), read)
  await queue.connected()
  return queue
}

class BullQueue implements JobQueue {
  readonly #queue: Queue
  readonly #timeout: number | undefined
  readonly #finishes: Finishes
  #lastError: unknown
  #closing: Promise<void> | undefined

  constructor(
    queues: Queues,
    { connection, queue = DEFAULT_QUEUE, prefix = DEFAULT_PREFIX, timeout }: Read<typeof PLACE>,
  ) {
    this.#timeout = timeout
    const place = { connection: { ...connection, maxRetriesPerRequest: null }, prefix }
    this.#queue = new queues.Queue(queue, place)
    this.#queue.on('error', error => {
      this.#lastError = error
    })
    this.#finishes = new Finishes(() => new queues.QueueEvents(queue, place), this.#queue)
  }

  async connected(): Promise<void> {
    try {
      await this.#ask(this.#queue.waitUntilReady())
    } catch (error) {
      await this.#abandon()
      throw error
    }
  }

  async add<K extends JobKind>(kind: K, data: JobData[K], options?: AddOptions): Promise<QueuedJob<K>> {
    const known = jobKind(kind, 'add: kind') as K
    const given = readJob(known, data)
    const {
      id = randomUUID(),
      priority = 0,
      attempts = 3,
      backoff = 1000,
      delay = 0,
    } = readOptions(options, 'add', ADD)
    await this.#ask(
      this.#queue.add(known, given, {
        jobId: id,
        priority,
        attempts,
        backoff: { type: 'exponential', delay: backoff },
        delay,
        removeOnComplete: REMEMBERED,
        removeOnFail: false,
        sizeLimit: LARGEST,
      }),
    )
    return this.#queued(id, known)
  }

  async job(id: string): Promise<QueuedJob | undefined> {
    const found = await this.#found(id)
    return found && this.#queued(id, jobKind(found.name, 'the kind of the job'))
  }

  async cancel(id: string, reason = 'as asked'): Promise<Cancelled> {
    const job = await this.#found(id)
    if (job === undefined) return 'ended'
    const state = STATES[await this.#ask(job.getState())]
    if (state === undefined || state === 'completed' || state === 'dead') return 'ended'
    // Said first: a worker that takes it now sees it.
    if (!(await this.#ask(markCancelled(this.#queue, id, reason)))) return 'ended'
    if (state === 'active') return 'aborting'
    try {
      await this.#ask(job.remove())
      return 'removed'
    } catch (error) {
      // A worker was faster; or the queue is away.
      if (STATES[await this.#ask(job.getState())] === 'active') return 'aborting'
      throw error
    }
  }

  async dead(options?: { start?: number | undefined; count?: number | undefined }): Promise<DeadJob[]> {
    const { start = 0, count = 100 } = readOptions(options, 'dead', DEAD)
    const jobs = await this.#ask(this.#queue.getFailed(start, start + count - 1))
    return jobs.flatMap(({ id = '', name, data, failedReason = '', attemptsMade, finishedOn = 0 }) => {
      const { code, message } = readReason(failedReason)
      const kind = name as JobKind
      return [{ id, kind, data, code, reason: message, attempts: attemptsMade, failedAt: new Date(finishedOn) }]
    })
  }

  async retry(id: string): Promise<boolean> {
    const job = await this.#dead(id)
    if (job === undefined) return false
    await this.#ask(forgetStalls(this.#queue, id))
    await this.#ask(job.retry('failed', { resetAttemptsMade: true }))
    return true
  }

  async drop(id: string): Promise<boolean> {
    const job = await this.#dead(id)
    await (job && this.#ask(job.remove()))
    return job !== undefined
  }

  async counts(): Promise<JobCounts> {
    const counts = await this.#ask(this.#queue.getJobCounts())
    const sum: Record<JobState, number> = { waiting: 0, delayed: 0, active: 0, completed: 0, dead: 0 }
    for (const [name, count] of Object.entries(counts)) {
      const state = STATES[name]
      if (state !== undefined) sum[state] += count
    }
    return sum
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  async #close(): Promise<void> {
    await this.#finishes.close()
    // What is away is not waited for.
    await this.#ask(this.#queue.close()).catch(() => this.#abandon())
  }

  async #abandon(): Promise<void> {
    await this.#queue.backend.close(true).catch(() => {})
  }

  async #found(id: string): Promise<Job | undefined> {
    return (await this.#ask(this.#queue.getJob(id))) ?? undefined
  }

  async #dead(id: string): Promise<Job | undefined> {
    const job = await this.#found(id)
    return job && (await this.#ask(job.isFailed())) ? job : undefined
  }

  #ask<T>(asked: Promise<T>): Promise<T> {
    return answered(asked, this.#timeout, () => this.#lastError)
  }

  #queued<K extends JobKind>(id: string, kind: K): QueuedJob<K> {
    return {
      id,
      kind,
      state: async () => STATES[(await (await this.#found(id))?.getState()) ?? ''],
      progress: async () => readProgress((await this.#found(id))?.progress),
      finished: options => this.#finishes.of(id, options) as Promise<JobResults[K]>,
      cancel: reason => this.cancel(id, reason),
    }
  }
}
