/** A disk in memory as a source that remembers what it was asked. */

import type { RandomAccessSource } from 'qcow2'

type Method = 'read' | 'write' | 'sync' | 'truncate' | 'extents' | 'close'

export class MemorySource implements RandomAccessSource {
  bytes: Buffer
  /** The requests, in order. */
  readonly asked: { readonly what: Method; readonly position: number; readonly length: number }[] = []
  /** Requests that are under way, and the most that ever were. */
  running = 0
  most = 0
  /** Called before each answer. */
  before: (what: Method, signal: AbortSignal | undefined) => unknown = () => undefined

  constructor(bytes: Uint8Array) {
    this.bytes = Buffer.from(bytes)
  }

  get size(): number {
    return this.bytes.length
  }

  /** How often something was asked. */
  count(what: Method): number {
    return this.asked.filter(each => each.what === what).length
  }

  async read(buffer: Uint8Array, position: number, signal: AbortSignal): Promise<number> {
    return this.#run('read', position, buffer.length, signal, () => {
      buffer.set(this.bytes.subarray(position, position + buffer.length))
      return buffer.length
    })
  }

  async close(): Promise<void> {
    await this.#run('close', 0, 0, undefined, () => 0)
  }

  async #run<T>(
    what: Method,
    position: number,
    length: number,
    signal: AbortSignal | undefined,
    work: () => T,
  ): Promise<T> {
    this.asked.push({ what, position, length })
    this.running += 1
    this.most = Math.max(this.most, this.running)
    try {
      await this.before(what, signal)
      return work()
    } finally {
      this.running -= 1
    }
  }

  /** The same, which can be written to and has any size. */
  writable(): RandomAccessSource {
    const size = (): number => this.bytes.length
    return {
      get size() {
        return size()
      },
      read: (buffer, position, signal) => this.read(buffer, position, signal),
      write: (buffer, position, signal) =>
        this.#run('write', position, buffer.length, signal, () => {
          this.#resize(Math.max(this.size, position + buffer.length))
          this.bytes.set(buffer, position)
          return buffer.length
        }),
      sync: signal => this.#run('sync', 0, 0, signal, () => undefined),
      truncate: (length, signal) => this.#run('truncate', length, 0, signal, () => this.#resize(length)),
      close: () => this.close(),
      identity: 'memory',
    }
  }

  #resize(length: number): void {
    if (length === this.bytes.length) return
    const bytes = Buffer.alloc(length)
    this.bytes.copy(bytes)
    this.bytes = bytes
  }
}

/** What never settles. */
export const never = (): Promise<never> => new Promise(() => {})
