/** The states of a handle: open, closing (no new requests, running ones finish), closed. */

import { Qcow2Error } from '../errors.js'

/** Counts the requests of one handle, and closes it when asked and none is left. */
export class Lifetime {
  readonly #what: () => string
  readonly #release: () => Promise<void>
  #running = 0
  #released = false
  #closing: Promise<void> | undefined
  #idle: (() => void) | undefined

  /** `what` names the handle in errors; `release` frees what it holds. */
  constructor(what: () => string, release: () => Promise<void>) {
    this.#what = what
    this.#release = release
  }

  /** Whether `close` was called. */
  get closed(): boolean {
    return this.#closing !== undefined
  }

  get state(): 'open' | 'closing' | 'closed' {
    if (this.#closing === undefined) return 'open'
    return this.#released ? 'closed' : 'closing'
  }

  /** Begins a request. Every `enter` that returns is followed by one `leave`. */
  enter(): void {
    if (this.#closing !== undefined) {
      throw new Qcow2Error('ERR_QCOW2_CLOSED', `${this.#what()} is closed`)
    }
    this.#running += 1
  }

  /** Ends a request. */
  leave(): void {
    this.#running -= 1
    if (this.#running === 0) this.#idle?.()
  }

  /** Runs a request between `enter` and `leave`. */
  async run<T>(work: () => Promise<T>): Promise<T> {
    this.enter()
    try {
      return await work()
    } finally {
      this.leave()
    }
  }

  /** Closes once; every call waits for the same end. */
  close(): Promise<void> {
    this.#closing ??= this.#drain()
    return this.#closing
  }

  async #drain(): Promise<void> {
    if (this.#running > 0) {
      await new Promise<void>(resolve => {
        this.#idle = resolve
      })
    }
    try {
      await this.#release()
    } finally {
      this.#released = true
    }
  }
}
