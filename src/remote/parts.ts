/** A stream of bytes cut into parts of one size, in memory that is used again. */

import { invalidArgument } from '../errors.js'
import type { Reader } from '../options.js'
import { answer } from '../support/signals.js'
import { describe } from '../units.js'

/** Reads a stream of bytes: a Readable of Node's, a web stream, a generator. */
export const byteStream: Reader<AsyncIterable<Uint8Array>> = (value, name) => {
  if (typeof value === 'object' && value !== null && Symbol.asyncIterator in value) {
    return value as AsyncIterable<Uint8Array>
  }
  throw invalidArgument(name, `${name} must be a stream of bytes (a Readable), not ${describe(value)}`)
}

/** What becomes of a stream is heard where it is read: until then, and when nobody reads it any more, its error must not end the process. */
export function hush(stream: object): void {
  if ('on' in stream && typeof stream.on === 'function') stream.on('error', () => {})
}

/** Parts of a stream, each of `size` bytes but for the last one. */
export class Parts {
  /** Bytes that were taken from the stream. */
  taken = 0
  readonly #iterator: AsyncIterator<Uint8Array>
  readonly #stream: AsyncIterable<Uint8Array>
  readonly #size: number
  readonly #signal: AbortSignal
  readonly #free: Uint8Array[] = []
  #rest: Uint8Array = new Uint8Array(0)
  #ended = false

  /** The signal ends waiting for bytes. */
  constructor(stream: AsyncIterable<Uint8Array>, size: number, signal: AbortSignal) {
    this.#stream = stream
    this.#iterator = stream[Symbol.asyncIterator]()
    this.#size = size
    this.#signal = signal
  }

  /** The next part; empty where there are no more. */
  async next(): Promise<Uint8Array> {
    const part = this.#free.pop() ?? new Uint8Array(this.#size)
    let filled = 0
    while (filled < part.length) {
      if (this.#rest.length === 0 && !(await this.#more())) break
      const chunk = this.#rest.subarray(0, part.length - filled)
      part.set(chunk, filled)
      filled += chunk.length
      this.#rest = this.#rest.subarray(chunk.length)
    }
    return part.subarray(0, filled)
  }

  /** Takes the memory of a part back, of which nothing is needed any more. */
  reuse(part: Uint8Array): void {
    if (part.length === this.#size) this.#free.push(part)
  }

  /** Gives up a stream that is not read to its end. */
  destroy(error: unknown): void {
    if (this.#ended) return
    this.#ended = true
    const stream: object = this.#stream
    if ('destroy' in stream && typeof stream.destroy === 'function') {
      stream.destroy(error instanceof Error ? error : undefined)
    } else Promise.resolve(this.#iterator.return?.()).catch(() => {})
  }

  async #more(): Promise<boolean> {
    if (this.#ended) return false
    const { done, value } = await answer(() => this.#iterator.next(), this.#signal)
    if (done === true) {
      this.#ended = true
      return false
    }
    if (!(value instanceof Uint8Array)) {
      throw invalidArgument('bytes', `the stream must give bytes (Uint8Array), not ${describe(value)}`)
    }
    this.taken += value.length
    this.#rest = value
    return true
  }
}
