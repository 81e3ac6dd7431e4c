/** Where in its file an image keeps the parts of its disk, on a fixed raster: order and scatter at a glance. */

import type { MapExtent } from './map.js'

export const LAYOUT_COLUMNS = 300
export const LAYOUT_ROWS = 48

/** Columns are guest offsets, rows are offsets in the file. Filled extent by extent, in fixed memory. */
export class Layout {
  /** Bytes of the file that the rows span. */
  readonly fileLength: number
  readonly #start: number
  readonly #length: number
  readonly #marks = new Uint8Array(LAYOUT_COLUMNS * LAYOUT_ROWS)
  #empty = true

  constructor(start: number, length: number, fileLength: number) {
    this.#start = start
    this.#length = length
    this.fileLength = fileLength
  }

  /** Nothing to show: no data is stored in the image itself as it is. */
  get empty(): boolean {
    return this.#empty
  }

  /** Only what the image itself stores uncompressed has a place of its own in the file. */
  add({ start, length, depth, data, offset }: MapExtent): void {
    if (depth !== 0 || !data || offset === undefined || length === 0) return
    const column = (at: number): number => at * (LAYOUT_COLUMNS / this.#length)
    const first = Math.floor(column(start - this.#start))
    const last = Math.min(LAYOUT_COLUMNS - 1, Math.ceil(column(start + length - this.#start)) - 1)
    for (let x = first; x <= last; x += 1) {
      // The bytes of the extent that this column stands for, and the rows that they are in.
      const from = Math.max(0, (x * this.#length) / LAYOUT_COLUMNS + this.#start - start)
      const to = Math.min(length, ((x + 1) * this.#length) / LAYOUT_COLUMNS + this.#start - start)
      this.#mark(x, offset + from, offset + Math.max(to, from + 1))
    }
  }

  #mark(x: number, from: number, to: number): void {
    const row = (at: number): number => at * (LAYOUT_ROWS / this.fileLength)
    const last = Math.min(LAYOUT_ROWS - 1, Math.ceil(row(to)) - 1)
    for (let y = Math.floor(row(from)); y <= last; y += 1) {
      this.#marks[y * LAYOUT_COLUMNS + x] = 1
      this.#empty = false
    }
  }

  /** Runs of marked columns, row by row. */
  *runs(): Generator<{ readonly row: number; readonly column: number; readonly length: number }> {
    for (let row = 0; row < LAYOUT_ROWS; row += 1) {
      const line = this.#marks.subarray(row * LAYOUT_COLUMNS, (row + 1) * LAYOUT_COLUMNS)
      for (let column = line.indexOf(1); column !== -1; ) {
        const end = line.indexOf(0, column)
        const next = end === -1 ? LAYOUT_COLUMNS : end
        yield { row, column, length: next - column }
        column = line.indexOf(1, next)
      }
    }
  }
}
