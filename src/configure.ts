/** Settings of the library. */

import { native } from './native.js'
import { integer, readOptions } from './options.js'
import { toError } from './support/requests.js'

/** Settings of {@link configure}. */
export interface Settings {
  /**
   * How many long jobs (`convert`, `check`, `compare`, ...) run at the same time, 1 to 1024; the others wait their turn, in the order in
   * which they were started. Default: the cores of the machine, at least 4 and at most 16.
   *
   * What is short or limited by its `rate` does not wait behind the others: creating, resizing, overlays and the point in time of a clone
   * are counted for themselves, and so are the jobs with a `rate`. A clone whose point in time has passed is the next to run.
   * Requests on open images (`read`, `write`, ...) are none of these jobs.
   */
  maxJobs?: number | undefined
}

const SETTINGS = { maxJobs: integer(1, 1024) } as const

/**
 * Changes settings of this environment (the main thread, or a `worker_threads` worker: each has its own), and returns those in
 * force. What runs goes on; more jobs that wait begin at once, fewer when those that run have ended.
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_INVALID_ARGUMENT`: nothing is changed
 *
 * @example
 * ```js
 * import { configure } from 'qcow2'
 *
 * configure({ maxJobs: 4 })
 * ```
 */
export function configure(settings?: Settings): {
  /** How many run at the same time from now on. */
  readonly maxJobs: number
} {
  const { maxJobs } = readOptions(settings, 'configure', SETTINGS)
  try {
    return { maxJobs: native.maxJobs(maxJobs) }
  } catch (error) {
    throw toError(error)
  }
}
