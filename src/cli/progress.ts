/**
 * How far a job is: a bar on a terminal, qemu-img's own line elsewhere when asked for, by `-p` or by a signal, nothing of itself with
 * `-q`.
 */

import type { Options, SingleBar } from 'cli-progress'
import type { LongRunning, Progress } from '../index.js'
import { fixed, humanSize } from './format/number.js'
import type { Session } from './session.js'
import { endStrayDebugger, whenAsked } from './status-signals.js'

/** A job that takes longer can afford to load what it may need. */
const LONG_MS = 100

export interface ProgressChoice<T = unknown> {
  /** `-p`. */
  readonly progress: boolean
  /** `-q`. */
  readonly quiet: boolean
  /** What is being done, for the bar: "Converting". */
  readonly verb: string
  /** Percent between two lines without a terminal, as qemu-img has it for the command. */
  readonly step: number
  /**
   * Whether a job with this result went to its end: it says so once, where qemu-img's command does. Without it every job that succeeds says once
   * more that it is done, as most commands do.
   */
  readonly whole?: (result: T) => boolean
}

interface Reporter {
  update(progress: Progress): void
  /** Somebody asks: see `status-signals.ts`. */
  answer(): void
  /** `done` says whether the job succeeded, `whole` what is known of how far it went. */
  finish(done: boolean, whole?: boolean): void
}

/** Runs a job with what it needs to report how far it is, and to be cancelled. */
export async function withProgress<T>(
  session: Session,
  choice: ProgressChoice<T>,
  job: (options: Pick<LongRunning, 'onProgress' | 'progressInterval' | 'signal'>) => Promise<T>,
): Promise<T> {
  const reporter = reporterFor(session, choice)
  const asked = whenAsked(() => reporter.answer())
  const stray = setTimeout(endStrayDebugger, LONG_MS).unref()
  let done = false
  let whole: boolean | undefined
  try {
    const result = await job({
      signal: session.signal,
      progressInterval: 100,
      onProgress: progress => reporter.update(progress),
    })
    done = true
    whole = choice.whole?.(result)
    return result
  } finally {
    clearTimeout(stray)
    asked()
    reporter.finish(done, whole)
  }
}

function reporterFor<T>(session: Session, choice: ProgressChoice<T>): Reporter {
  const { progress, quiet, verb } = choice
  if (quiet) return new Silent(session)
  const terminal = session.stderr.isTerminal && session.env['TERM'] !== 'dumb'
  // `-p` with the output going elsewhere is a program that reads qemu-img's lines.
  const lines = progress && !(terminal && session.stdout.isTerminal)
  if (lines) return new Lines(session, choice)
  return terminal ? new Bar(session, verb) : new Silent(session)
}

const percentOf = (current: number, total: number): number => (total === 0 ? 0 : Math.min(100, (current * 100) / total))

const line = (percent: number): string => `    (${fixed(percent, 2)}/100%)`

/** Says nothing unless it is asked, then where qemu-img says it. */
class Silent implements Reporter {
  readonly #session: Session
  #percent = 0

  constructor(session: Session) {
    this.#session = session
  }

  update({ current, total }: Progress): void {
    this.#percent = percentOf(current, total)
  }

  answer(): void {
    this.#session.stderr.write(`${line(this.#percent)}\n`)
    this.#session.stderr.flush()
  }

  finish(): void {}
}

/** `    (45.34/100%)` and a carriage return for each step: what programs that run qemu-img look for. */
class Lines implements Reporter {
  readonly #session: Session
  readonly #step: number
  readonly #judged: boolean
  #shown = 0
  #percent = 0

  constructor(session: Session, { step, whole }: Pick<ProgressChoice<never>, 'step' | 'whole'>) {
    this.#session = session
    this.#step = step
    this.#judged = whole !== undefined
    this.#print(0)
  }

  /** Prints where qemu-img would: more than a step further, at the end, and where the job turns out to be longer. */
  update({ current, total, steps }: Progress): void {
    for (const done of [...steps, current]) {
      this.#percent = percentOf(done, total)
      // Its result says whether that is so.
      if (this.#judged && this.#percent === 100) return
      const further = this.#percent - this.#shown
      if (further > this.#step || further < 0 || (further > 0 && this.#percent === 100)) this.#print(this.#percent)
    }
  }

  answer(): void {
    this.#print(this.#percent)
  }

  finish(done: boolean, whole = done): void {
    if (whole) this.#print(100)
    this.#session.stdout.write('\n')
    this.#session.stdout.flush()
  }

  #print(percent: number): void {
    this.#shown = percent
    this.#session.stdout.write(`${line(percent)}\r`)
    this.#session.stdout.flush()
  }
}

/** A job that ends sooner shows no bar at all. */
const PATIENCE_MS = 250

class Bar implements Reporter {
  readonly #session: Session
  readonly #verb: string
  readonly #started = Date.now()
  #bar: SingleBar | undefined
  #last: Progress = { phase: '', current: 0, total: 0, steps: [] }

  constructor(session: Session, verb: string) {
    this.#session = session
    this.#verb = verb
  }

  update(progress: Progress): void {
    this.#last = progress
    if (progress.total === 0 || Date.now() - this.#started < PATIENCE_MS) return
    if (!this.#bar) {
      // Loaded when there is a bar to draw: a command that is done sooner starts sooner.
      const { SingleBar, Format } = require('cli-progress') as typeof import('cli-progress')
      // While nothing moves there is no time to tell, and what the library has for it then is a word.
      const formatTime: Options['formatTime'] = (seconds, options, step) =>
        Number.isFinite(Number(seconds)) ? Format.TimeFormat(seconds, options, step) : '?'
      this.#bar = new SingleBar({ ...this.#options(), formatTime })
      this.#bar.start(progress.total, progress.current, this.#payload())
      return
    }
    this.#bar.setTotal(progress.total)
    this.#bar.update(progress.current, this.#payload())
  }

  /** The bar is there already. */
  answer(): void {}

  finish(done: boolean): void {
    if (!this.#bar) return
    if (done) {
      this.#last = { ...this.#last, current: this.#last.total }
      this.#bar.update(this.#last.total, this.#payload())
    }
    this.#bar.stop()
  }

  #payload(): { done: string; whole: string; speed: string } {
    const { current, total } = this.#last
    const seconds = Math.max((Date.now() - this.#started) / 1000, 0.001)
    return { done: humanSize(current), whole: humanSize(total), speed: `${humanSize(current / seconds)}/s` }
  }

  #options(): Options {
    const columns = this.#session.stderr.stream.columns ?? 80
    return {
      stream: this.#session.stderr.stream,
      format: `${this.#verb} {bar} {percentage}%  {done} of {whole}  {speed}  ETA {eta_formatted}`,
      barsize: Math.max(10, Math.min(40, columns - this.#verb.length - 58)),
      barCompleteChar: '━',
      barIncompleteChar: '╌',
      hideCursor: true,
      // Signals are this program's: it aborts the job, and the bar is stopped with it.
      gracefulExit: false,
      etaBuffer: 50,
      fps: 10,
    }
  }
}
