/** Maps of an image's allocation: `qemu-img map` as an iterator. */

import type { NativeExtents } from './native.js'
import { ABORTABLE, type Abortable, bytes, flag, oneOf, type Read, readOptions, throwIfAborted } from './options.js'
import { requestWatched } from './support/requests.js'
import { shown } from './text.js'
import { type Size, sizesIn } from './units.js'

/** Options of {@link Image.map}. */
export interface MapOptions extends Abortable {
  /** First guest byte. Default 0. */
  start?: Size | undefined
  /** Bytes. Default: the rest of the disk. */
  length?: Size | undefined
  /** `'top'` looks at the top layer alone: what it does not have is `present: false`. Default `'all'`. */
  depth?: 'all' | 'top' | undefined
}

/** A run of guest bytes of one kind, as QAPI's `MapEntry`. */
export interface MapEntry<N extends number | bigint = number> {
  /** First guest byte. */
  readonly start: N
  /** Bytes. */
  readonly length: N
  /** The layer that has it: 0 is the top. */
  readonly depth: number
  /** Some layer of the chain has the range. */
  readonly present: boolean
  /** Reads as zeroes. With `depth: 'top'`, false for what the top layer does not have: it does not say. */
  readonly zero: boolean
  /** Reading takes it from a file. */
  readonly data: boolean
  /** It lies in the file compressed. */
  readonly compressed: boolean
  /** Where the first byte is in the file, for what is stored uncompressed. */
  readonly offset?: N
  /** The file that `offset` is in. */
  readonly filename?: string
  /** The bytes of `filename`, where they are not UTF-8: it then has replacement characters. */
  readonly filenameBytes?: Buffer
}

const MAP = { ...ABORTABLE, start: bytes, length: bytes, depth: oneOf('all', 'top'), bigint: flag } as const

/** {@link MapOptions}, read. */
export type ReadMapOptions = Read<typeof MAP>

export const readMapOptions = (options: unknown): ReadMapOptions => readOptions(options, 'Image.map', MAP)

/** Numbers per extent: start, length, depth, kind, zero, host offset, file. */
const STRIDE = 7
const ZERO = 1
const UNALLOCATED = 2
const COMPRESSED = 3

/** Guest bytes looked at in one request: adapted to how many extents come back. */
const FIRST_STEP = 2 ** 29
const MAX_STEP = 2 ** 42
const MIN_STEP = 2 ** 21
const MANY = 8192

/** Sizes and offsets of an entry as the caller wants them: see {@link sizesIn}. */
export function entryIn(entry: MapEntry, big: boolean | undefined): MapEntry | MapEntry<bigint> {
  const { start, length, offset } = entry
  if (!big && start + length <= Number.MAX_SAFE_INTEGER && (offset ?? 0) <= Number.MAX_SAFE_INTEGER) return entry
  const size = sizesIn(big)
  return {
    ...entry,
    start: size(start, 'start'),
    length: size(length, 'length'),
    ...(offset !== undefined && { offset: size(offset, 'offset') }),
  } as MapEntry | MapEntry<bigint>
}

/** The extents of an image; `run` runs a request on it. Neighbours of one kind are merged. */
export async function* walkMap(
  image: number,
  virtualSize: number,
  { start = 0, length, depth = 'all', signal }: ReadMapOptions,
  run: <T>(work: () => Promise<T>) => Promise<T>,
): AsyncGenerator<MapEntry, void, undefined> {
  const end = Math.min(virtualSize, start + (length ?? virtualSize))
  let step = FIRST_STEP
  let pending: MapEntry | undefined
  for (let at = start; at < end; ) {
    throwIfAborted(signal)
    const size = Math.min(step, end - at)
    const from = at
    const found = await run(() =>
      requestWatched<NativeExtents>(signal, (number, addon, watch) => addon.extents(number, image, from, size, watch)),
    )
    for (const entry of unpack(found)) {
      const next = depth === 'top' ? seenFromTop(entry) : entry
      const merged: MapEntry | undefined = pending && merge(pending, next)
      if (pending !== undefined && merged === undefined) yield pending
      pending = merged ?? next
    }
    const { numbers } = found
    const count = numbers.length / STRIDE
    // A request ends early where there are very many extents.
    at = count === 0 ? at + size : (numbers.at(-STRIDE) ?? at) + (numbers.at(1 - STRIDE) ?? size)
    if (count > MANY) step = Math.max(MIN_STEP, step / 2)
    else if (count < MANY / 8) step = Math.min(MAX_STEP, step * 2)
  }
  throwIfAborted(signal)
  if (pending !== undefined) yield pending
}

function* unpack({ numbers, files }: NativeExtents): Generator<MapEntry> {
  const at = (index: number): number => numbers[index] ?? 0
  const names = files.map(file => (file === '' ? {} : shown('filename', file)))
  for (let i = 0; i < numbers.length; i += STRIDE) {
    const kind = at(i + 3)
    const offset = at(i + 5)
    const file = names[at(i + 6)]
    yield {
      start: at(i),
      length: at(i + 1),
      depth: at(i + 2),
      present: kind !== UNALLOCATED,
      zero: at(i + 4) === 1,
      data: kind !== ZERO && kind !== UNALLOCATED,
      compressed: kind === COMPRESSED,
      ...(offset >= 0 && { offset }),
      ...file,
    }
  }
}

const seenFromTop = (entry: MapEntry): MapEntry =>
  entry.depth === 0 && entry.present
    ? entry
    : {
        start: entry.start,
        length: entry.length,
        depth: 0,
        present: false,
        zero: false,
        data: false,
        compressed: false,
      }

const sameBytes = (a: Buffer | undefined, b: Buffer | undefined): boolean =>
  a === b || (a !== undefined && b !== undefined && a.equals(b))

/** One entry for two neighbours, if they are of one kind and stored one behind the other. */
function merge(a: MapEntry, b: MapEntry): MapEntry | undefined {
  const same =
    a.depth === b.depth &&
    a.present === b.present &&
    a.zero === b.zero &&
    a.data === b.data &&
    a.compressed === b.compressed &&
    a.filename === b.filename &&
    sameBytes(a.filenameBytes, b.filenameBytes) &&
    (a.offset === undefined ? b.offset === undefined : b.offset === a.offset + a.length)
  return same ? { ...a, length: a.length + b.length } : undefined
}
