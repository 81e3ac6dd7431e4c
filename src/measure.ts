/** Sizes of images before they are made. */

import { toReadAccess } from './access.js'
import { withChain } from './backing/chain.js'
import { invalidArgument } from './errors.js'
import { can, PLAIN_FORMAT, type TargetFormat } from './formats/table.js'
import type { NativeMeasured, NativeShape } from './native.js'
import { flag, LONG_RUNNING, type LongRunning, readOptions, throwIfAborted } from './options.js'
import { forgetting } from './secret.js'
import { type Preallocation, SHAPE, type Shape, shape, toNativeShape } from './shape.js'
import { type ImageSource, targetFormat, toLocated, toTargetFormat } from './source.js'
import { SOURCE, type SourceOptions } from './source-options.js'
import { runJob } from './support/jobs.js'
import { type BigIntResults, type Size, sizesIn, toBytes } from './units.js'

/** Options of {@link measure}. */
export interface MeasureOptions extends SourceOptions, LongRunning {
  /** Format of the planned target. */
  to: TargetFormat
  /** Shape of the planned target; of a luks target `encrypt`, which it needs. */
  create?: Shape | undefined
  /** The same as `create.preallocation`, and for raw targets too. */
  preallocation?: Preallocation | undefined
}

/** Bytes, as QAPI's `BlockMeasureInfo`. */
export interface MeasureResult<N extends number | bigint = number> {
  /** What a target needs for this source. */
  readonly required: N
  /** What it can grow to when the guest has written everything. */
  readonly fullyAllocated: N
  /** More, for the source's persistent bitmaps. Absent where source or target cannot have any. */
  readonly bitmaps?: N
}

const MEASURE = {
  ...LONG_RUNNING,
  ...SOURCE,
  to: targetFormat,
  create: shape,
  preallocation: SHAPE.preallocation,
  bigint: flag,
} as const

/**
 * Tells how large the file of a new image will be, for the data of a source or for an empty disk of a size. The numbers are
 * `qemu-img measure`'s.
 *
 * @throws {@link Qcow2Error} as `open`; `ERR_QCOW2_INVALID_ARGUMENT`; `ERR_QCOW2_LIMIT` for a size that the geometry cannot
 *   address
 *
 * @example
 * ```js
 * import { measure } from 'qcow2'
 *
 * const { required, fullyAllocated } = await measure('disk.qcow2', { to: 'qcow2' })
 * console.log(`the copy takes ${required} bytes now, and ${fullyAllocated} at most`)
 * ```
 */
export function measure(
  source: ImageSource | { readonly size: Size },
  options: MeasureOptions & { bigint: true },
): Promise<MeasureResult<bigint>>
export function measure(
  source: ImageSource | { readonly size: Size },
  options: MeasureOptions & BigIntResults,
): Promise<MeasureResult>
export async function measure(
  source: ImageSource | { readonly size: Size },
  options: MeasureOptions & BigIntResults,
): Promise<AnyMeasureResult> {
  return await forgetting(() => measureImage(source, options))
}

type AnyMeasureResult = MeasureResult<number | bigint>

async function measureImage(
  source: ImageSource | { readonly size: Size },
  options: MeasureOptions & BigIntResults,
): Promise<AnyMeasureResult> {
  const read = readOptions(options, 'measure', MEASURE)
  const { from, references, secret, snapshot, limits, signal } = read
  const { preallocation = read.create?.preallocation } = read
  if (from !== undefined && snapshot !== undefined && !can(from, 'snapshots')) {
    throw invalidArgument('snapshot', `measure: a ${from} image has no snapshots`)
  }
  const wanted = toNativeShape('measure', toTargetFormat('measure', read.to), { ...read.create, preallocation })
  const sizes = sizesIn(read.bigint)
  const run = async (image: number | undefined, size: number, target: NativeShape): Promise<AnyMeasureResult> => {
    const { required, fullyAllocated, bitmaps } = await runJob<NativeMeasured>('measure', read, (request, job, addon) =>
      addon.measureImage(request, job, image, size, target),
    )
    return {
      required: sizes(required, 'required'),
      fullyAllocated: sizes(fullyAllocated, 'fullyAllocated'),
      ...(bitmaps !== undefined && { bitmaps: sizes(bitmaps, 'bitmaps') }),
    }
  }
  if (isSize(source)) {
    throwIfAborted(signal)
    for (const name of ['from', 'snapshot'] as const) {
      if (read[name] !== undefined) throw invalidArgument(name, `measure: ${name} is for an image, not for a size`)
    }
    return run(undefined, toBytes(source.size, 'measure: size'), wanted)
  }
  const located = toLocated(source, 'source')
  throwIfAborted(signal)
  const access = toReadAccess(read)
  const chain = { references, secret, snapshot, limits, signal, access }
  const opening = { ...chain, format: from, sayRaw: `from: '${PLAIN_FORMAT}'` }
  return withChain(located, opening, ({ image }) => run(image, 0, wanted))
}

const isSize = (source: unknown): source is { readonly size: Size } =>
  typeof source === 'object' &&
  source !== null &&
  Object.getPrototypeOf(source) === Object.prototype &&
  'size' in source
