/** Disks of which ranges are asked: what is the same for all of them, whoever is asked. */

import { invalidArgument } from '../errors.js'
import type { RandomAccessSource } from '../random-access.js'

/** Bytes of the first request: what is asked for first, once there is a size. */
export const FIRST = 2 ** 20

/** Requests at once, where nothing is said. */
export const CONCURRENCY = 8

/** A disk of which ranges can be asked. */
export interface Ranged extends Required<Pick<RandomAccessSource, 'size' | 'name' | 'identity' | 'concurrency'>> {
  /** The beginning, which came with the size. */
  readonly first: Uint8Array
  /** Fills a buffer that is not empty with the bytes from `position` on, all of which there are. */
  fill(buffer: Uint8Array, position: number, signal: AbortSignal | undefined): Promise<void>
  /** Nothing will be asked for a while. */
  rest?(): void
}

/** A disk of which ranges are asked. */
export class RangedSource implements RandomAccessSource {
  readonly size: number
  readonly name: string | undefined
  readonly identity: string | undefined
  readonly concurrency: number | undefined
  readonly #ranged: Ranged
  #first: Uint8Array | undefined

  constructor(ranged: Ranged) {
    this.size = ranged.size
    this.name = ranged.name
    this.identity = ranged.identity
    this.concurrency = ranged.concurrency
    this.#ranged = ranged
    this.#first = ranged.first
  }

  async read(buffer: Uint8Array, position: number, signal?: AbortSignal): Promise<number> {
    const end = position + buffer.length
    if (!Number.isSafeInteger(position) || position < 0 || end > this.size) {
      const message = `read: bytes ${position} to ${end} are not all in the ${this.size} that there are`
      throw invalidArgument('position', message)
    }
    if (this.#first !== undefined && end <= this.#first.length) buffer.set(this.#first.subarray(position, end))
    else if (buffer.length > 0) await this.#ranged.fill(buffer, position, signal)
    return buffer.length
  }

  /** Forgets what it kept. It can be opened again. */
  close(): void {
    this.#first = undefined
    this.#ranged.rest?.()
  }
}
