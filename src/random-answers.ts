/** The answers of a caller's object to what the addon asks of it, and the file that it is to the addon meanwhile. */

import { AbortError, Qcow2Error } from './errors.js'
import { type NativeFile, type NativeSourceQuestion, native } from './native.js'
import { throwIfAborted } from './options.js'
import type { RandomPlace, SourceExtent } from './random-access.js'
import type { Held } from './support/jobs.js'
import { isAborted, request } from './support/requests.js'
import { onAbort } from './support/signals.js'
import { dropThrown, keepThrown } from './support/thrown.js'
import { userText } from './text.js'
import { describe } from './units.js'

/** Failures of one source that are remembered as causes, at most: an error that is looked at was one of the last. */
const MAX_THROWN = 64

/** Opens a source as a file of the addon's. The signal ends it until it is detached. */
export async function openRandom(
  place: RandomPlace,
  writable: boolean,
  signal: AbortSignal | undefined,
): Promise<Held<NativeFile>> {
  throwIfAborted(signal)
  const { object, size, name, identity, cache } = place
  if (writable && object.write === undefined) {
    const message = `${name}: the source has no write: it can be read only`
    throw new Qcow2Error('ERR_QCOW2_READ_ONLY', message, { path: name })
  }
  const answering = new Answering(place)
  const detach = onAbort(signal, () => answering.cancel())
  try {
    const value = await request<NativeFile>((number, addon) =>
      addon.openSource(number, answering.number, {
        name: userText(name),
        identity,
        size,
        writable,
        resizes: writable && object.truncate !== undefined,
        syncs: object.sync !== undefined,
        tells: object.extents !== undefined,
        cache: cache || undefined,
      }),
    )
    return { value, detach, end: detach, closing: () => answering.closing(), ended: answering.ended }
  } catch (error) {
    detach()
    answering.cancel()
    // Its close is called; what becomes of that is not why it could not be opened.
    await answering.ended.catch(() => undefined)
    if (signal?.aborted && isAborted(error)) throw new AbortError(signal.reason)
    throw error
  }
}

/** Answers until nothing more is asked. */
class Answering {
  /** The addon's number of where questions come. */
  readonly number: number
  /** Resolves when the source was closed; rejects with what its `close` threw. */
  readonly ended: Promise<void>
  readonly #place: RandomPlace
  readonly #asked = new Map<number, AbortController>()
  readonly #thrown: number[] = []

  constructor(place: RandomPlace) {
    this.#place = place
    this.number = native.startSource(place.concurrency)
    this.ended = this.#run()
    // Whoever waits for it hears of it.
    this.ended.catch(() => undefined)
  }

  /** Nobody waits for an answer any more. */
  cancel(): void {
    this.#tell(() => native.cancelSource(this.number))
  }

  /** Who waits for an answer waits no longer than a while. */
  closing(): void {
    this.#tell(() => native.closeSource(this.number))
  }

  async #run(): Promise<void> {
    await this.#take()
    for (const asked of this.#asked.values()) asked.abort(new AbortError(undefined))
    for (const number of this.#thrown) dropThrown(number)
    await request<void>((id, addon) => addon.release(id, this.number)).catch(() => undefined)
    const { object, name } = this.#place
    try {
      await object.close?.()
    } catch (cause) {
      throw new Qcow2Error('ERR_QCOW2_IO', `${name}: close failed: ${messageOf(cause)}`, {
        path: name,
        syscall: 'close',
        cause,
      })
    }
  }

  async #take(): Promise<void> {
    for (;;) {
      const coming = request<NativeSourceQuestion[] | undefined>((id, addon) => addon.nextQuestions(id, this.number))
      // Whoever waits for an answer keeps the process alive.
      native.referenceRequest(false)
      const questions = await coming.catch(() => undefined)
      native.referenceRequest(true)
      if (questions === undefined) return
      for (const question of questions) {
        if (question.operation === 'forget') this.#asked.get(question.id)?.abort(new AbortError(undefined))
        else void this.#answer(question)
      }
    }
  }

  async #answer(question: NativeSourceQuestion): Promise<void> {
    const { id } = question
    const asked = new AbortController()
    this.#asked.set(id, asked)
    try {
      const give = await this.#ask(question, asked.signal)
      this.#tell(give)
    } catch (error) {
      this.#fail(id, error)
    } finally {
      if (this.#asked.get(id) === asked) this.#asked.delete(id)
    }
  }

  /** Asks the object; what is returned gives its answer to the addon. */
  async #ask(question: NativeSourceQuestion, signal: AbortSignal): Promise<() => void> {
    const { id, operation, position, length } = question
    const { object } = this.#place
    const done = (): void => native.answerDone(this.number, id)
    switch (operation) {
      case 'read': {
        // Zeroes, so that a source that fills less than it says gives away nothing of this process.
        const buffer = Buffer.alloc(length)
        checkCount('read', await object.read(buffer, position, signal), length, position)
        return () => native.answerBytes(this.number, id, buffer)
      }
      case 'write': {
        const { data = Buffer.alloc(0) } = question
        checkCount('write', await object.write?.(data, position, signal), length, position)
        return done
      }
      case 'sync':
        await object.sync?.(signal)
        return done
      case 'truncate':
        await object.truncate?.(position, signal)
        return done
      default: {
        const runs = toRuns(await object.extents?.(position, length, signal), position)
        return () => native.answerExtents(this.number, id, runs)
      }
    }
  }

  #fail(id: number, error: unknown): void {
    const number = keepThrown(error)
    this.#thrown.push(number)
    const code = typeof error === 'object' && error !== null && 'code' in error ? error.code : undefined
    const transient = error instanceof Qcow2Error && error.transient === true
    this.#tell(() =>
      native.answerFailed(this.number, id, {
        message: userText(messageOf(error)),
        code: typeof code === 'string' ? code : undefined,
        number,
        transient,
      }),
    )
    if (this.#thrown.length > MAX_THROWN) dropThrown(this.#thrown.shift() ?? 0)
  }

  /** What is over for the addon, as when the environment ends, is nobody's failure. */
  #tell(tell: () => void): void {
    try {
      tell()
    } catch {}
  }
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error))

function checkCount(what: 'read' | 'write', count: unknown, length: number, position: number): void {
  if (count === length) return
  const short = typeof count === 'number' && Number.isInteger(count) && count >= 0 && count < length
  const returned = short ? `${count} of ${length} bytes` : `${describe(count)} for ${length} bytes`
  const rule = 'it must return the length of its buffer, all of which it has dealt with'
  throw new Error(`the source's ${what} at ${position} returned ${returned}: ${rule}`)
}

/** Where each run ends, and whether it is zero. */
function toRuns(extents: unknown, position: number): Float64Array {
  if (!Array.isArray(extents) || extents.length === 0) {
    throw new Error(
      `the source's extents at ${position} returned ${describe(extents)}: it must tell of one run at least`,
    )
  }
  const runs = new Float64Array(2 * extents.length)
  let end = position
  for (const [index, run] of (extents as readonly Partial<SourceExtent>[]).entries()) {
    const { position: start, length, zero } = run ?? {}
    if (start !== end || !Number.isSafeInteger(length) || length === undefined || length <= 0) {
      const found = `a run of ${describe(length)} bytes at ${describe(start)}`
      throw new Error(`the source's extents at ${position} returned ${found}: the next one must begin at ${end}`)
    }
    end += length
    runs.set([end, zero === true ? 1 : 0], 2 * index)
  }
  return runs
}
