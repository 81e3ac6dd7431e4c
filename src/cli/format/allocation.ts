/** How a disk's bytes are stored, summed up by cell: what the pictures of `map` draw. */

import type { MapExtent } from './map.js'

/**
 * How guest bytes are stored. `backing1` to `backing3` are data, compressed or not, that the image takes from one, two,
 * or more files below it.
 */
export const KINDS = ['data', 'compressed', 'backing1', 'backing2', 'backing3', 'zero', 'unallocated'] as const
export type Kind = (typeof KINDS)[number]

const KIND_INDEX: Readonly<Record<Kind, number>> = {
  data: 0,
  compressed: 1,
  backing1: 2,
  backing2: 3,
  backing3: 4,
  zero: 5,
  unallocated: 6,
}

export function kindOf({ data, zero, present, compressed, depth }: MapExtent): Kind {
  if (!present) return 'unallocated'
  if (zero || !data) return 'zero'
  if (depth === 0) return compressed ? 'compressed' : 'data'
  if (depth === 1) return 'backing1'
  return depth === 2 ? 'backing2' : 'backing3'
}

/** How the disk is cut: `columns` cells of `cellBytes` in each row, the last row as long as the disk needs. */
export interface Grid {
  readonly start: number
  readonly length: number
  readonly columns: number
  readonly cellBytes: number
  readonly cells: number
}

/** A power of two of `bytes` or more, or, where that makes readable rows, three quarters of one. */
function roundCell(bytes: number, columns: number): number {
  let size = 512
  while (size < bytes) size *= 2
  // Rows of 3 * 2^n bytes begin at offsets that people can read; rows of 9 * 2^n bytes do not.
  return columns % 3 !== 0 && size > 1024 && size * 0.75 >= bytes ? size * 0.75 : size
}

/** Cuts `length` bytes into at most `rows` rows; cells are at least a sector. */
export function gridFor(start: number, length: number, columns: number, rows: number): Grid {
  const cellBytes = roundCell(length / (columns * rows), columns)
  return { start, length, columns, cellBytes, cells: Math.ceil(length / cellBytes) }
}

export interface Totals {
  bytes: number
  extents: number
}

/** Filled extent by extent, in bounded memory however many there are. */
export class Allocation {
  readonly grid: Grid
  readonly totals: Readonly<Record<Kind, Totals>> = {
    data: { bytes: 0, extents: 0 },
    compressed: { bytes: 0, extents: 0 },
    backing1: { bytes: 0, extents: 0 },
    backing2: { bytes: 0, extents: 0 },
    backing3: { bytes: 0, extents: 0 },
    zero: { bytes: 0, extents: 0 },
    unallocated: { bytes: 0, extents: 0 },
  }
  /** Bytes per cell and kind. */
  readonly #bytes: Float64Array

  constructor(grid: Grid) {
    this.grid = grid
    this.#bytes = new Float64Array(grid.cells * KINDS.length)
  }

  add(extent: MapExtent): void {
    const kind = kindOf(extent)
    const { start, cellBytes, length } = this.grid
    const total = this.totals[kind]
    total.bytes += extent.length
    total.extents += 1
    const end = Math.min(extent.start + extent.length - start, length)
    for (let at = Math.max(extent.start - start, 0); at < end; ) {
      const cell = Math.floor(at / cellBytes)
      const next = Math.min((cell + 1) * cellBytes, end)
      const slot = cell * KINDS.length + KIND_INDEX[kind]
      this.#bytes[slot] = (this.#bytes[slot] ?? 0) + (next - at)
      at = next
    }
  }

  /** The part of a cell that is of a kind, 0 to 1. The last cell counts only what lies within the disk. */
  share(cell: number, kind: Kind): number {
    const { cellBytes, length } = this.grid
    const size = Math.min(cellBytes, length - cell * cellBytes)
    return (this.#bytes[cell * KINDS.length + KIND_INDEX[kind]] ?? 0) / size
  }

  /** The kinds that occur anywhere, in drawing order. */
  get present(): Kind[] {
    return KINDS.filter(kind => this.totals[kind].bytes > 0)
  }
}

/** Kinds that take room in some file. */
export const STORED: readonly Kind[] = ['data', 'compressed', 'backing1', 'backing2', 'backing3']

export const LABELS: Readonly<Record<Kind, string>> = {
  data: 'data',
  compressed: 'compressed',
  backing1: 'backing file',
  backing2: '2nd backing file',
  backing3: 'deeper in the chain',
  zero: 'zero',
  unallocated: 'unallocated',
}

/** What the pictures say about the disk as a whole. */
export interface DiskCaption {
  readonly filename: string
  readonly format: string
  readonly virtualSize: number
  readonly clusterSize: number | undefined
  readonly fileSize: number | undefined
  /** The files of the chain, the image first. */
  readonly chain: readonly string[]
}
