/** The disk as runs of one kind, for a picture to zoom into: exact, or by cells where there are very many. */

import { Allocation, gridFor, KINDS, type Kind, kindOf } from './allocation.js'
import type { MapExtent } from './map.js'

/** More are not put into a page. */
const MOST = 20_000
const CELLS = 16_384

/** A run: its length in bytes, the number of its kind in {@link KINDS}, and its place in the file, or -1. */
export type Run = readonly [length: number, kind: number, offset: number]

export class Runs {
  readonly #runs: Run[] = []
  readonly #coarse: Allocation
  #exact = true

  constructor(length: number) {
    this.#coarse = new Allocation(gridFor(0, length, 128, CELLS / 128))
  }

  /** Bytes of a cell; 0 where runs are exact. */
  get cellBytes(): number {
    return this.#exact ? 0 : this.#coarse.grid.cellBytes
  }

  add(extent: MapExtent): void {
    this.#coarse.add(extent)
    if (!this.#exact) return
    const { length, offset, depth } = extent
    this.#runs.push([length, KINDS.indexOf(kindOf(extent)), depth === 0 ? (offset ?? -1) : -1])
    if (this.#runs.length <= MOST) return
    this.#exact = false
    this.#runs.length = 0
  }

  /** From the disk's begin to its end. */
  list(): readonly Run[] {
    return this.#exact ? this.#runs : this.#cells()
  }

  #cells(): Run[] {
    const { cells, cellBytes, length } = this.#coarse.grid
    const runs: Run[] = []
    for (let cell = 0; cell < cells; cell += 1) {
      const kind = KINDS.indexOf(this.#mostOf(cell))
      const size = Math.min(cellBytes, length - cell * cellBytes)
      const last = runs.at(-1)
      if (last !== undefined && last[1] === kind) runs[runs.length - 1] = [last[0] + size, kind, -1]
      else runs.push([size, kind, -1])
    }
    return runs
  }

  /** Whatever is stored is seen, however little of the cell it is. */
  #mostOf(cell: number): Kind {
    const shares = KINDS.map(kind => [kind, this.#coarse.share(cell, kind)] as const)
    const stored = shares.filter(([kind, share]) => share > 0 && kind !== 'unallocated' && kind !== 'zero')
    const among = stored.length > 0 ? stored : shares
    return among.reduce((most, next) => (next[1] > most[1] ? next : most))[0]
  }
}
