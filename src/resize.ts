/** Resizing the disk of an open image. */

import { ABORTABLE, type Abortable, flag } from './options.js'
import { type Preallocation, SHAPE } from './shape.js'
import { runJob } from './support/jobs.js'

/** Options of {@link Image.truncate}. Of a resize that the signal ends while it preallocates, the disk has its old size. */
export interface TruncateOptions extends Abortable {
  /**
   * A size below the disk's is meant: what lies behind the new end is lost. Without it a smaller size is refused with
   * `ERR_QCOW2_DATA_LOSS`, whose message says how many bytes are stored there. Default false.
   */
  shrink?: boolean | undefined
  /**
   * What the new part of the disk has from the start: nothing, a host cluster for every guest cluster (`'metadata'`), reserved space
   * (`'falloc'`), or written zeroes (`'full'`). Default `'off'`. Only for a disk that grows; raw has no `'metadata'`.
   */
  preallocation?: Preallocation | undefined
}

/** The table entries of {@link TruncateOptions}. */
export const TRUNCATE = {
  ...ABORTABLE,
  shrink: flag,
  preallocation: SHAPE.preallocation,
} as const

/** Resizes the disk of the addon's image; tells its size afterwards. */
export const resizeDisk = (
  image: number,
  size: number,
  { shrink = false, preallocation, signal }: TruncateOptions,
): Promise<number> =>
  runJob<number>('truncate', { signal }, (request, job, addon) =>
    addon.resize(request, job, image, size, shrink, preallocation),
  )
