/** Progress of a job on its way to the queue: one report under way, and the newest one behind it. */

import type { Abortable, Progress } from '../options.js'

/** How far a job is; see {@link Progress}. */
export type JobProgress = Pick<Progress, 'phase' | 'current' | 'total'>

/** Options of {@link QueuedJob.finished}. */
export interface FinishOptions extends Abortable {
  /** Hears how far the job is, as its worker tells. What it throws ends the waiting, not the job. */
  onProgress?: ((progress: JobProgress) => unknown) | undefined
}

export class Reports {
  readonly #send: (progress: JobProgress) => Promise<void>
  #next: JobProgress | undefined
  #sending: Promise<void> | undefined

  constructor(send: (progress: JobProgress) => Promise<void>) {
    this.#send = send
  }

  /** Reports, unless a report is under way: then when that has arrived, and only the newest. Never awaited: a queue that is away slows no job. */
  readonly report = ({ phase, current, total }: JobProgress): void => {
    this.#next = { phase, current, total }
    this.#sending ??= this.#drain()
  }

  /** The last report has arrived, or cannot. */
  async finished(): Promise<void> {
    await this.#sending
  }

  async #drain(): Promise<void> {
    for (let next = this.#next; next !== undefined; next = this.#next) {
      this.#next = undefined
      // It is news: what is lost of it is made up for by the next one.
      await this.#send(next).catch(() => {})
    }
    this.#sending = undefined
  }
}

/** What progress was kept with a job, if it is one. */
export function readProgress(value: unknown): JobProgress | undefined {
  if (typeof value !== 'object' || value === null) return undefined
  const { phase, current, total } = value as Partial<Record<keyof JobProgress, unknown>>
  if (typeof phase !== 'string' || typeof current !== 'number' || typeof total !== 'number') return undefined
  return { phase, current, total }
}
