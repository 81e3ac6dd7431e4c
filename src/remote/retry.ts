/** Requests to other machines: how long one may be silent, what is tried again, and how often. */

// Not the global ones, which test runners replace by fakes that never fire by themselves.
import { clearTimeout, setTimeout } from 'node:timers'
import { AbortError, type ErrorPlace, Qcow2Error } from '../errors.js'
import { integer, throwIfAborted } from '../options.js'
import { onAbort } from '../support/signals.js'

/** How long another machine may take, and how often it is asked. Options of `httpSource`, `s3Source` and `s3Target`. */
export interface RemoteTimes {
  /**
   * Milliseconds in which something must come of an answer, up to 300,000: 16 KiB, or all of it. Then the request is made again. Default 30
   * seconds.
   */
  silenceTimeout?: number | undefined
  /**
   * How often a request is made again after a failure that can pass: a lost connection, silence, a body that is cut short, and the statuses 408,
   * 425, 429, 500, 502, 503 and 504. What came is not asked for again, and 64 KiB of it begin the count anew. Default 5.
   */
  retries?: number | undefined
  /**
   * Milliseconds before the first of them, twice as long before each that follows, 10 seconds at most, and each time a random part of that less. A
   * server that says `Retry-After` has its way, if that is no more than a minute. Default 250.
   */
  retryDelay?: number | undefined
}

/** {@link RemoteTimes}, with its defaults. */
export interface Patience {
  readonly silence: number
  readonly retries: number
  readonly delay: number
}

/** The table entries of {@link RemoteTimes}. Node's own fetch waits five minutes at most. */
export const REMOTE_TIMES = {
  silenceTimeout: integer(1, 300_000),
  retries: integer(0, 100),
  retryDelay: integer(0, 60_000),
} as const

const SILENCE = 30_000
const RETRIES = 5
const DELAY = 250

/** Milliseconds between two tries, at most, and as a server may ask for. */
const MOST_DELAY = 10_000
const MOST_ASKED = 60_000

/** Bytes that must come in each silence: a server that drips is as bad as one that says nothing. */
const DRIP = 16 * 1024

/** Bytes after which a connection that fails was a good one. */
const GOOD = 64 * 1024

export const toPatience = ({ silenceTimeout, retries, retryDelay }: RemoteTimes): Patience => ({
  silence: silenceTimeout ?? SILENCE,
  retries: retries ?? RETRIES,
  delay: retryDelay ?? DELAY,
})

/** A failure that can pass. `after`: milliseconds that the server wants to be left alone. */
export class Passing extends Error {
  readonly #code: Qcow2Error['code']
  readonly #place: ErrorPlace
  readonly after: number | undefined

  constructor(code: Qcow2Error['code'], message: string, place: ErrorPlace, after?: number) {
    super(message)
    this.#code = code
    this.#place = place
    this.after = after
  }

  /** What its caller gets when it did not pass. */
  last(tries: number): Qcow2Error {
    const often = tries > 1 ? `, tried ${tries} times` : ''
    return new Qcow2Error(this.#code, `${this.message}${often}`, { ...this.#place, transient: true })
  }
}

/** Makes a request until it succeeds, or fails for good. `reached`: how many bytes have come of it, by all tries. */
export async function retrying<T>(
  { retries, delay }: Patience,
  signal: AbortSignal | undefined,
  attempt: () => Promise<T>,
  reached: () => number = () => 0,
): Promise<T> {
  let tries = 0
  let failures = 0
  let mark = reached()
  for (;;) {
    throwIfAborted(signal)
    tries += 1
    try {
      return await attempt()
    } catch (error) {
      throwIfAborted(signal)
      if (!(error instanceof Passing)) throw error
      if (reached() - mark >= GOOD) failures = 0
      mark = reached()
      failures += 1
      const asked = error.after ?? 0
      if (failures > retries || asked > MOST_ASKED) throw error.last(tries)
      await pause(Math.max(asked, Math.min(delay * 2 ** (failures - 1), MOST_DELAY) * Math.random()), signal)
    }
  }
}

/** Waits, or rejects as the signal says. */
function pause(milliseconds: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    let forget = (): void => {}
    const timer = setTimeout(() => {
      forget()
      resolve()
    }, milliseconds)
    forget = onAbort(signal, () => {
      clearTimeout(timer)
      reject(new AbortError(signal?.reason))
    })
  })
}

/** One try: it ends when the caller's signal is aborted, and when the other side is silent. */
export class Attempt {
  /** Aborted when it ends. */
  readonly signal: AbortSignal
  /** Whether it was silence that ended it. */
  silent = false
  readonly #controller = new AbortController()
  #forget: () => void = () => {}
  readonly #silence: number
  #timer: NodeJS.Timeout
  #heard = 0

  constructor(silence: number, signal: AbortSignal | undefined) {
    this.signal = this.#controller.signal
    this.#silence = silence
    this.#timer = this.#listen()
    this.#forget = onAbort(signal, () => this.end())
  }

  /** Bytes have come. */
  heard(bytes: number): void {
    this.#heard += bytes
    if (this.#heard < DRIP) return
    this.answered()
  }

  /** The other side has answered: it may be silent again. */
  answered(): void {
    this.#heard = 0
    if (!this.signal.aborted) this.#timer.refresh()
  }

  end(): void {
    this.#forget()
    clearTimeout(this.#timer)
    this.#controller.abort()
  }

  #listen(): NodeJS.Timeout {
    return setTimeout(() => {
      this.silent = true
      this.end()
    }, this.#silence)
  }
}
