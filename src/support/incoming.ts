/** Streams that a caller hands over, chunk by chunk: Node's, web streams, and whatever else is iterated asynchronously. */

import { AbortError, invalidArgument } from '../errors.js'
import { describe } from '../units.js'

/** What comes in. */
export interface Incoming {
  /** The next chunk, never empty; undefined at the end. Rejects with what the stream fails with. */
  next(): Promise<Uint8Array | undefined>
  /**
   * Nothing more is taken, and the stream is told so, which ends it; nobody waits until it has ended. With `keep`, a stream of Node's is left
   * as it is.
   */
  leave(keep: boolean): void
}

type Chunks = Pick<AsyncIterator<unknown>, 'next' | 'return'>

/** A stream of Node's, as far as it matters here. */
interface NodeReadable {
  iterator(options: { destroyOnReturn: boolean }): AsyncIterator<unknown>
}

/** Checks what a caller handed over. `name` is the argument's, for the message. */
export function incoming(input: unknown, name: string): Incoming {
  if (typeof input !== 'object' || input === null) throw refused(input, name)
  if ('getReader' in input && typeof input.getReader === 'function') {
    return ofWeb((input as ReadableStream<unknown>).getReader(), name)
  }
  if ('iterator' in input && typeof input.iterator === 'function') {
    const readable = input as NodeReadable
    // One iterator: how it is left is said when it is.
    const chunks = readable.iterator({ destroyOnReturn: false })
    const destroy = 'destroy' in input && typeof input.destroy === 'function' ? input.destroy.bind(input) : undefined
    return ofChunks(chunks, name, () => destroy?.())
  }
  if (!(Symbol.asyncIterator in input)) throw refused(input, name)
  return ofChunks((input as AsyncIterable<unknown>)[Symbol.asyncIterator](), name)
}

const refused = (input: unknown, name: string): Error =>
  invalidArgument(name, `${name} must be a Readable, a ReadableStream or an async iterable, not ${describe(input)}`)

function ofChunks(chunks: Chunks, name: string, destroy?: () => void): Incoming {
  return {
    next: () => nextOf(async () => chunks.next(), name),
    leave(keep) {
      // What is under way comes first, and may never come.
      const left = async (): Promise<unknown> => chunks.return?.()
      left().catch(() => {})
      if (!keep) destroy?.()
    },
  }
}

function ofWeb(reader: ReadableStreamDefaultReader<unknown>, name: string): Incoming {
  return {
    next: () => nextOf(() => reader.read(), name),
    leave() {
      reader.cancel().catch(() => {})
    },
  }
}

async function nextOf(
  read: () => Promise<{ done?: boolean | undefined; value?: unknown }>,
  name: string,
): Promise<Uint8Array | undefined> {
  for (;;) {
    const { done, value } = await read()
    if (done) return undefined
    if (!(value instanceof Uint8Array)) {
      throw invalidArgument(name, `${name} must give Buffers or Uint8Arrays, not ${describe(value)}`)
    }
    if (value.length > 0) return value
  }
}

/**
 * Something that is waited for unless it is halted first. Of a promise that is never settled nothing stays behind but itself.
 */
export class Halt {
  #halted: { readonly error: unknown } | undefined
  #reject: ((error: unknown) => void) | undefined

  get halted(): boolean {
    return this.#halted !== undefined
  }

  /** What is waited for, now and later, rejects. */
  halt(error: unknown): void {
    this.#halted ??= { error }
    this.#reject?.(error)
  }

  /** One at a time. */
  async of<T>(wanted: Promise<T>): Promise<T> {
    if (this.#halted !== undefined) {
      wanted.catch(() => {})
      throw this.#halted.error
    }
    return await new Promise<T>((resolve, reject) => {
      this.#reject = reject
      wanted.then(resolve, reject)
    })
  }

  abort(signal: AbortSignal): void {
    this.halt(new AbortError(signal.reason))
  }
}
