/** Taking a stream in: no more bytes than there may be, and no faster than they are used up. */

// Not the global one, which test runners replace by a fake that never fires by itself.
import { setTimeout } from 'node:timers'
import { Qcow2Error } from './errors.js'
import type { Spool } from './spool.js'
import { Halt, type Incoming } from './support/incoming.js'

/** What a stream is held to. Bytes. */
export interface Bounds {
  /** What it has. */
  readonly byteLength: number | undefined
  /** What it has at most, by the limits that say so. */
  readonly most: readonly { readonly field: string; readonly bytes: number | undefined }[]
  /** What of it may be stored. */
  readonly maxSpool: number | undefined
}

/** Bytes that are stored ahead of who reads them: more are taken only where somebody waits for them. */
const AHEAD = 32 << 20
/** Bytes that are handed over at once. */
const PIECE = 1 << 20
/** Milliseconds between two looks whether there is room. */
const LOOK = 10
/** Milliseconds in which a copy that goes on gives some room back. */
const PATIENCE = 5000

/** What is done with a stream while it comes in. `opened` says that the image in it is open, and its data is used up from now on. */
export type Use<T> = (opened: () => void) => Promise<T>

/** A stream that is taken in. */
export class Intake {
  readonly #source: Incoming
  readonly #bounds: Bounds
  readonly #halt = new Halt()
  /** Taken to be judged, and not handed over yet. */
  #first: Uint8Array[] = []
  #came = 0
  #ended = false
  #opened = false

  constructor(source: Incoming, bounds: Bounds) {
    this.#source = source
    this.#bounds = bounds
  }

  /** Nothing more is taken; what waits for the stream rejects with the error. */
  halt(error: unknown): void {
    this.#halt.halt(error)
  }

  /** The stream is given up. */
  leave(keep: boolean): void {
    if (!this.#ended) this.#source.leave(keep)
  }

  /** The first bytes, as many as asked for or there are, and whether those are all. */
  async head(length: number): Promise<{ readonly head: Buffer; readonly whole: boolean }> {
    this.#judge(this.#bounds.byteLength ?? 0)
    while (this.#came < length && !this.#ended) {
      const chunk = await this.#next()
      // Whoever made it may fill it with something else when it asks for more.
      if (chunk !== undefined) this.#first.push(Buffer.from(chunk))
    }
    this.#first = [Buffer.concat(this.#first)]
    const [all] = this.#first
    return { head: Buffer.from(all?.subarray(0, length) ?? []), whole: this.#ended && this.#came <= length }
  }

  /** Hands all of it over to the spool, while it is used. What fails first is what this rejects with. */
  async into<T>(spool: Spool, use: Use<T>): Promise<T> {
    let broken: { readonly error: unknown } | undefined
    const feeding = this.#feed(spool).catch((error: unknown) => {
      broken ??= { error }
      spool.cancel()
    })
    try {
      const result = await use(() => {
        this.#opened = true
      })
      await feeding
      if (broken === undefined) return result
    } catch (error) {
      this.halt(error)
      await feeding
      throw broken === undefined ? error : broken.error
    }
    throw broken.error
  }

  async #feed(spool: Spool): Promise<void> {
    const first = this.#first
    this.#first = []
    for (const chunk of first) await this.#handOver(spool, chunk)
    for (;;) {
      const chunk = this.#ended ? undefined : await this.#next()
      if (chunk === undefined) break
      await this.#handOver(spool, chunk)
    }
    spool.complete()
  }

  async #handOver(spool: Spool, chunk: Uint8Array): Promise<void> {
    for (let offset = 0; offset < chunk.length; offset += PIECE) {
      const length = Math.min(PIECE, chunk.length - offset)
      await this.#room(spool, length, this.#bounds.maxSpool ?? Number.POSITIVE_INFINITY)
      await spool.feed(chunk, offset, length)
    }
  }

  /** Waits until there is room for more, and a use of it. */
  async #room(spool: Spool, length: number, most: number): Promise<void> {
    let before = Number.POSITIVE_INFINITY
    let since = performance.now()
    for (;;) {
      const { came, stored, wanted } = spool.progress
      if (stored + length <= most && (stored + length <= AHEAD || wanted)) return
      const now = performance.now()
      if (stored < before) {
        before = stored
        since = now
      }
      // Before the image is open nothing of it is given back.
      if (wanted && stored + length > most && (!this.#opened || now - since > PATIENCE)) {
        const message =
          `the image is laid out so that more than ${most} bytes of it have to be stored: after ${came} bytes of the stream, what it ` +
          'needs first has not come (a larger maxSpool takes it)'
        throw new Qcow2Error('ERR_QCOW2_LIMIT', message, { field: 'maxSpool', offset: came })
      }
      await this.#halt.of(new Promise<void>(resolve => setTimeout(resolve, LOOK)))
    }
  }

  /** The next chunk; undefined at the end, which is where it was said to be. */
  async #next(): Promise<Uint8Array | undefined> {
    const { byteLength } = this.#bounds
    const chunk = await this.#halt.of(this.#source.next()).catch((error: unknown) => {
      if (this.#halt.halted || error instanceof Qcow2Error) throw error
      const reason = error instanceof Error ? error.message : String(error)
      const message = `the stream broke after ${this.#came} bytes: ${reason}`
      throw new Qcow2Error('ERR_QCOW2_IO', message, { offset: this.#came, cause: error })
    })
    if (chunk === undefined) {
      this.#ended = true
      if (byteLength === undefined || byteLength === this.#came) return undefined
      const message = `the stream ended after ${this.#came} of the ${byteLength} bytes that it was said to have`
      throw new Qcow2Error('ERR_QCOW2_IO', message, { offset: this.#came, field: 'byteLength' })
    }
    this.#came += chunk.length
    if (byteLength !== undefined && this.#came > byteLength) {
      const message = `the stream goes on behind the ${byteLength} bytes that it was said to have`
      throw new Qcow2Error('ERR_QCOW2_IO', message, { offset: byteLength, field: 'byteLength' })
    }
    this.#judge(this.#came)
    return chunk
  }

  /** Refuses more bytes than there may be. */
  #judge(length: number): void {
    for (const { field, bytes } of this.#bounds.most) {
      if (bytes === undefined || length <= bytes) continue
      const message = `the stream has ${length} bytes or more, and the limit ${field} is ${bytes}`
      throw new Qcow2Error('ERR_QCOW2_LIMIT', message, { field })
    }
  }
}
