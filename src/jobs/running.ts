/** An attempt under way: until when it may go on, and why it was ended. */

import { LockLost } from './target.js'

export type End =
  | { readonly type: 'cancelled'; readonly reason: string }
  | { readonly type: 'lost' }
  | { readonly type: 'returned' }

export class Running {
  readonly #abort = new AbortController()
  #heard = performance.now()
  #end: End | undefined

  /** Aborted when the attempt is to end. */
  get signal(): AbortSignal {
    return this.#abort.signal
  }

  /** Why it was ended, if it was: the first reason counts. */
  get end(): End | undefined {
    return this.#end
  }

  /** Resolves when it was ended. */
  get ended(): Promise<void> {
    if (this.signal.aborted) return Promise.resolve()
    return new Promise(resolve => this.signal.addEventListener('abort', () => resolve(), { once: true }))
  }

  /** Milliseconds since the queue last said that the lock is this attempt's. */
  get silentFor(): number {
    return performance.now() - this.#heard
  }

  renewed(): void {
    this.#heard = performance.now()
  }

  cancel(reason: string): void {
    this.#stop({ type: 'cancelled', reason }, new Error(`cancelled: ${reason}`))
  }

  lose(): void {
    this.#stop({ type: 'lost' }, new LockLost())
  }

  giveBack(): void {
    this.#stop({ type: 'returned' }, new Error('the worker closes'))
  }

  #stop(end: End, reason: Error): void {
    if (this.#end !== undefined) return
    this.#end = end
    this.#abort.abort(reason)
  }
}
