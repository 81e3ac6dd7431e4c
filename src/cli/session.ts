/** What a command may use of the process: its streams, its environment, and the signal that ends it early. */

import { encodeText, isText } from '../text.js'
import type { DirectWriter } from './direct-writer.js'
import type { Objects } from './secrets.js'

export interface Session {
  /** The name that messages begin with. */
  readonly program: string
  /** Nothing is read of it before it is asked for. */
  readonly stdin: NodeJS.ReadableStream & { destroy(): unknown }
  readonly stdout: Output
  readonly stderr: Output
  readonly env: NodeJS.ProcessEnv
  /** Aborted by SIGINT, SIGTERM and SIGHUP. */
  readonly signal: AbortSignal
  /** From now on signals do what the system does without the program. */
  release(): void
  /** What `--object` and `--image-opts` brought. */
  readonly objects: Objects
}

/** A stream that may be a terminal. */
export type Sink = NodeJS.WritableStream & {
  readonly isTTY?: boolean
  readonly columns?: number
  readonly writableNeedDrain?: boolean
  getColorDepth?(env?: object): number
}

const CHUNK = 1 << 16

/**
 * A stream of text; names in it come out as the bytes that they are (`text.ts`). Writes are gathered, so that a listing of a million lines is not a million system calls, and a reader
 * who has seen enough (`| head`) ends the output quietly, not the work.
 */
export class Output {
  readonly #open: () => Sink
  #opened: Sink | undefined
  readonly #lost: ((error: Error) => void) | undefined
  #direct: DirectWriter | undefined
  #pending = ''
  #closed = false
  #abandoned = false
  /** Pieces that the stream has not written yet. */
  #unwritten = 0
  /** Who waits for the stream to move on. */
  #waiting: (() => void)[] = []

  /**
   * The stream is opened when it is needed: most of what is printed the `direct` writer takes at once. `lost` hears of an error that is not
   * just a reader who has seen enough.
   */
  constructor(stream: Sink | (() => Sink), lost?: (error: Error) => void, direct?: DirectWriter) {
    this.#open = typeof stream === 'function' ? stream : () => stream
    this.#lost = lost
    this.#direct = direct
    // A stream that is there already may fail before anything is written.
    if (typeof stream !== 'function') void this.stream
  }

  get stream(): Sink {
    if (this.#opened !== undefined) return this.#opened
    const stream = this.#open()
    this.#opened = stream
    stream.on('error', (error: NodeJS.ErrnoException) => {
      this.#end(error)
      this.#wake()
    })
    // Once for all that will ever wait.
    stream.on('drain', () => this.#wake())
    stream.on('close', () => {
      this.#closed = true
      this.#wake()
    })
    return stream
  }

  get isTerminal(): boolean {
    return this.#direct === undefined && this.stream.isTTY === true
  }

  /** Nobody reads any more. */
  get closed(): boolean {
    return this.#closed
  }

  /** What is under way is left where it is: its reader may never take it, and the process ends without it. */
  abandon(): void {
    this.#closed = true
    this.#abandoned = true
    this.#wake()
  }

  /** Whether it was abandoned. */
  get abandoned(): boolean {
    return this.#abandoned
  }

  write(text: string): void {
    this.#pending += text
    if (this.#pending.length >= CHUNK) this.flush()
  }

  /** Hands what is gathered to the stream. */
  flush(): void {
    const text = this.#pending
    this.#pending = ''
    if (text === '' || this.#closed) return
    const rest = this.#writeDirectly(text)
    if (rest.length === 0) return
    this.#unwritten += 1
    this.stream.write(rest, () => {
      this.#unwritten -= 1
      this.#wake()
    })
  }

  /** Waits until the reader has caught up. */
  async drained(): Promise<void> {
    while (this.#opened?.writableNeedDrain && !this.#closed) await this.#moved()
  }

  /**
   * Hands over what is gathered, and waits until the system has all of it: what another stream writes then comes behind it, also where
   * both lead to one reader.
   */
  async written(): Promise<void> {
    this.flush()
    while (this.#unwritten > 0 && !this.#closed) await this.#moved()
  }

  /** What is left for the stream. From the first such piece on all goes that way, in its order. */
  #writeDirectly(text: string): string | Buffer {
    if (this.#direct === undefined) return isText(text) ? text : encodeText(text)
    const bytes = encodeText(text)
    try {
      const taken = this.#direct(bytes)
      if (taken < bytes.length) this.#direct = undefined
      return bytes.subarray(taken)
    } catch (error) {
      this.#end(error as NodeJS.ErrnoException)
      return ''
    }
  }

  #end(error: NodeJS.ErrnoException): void {
    const first = !this.#closed
    this.#closed = true
    if (first && error.code !== 'EPIPE' && error.code !== 'ERR_STREAM_DESTROYED') this.#lost?.(error)
  }

  #moved(): Promise<void> {
    return new Promise(resolve => {
      this.#waiting.push(resolve)
    })
  }

  #wake(): void {
    const waiting = this.#waiting
    this.#waiting = []
    for (const resolve of waiting) resolve()
  }
}
