/** Which bytes of a file one view of an image has alone, and which are those of several. */

import type { MapExtent } from './format/map.js'

export interface Shares {
  /** Bytes that each view has alone. */
  readonly views: readonly number[]
  /** Bytes that more than one view has. */
  readonly shared: number
  /** There is compressed data, whose places are not told: it is not counted. */
  readonly compressed: boolean
}

/** Some hundred bytes of memory for each. */
const MOST_EXTENTS = 500_000

type Place = Pick<MapExtent<number | bigint>, 'depth' | 'data' | 'compressed' | 'length' | 'offset'>

/**
 * Sums up what `gather` adds: extents of views, by number. Undefined where there are too many of them; `add` then says false.
 */
export async function shareOut(
  views: number,
  gather: (add: (view: number, extent: Place) => boolean) => Promise<void>,
): Promise<Shares | undefined> {
  // Every extent begins and ends: positions with the view, first those that begin.
  const events: (readonly [at: number, view: number, step: 1 | -1])[] = []
  let compressed = false
  await gather((view, { depth, data, compressed: packed, length, offset }) => {
    if (depth === 0 && data && packed) compressed = true
    if (depth !== 0 || !data || offset === undefined) return true
    events.push([Number(offset), view, 1], [Number(offset) + Number(length), view, -1])
    return events.length < 2 * MOST_EXTENTS
  })
  if (events.length >= 2 * MOST_EXTENTS) return undefined
  events.sort(([a], [b]) => a - b)
  const depths = new Int32Array(views)
  const alone = new Float64Array(views)
  // How many views have what lies here, and the sum of their numbers: of one, that is its number.
  let [having, sum, shared, last] = [0, 0, 0, 0]
  for (const [at, view, step] of events) {
    if (having === 1) alone[sum] = (alone[sum] ?? 0) + (at - last)
    else if (having > 1) shared += at - last
    last = at
    const depth = (depths[view] ?? 0) + step
    depths[view] = depth
    if (step === 1 && depth === 1) {
      having += 1
      sum += view
    } else if (step === -1 && depth === 0) {
      having -= 1
      sum -= view
    }
  }
  return { views: [...alone], shared, compressed }
}
