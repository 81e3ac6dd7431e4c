/** A planned stream of the addon as a Readable of Node's: what is read ahead, how it ends, what it tells of its progress. */

import type { Readable } from 'node:stream'
import { AbortError } from './errors.js'
import type { LongRunning } from './options.js'
import { nodeStream } from './support/node-stream.js'
import { requestWatched } from './support/requests.js'
import { onAbort } from './support/signals.js'

/** Bytes of a request, and what a consumer that does not ask for anything is given to keep. */
const CHUNK = 2 ** 20
/** Most requests at the same time. */
const MOST_AHEAD = 8
const PROGRESS_INTERVAL = 250

/** What is emitted. */
export interface Emitted {
  /** The addon's number of the stream. */
  readonly stream: number
  /** First byte, and the one behind the last. */
  readonly start: number
  readonly end: number
  /** Requests at the same time. */
  readonly ahead: number
  /** Tells how many of its bytes are there. */
  readonly report: ((emitted: number) => unknown) | undefined
  /** Frees everything, once. */
  close(): Promise<void>
}

/** The bytes as a stream. It frees what it holds when it ends, however it does. */
export function emit(emitted: Emitted, { signal, progressInterval }: LongRunning): Readable & { byteLength: number } {
  const chunks = new Chunks(emitted)
  const forget = { signal: () => {}, timer: () => {} }
  let done = emitted.start
  const readable = new (nodeStream().Readable)({
    highWaterMark: CHUNK,
    read() {
      const next = chunks.next()
      if (next === undefined) {
        if (tell()) readable.push(null)
        return
      }
      next.then(
        buffer => {
          done += buffer.length
          readable.push(buffer)
        },
        (error: unknown) => readable.destroy(toThrown(error)),
      )
    },
    destroy(error, callback) {
      forget.signal()
      forget.timer()
      chunks
        .stop()
        .then(() => emitted.close())
        .then(
          () => callback(error),
          (failure: unknown) => callback(error ?? toThrown(failure)),
        )
    },
  })
  /** Whether the caller could be told. */
  const tell = (): boolean => {
    try {
      const returned = emitted.report?.(done - emitted.start)
      // Of a stream that is gone nobody hears.
      Promise.resolve(returned).catch((error: unknown) => readable.destroy(toThrown(error)))
      return true
    } catch (error) {
      readable.destroy(toThrown(error))
      return false
    }
  }
  if (emitted.report !== undefined) {
    const timer = setInterval(tell, progressInterval ?? PROGRESS_INTERVAL).unref()
    forget.timer = () => clearInterval(timer)
  }
  forget.signal = onAbort(signal, () => readable.destroy(new AbortError(signal?.reason)))
  return Object.assign(readable, { byteLength: emitted.end - emitted.start })
}

/** A stream's errors are objects; what a caller's function throws need not be one. */
const toThrown = (error: unknown): Error =>
  error instanceof Error ? error : new Error(String(error), { cause: error })

/** The chunks in their order, some of them read ahead. */
class Chunks {
  readonly #of: Emitted
  readonly #ending = new AbortController()
  readonly #ahead: Promise<Buffer>[] = []
  readonly #running = new Set<Promise<Buffer>>()
  #position: number

  constructor(of: Emitted) {
    this.#of = of
    this.#position = of.start
  }

  /** The next one; undefined at the end. */
  next(): Promise<Buffer> | undefined {
    const { ahead, end } = this.#of
    // One is waited for, and as many are read ahead.
    while (this.#ahead.length <= Math.min(ahead, MOST_AHEAD) && this.#position < end) this.#begin()
    return this.#ahead.shift()
  }

  /** Cancels what is under way, and waits for it. */
  async stop(): Promise<void> {
    this.#position = this.#of.end
    this.#ending.abort()
    await Promise.allSettled(this.#running)
  }

  #begin(): void {
    const position = this.#position
    // Later chunks begin at whole ones, wherever the first does.
    const buffer = Buffer.allocUnsafeSlow(Math.min(CHUNK - (position % CHUNK), this.#of.end - position))
    const read = this.#read(buffer, position)
    this.#running.add(read)
    this.#ahead.push(read)
    this.#position += buffer.length
    // A failure counts when its turn comes, which it does not if the consumer stops before.
    const ended = (): void => {
      this.#running.delete(read)
    }
    read.then(ended, ended)
  }

  async #read(buffer: Buffer, position: number): Promise<Buffer> {
    await requestWatched<void>(
      this.#ending.signal,
      (number, addon, watch) => addon.readStream(number, this.#of.stream, buffer, position, watch),
      { buffer },
    )
    return buffer
  }
}
