/** Jobs on many machines: converts, checks, inspections, compactions and uploads through a queue in Redis, by BullMQ. */

export type { Connection, QueuePlace } from './connection.js'
export type {
  CheckJob,
  CompactJob,
  ConvertJob,
  InspectJob,
  JobData,
  JobKind,
  JobResults,
  UploadJob,
  UploadResult,
} from './kinds.js'
export type { Plain, PlainError } from './plain.js'
export type { FinishOptions, JobProgress } from './progress.js'
export {
  type AddOptions,
  type Cancelled,
  type DeadJob,
  type JobCounts,
  type JobQueue,
  type JobState,
  openQueue,
  type QueuedJob,
} from './queue.js'
export { startWorker } from './worker.js'
export type {
  CompletedEvent,
  EndedEvent,
  FailedEvent,
  JobEvent,
  JobWorker,
  JobWorkerOptions,
  StalledEvent,
  StartedEvent,
  WorkerErrorEvent,
  WorkerEvent,
} from './worker-options.js'
