/** What a worker is told, and what it tells. */

import { invalidArgument } from '../errors.js'
import {
  abortSignal,
  bytes,
  callback,
  integer,
  type Limits,
  limits,
  oneOf,
  type Read,
  type Reader,
  text,
} from '../options.js'
import type { EncryptedLayer, Secret } from '../secret.js'
import type { Size } from '../units.js'
import { PLACE, type QueuePlace } from './connection.js'

/** A job that an event is about. */
export interface JobEvent {
  /** The job. */
  readonly id: string
  /** Its kind, as the queue has it. */
  readonly kind: string
}

/** An attempt began. */
export interface StartedEvent extends JobEvent {
  /** What happened. */
  readonly type: 'started'
  /** Which attempt it is, from 1; those that were lost or given back are counted. */
  readonly attempt: number
}

/** The job is done, and the queue knows. */
export interface CompletedEvent extends JobEvent {
  /** What happened. */
  readonly type: 'completed'
  /** Milliseconds since its worker took it. */
  readonly durationMs: number
}

/** An attempt failed. */
export interface FailedEvent extends JobEvent {
  /** What happened. */
  readonly type: 'failed'
  /** The error's code and message. */
  readonly reason: string
  /** It was the last attempt, and the job is among the dead. */
  readonly final: boolean
}

/** An attempt ended without a result, and left nothing. */
export interface EndedEvent extends JobEvent {
  /**
   * `'cancelled'`: as was asked for; the job is gone. `'returned'`: the worker closes and gave the job back; that attempt does not count. `'lost'`: the
   * job is another worker's, or will be, since this one did not hear from the queue for too long.
   */
  readonly type: 'cancelled' | 'returned' | 'lost'
}

/** A worker, this one or another, was found to be gone, and its job waits again. */
export interface StalledEvent {
  /** What happened. */
  readonly type: 'stalled'
  /** The job. */
  readonly id: string
}

/** The connection, or the queue, failed: it is tried again. */
export interface WorkerErrorEvent {
  /** What happened. */
  readonly type: 'error'
  /** How it failed. */
  readonly error: Error
}

/** What happens at a worker. */
export type WorkerEvent = StartedEvent | CompletedEvent | FailedEvent | EndedEvent | StalledEvent | WorkerErrorEvent

/** Options of {@link startWorker}. */
export interface JobWorkerOptions extends QueuePlace {
  /** Folders that jobs may name files in, symbolic links resolved; relative paths of jobs start from the first. */
  roots: string | readonly string[]
  /** Jobs at once, 1 to 64. Default 1. Run one worker on a machine, so that this is what the machine does. */
  concurrency?: number | undefined
  /** Worker threads of one job, 1 to 64. Default: as for the API; all jobs of a process share a number of them. */
  threads?: number | undefined
  /** Bytes a second that the converts of this worker read, all together: each has its share. Default: as fast as it goes. */
  rate?: Size | undefined
  /** What images may claim; see {@link Limits}. */
  limits?: Limits | undefined
  /**
   * What the images of jobs may pull in: nothing, the default, or with `'roots'` files that lie under the roots, by the rules of the API's
   * `'allow'`.
   */
  references?: 'deny' | 'roots' | undefined
  /** Gives the secrets of encrypted sources. No job has one: a queue would keep it in clear. */
  secret?: ((layer: EncryptedLayer) => Secret | undefined | Promise<Secret | undefined>) | undefined
  /** What addresses of uploads begin with: `https://store.example/images/`. Default: nothing is uploaded. */
  uploads?: string | readonly string[] | undefined
  /** Headers of an upload (`authorization`), by its address. */
  uploadHeaders?: ((url: string) => Record<string, string> | Promise<Record<string, string>>) | undefined
  /**
   * Milliseconds, 1000 to 3600000, for which a job is this worker's without word from it: it says so again twice as often. A worker that was
   * lost is noticed within two of them. Default 30000.
   */
  lockDuration?: number | undefined
  /** How often a job's worker may be lost before the job counts as failed, 0 to 100: an image may be what ends them. Default 2. */
  maxStalled?: number | undefined
  /** Milliseconds that running jobs have to finish when the worker closes; then they are given back. Default 30000. */
  grace?: number | undefined
  /** Milliseconds between two reports of a job's progress. Default 1000. */
  progressInterval?: number | undefined
  /** Hears of what happens. What it throws is a warning of the process. */
  onEvent?: ((event: WorkerEvent) => unknown) | undefined
  /** Closes the worker, as `close` does. */
  signal?: AbortSignal | undefined
}

/** A worker that runs. */
export interface JobWorker extends AsyncDisposable {
  /** The machine and the process, as the queue knows it. */
  readonly name: string
  /** Jobs that it does now. */
  readonly running: number
  /** Resolves when the worker has closed. */
  readonly closed: Promise<void>
  /**
   * Takes no job any more, and waits for those that run; what is not done within `grace` milliseconds is aborted and given back to the queue,
   * where another worker takes it first.
   */
  close(options?: { grace?: number | undefined }): Promise<void>
}

const DURATION = integer(0, 2 ** 31 - 1)

const texts: Reader<readonly string[]> = (value, name) =>
  Array.isArray(value) ? value.map((each, index) => text(each, `${name}[${index}]`)) : [text(value, name)]

const addresses: Reader<readonly string[]> = (value, name) =>
  texts(value, name).map(each => {
    // With a path: 'https://store.example' is the beginning of 'https://store.example.org', too.
    if (URL.canParse(each) && /^https?:$/.test(new URL(each).protocol)) return new URL(each).href
    throw invalidArgument(name, `${name} must be addresses of http:// or https://, not '${each}'`)
  })

/** The table entries of {@link JobWorkerOptions}. */
export const WORKER = {
  ...PLACE,
  roots: texts,
  concurrency: integer(1, 64),
  threads: integer(1, 64),
  rate: bytes,
  limits,
  references: oneOf('deny', 'roots'),
  secret: callback<NonNullable<JobWorkerOptions['secret']>>(),
  uploads: addresses,
  uploadHeaders: callback<NonNullable<JobWorkerOptions['uploadHeaders']>>(),
  lockDuration: integer(1000, 3_600_000),
  maxStalled: integer(0, 100),
  grace: DURATION,
  progressInterval: integer(1, 2 ** 31 - 1),
  onEvent: callback<NonNullable<JobWorkerOptions['onEvent']>>(),
  signal: abortSignal,
} as const

export const CLOSE = { grace: DURATION } as const

export type ReadWorker = Read<typeof WORKER>

export const DEFAULT = {
  lockDuration: 30_000,
  grace: 30_000,
  maxStalled: 2,
  progressInterval: 1000,
  concurrency: 1,
} as const
