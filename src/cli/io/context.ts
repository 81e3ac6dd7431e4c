/** What commands share: the image that is open, what is under way on it, and where lines go. */

import { Qcow2Error } from '../../index.js'
import { describeError, strerror } from '../errors.js'
import { corruptionLine, spoken } from '../qemu-words.js'
import type { Session } from '../session.js'
import type { OpenDisk } from './disk.js'
import { LineFailure } from './line.js'
import { type Done, hexDump, report } from './report.js'

/** The words of the C library for what is no error of the system. */
const WORDS: Readonly<Record<string, string>> = {
  ERR_QCOW2_CORRUPT: 'EIO',
  ERR_QCOW2_BAD_SECRET: 'EIO',
  ERR_QCOW2_IO: 'EIO',
  ERR_QCOW2_INVALID_ARGUMENT: 'EINVAL',
  ERR_QCOW2_UNSUPPORTED_FEATURE: 'ENOTSUP',
  ERR_QCOW2_LIMIT: 'EFBIG',
  ERR_QCOW2_READ_ONLY: 'EPERM',
}

/** What a failed request is said to have met. */
function errno(error: unknown): string {
  const code = error instanceof Error && 'code' in error ? String(error.code) : ''
  return strerror(WORDS[code] ?? code) ?? 'Input/output error'
}

export class Context {
  readonly session: Session
  disk: OpenDisk | undefined
  /** No more commands are read. */
  ended = false
  readonly #underWay = new Set<Promise<void>>()

  constructor(session: Session) {
    this.session = session
  }

  out(text: string): void {
    this.session.stdout.write(text)
  }

  /** A line on stderr, behind all that was printed before. */
  async complain(line: string): Promise<void> {
    await this.session.stdout.written()
    this.session.stderr.write(`${line}\n`)
    this.session.stderr.flush()
  }

  /** As {@link complain}, in the name of the program. */
  readonly complainAs = (message: string): Promise<void> =>
    this.complain(`${this.session.program}: ${spoken(message, this.session.program)}`)

  /**
   * A failed request: in the C library's words on stdout, and on stderr what it was under our own name, that the image is marked corrupt
   * under QEMU's.
   */
  async fail(what: string, error: unknown): Promise<void> {
    const named = this.session.program.startsWith('qemu-')
    const own = error instanceof Qcow2Error && error.code.startsWith('ERR_')
    const corruption = own && named ? corruptionLine(describeError(error)) : undefined
    if (corruption !== undefined) await this.complain(corruption)
    this.out(`${what}: ${errno(error)}\n`)
    if (own && !named) await this.complainAs(describeError(error))
  }

  /** Runs a request; what comes of it is said as soon as it is done. Resolves to whether it was. */
  async request(failing: string, work: () => Promise<void>): Promise<boolean> {
    try {
      await work()
      return true
    } catch (error) {
      if (error instanceof LineFailure || this.session.signal.aborted) throw error
      await this.fail(failing, error)
      return false
    }
  }

  /** Lets a request go on while other commands run. */
  start(work: Promise<unknown>): void {
    const ended = work.then(
      () => undefined,
      () => undefined,
    )
    this.#underWay.add(ended)
    void ended.then(() => this.#underWay.delete(ended))
  }

  /** Waits for all that is under way. */
  async settled(): Promise<void> {
    while (this.#underWay.size > 0) await Promise.all(this.#underWay)
  }

  done(done: Done): void {
    this.out(report(done))
  }

  async dump(bytes: Uint8Array, offset: bigint): Promise<void> {
    for (const row of hexDump(bytes, offset)) {
      this.out(row)
      await this.session.stdout.drained()
    }
  }
}

/** Seconds since a moment before. */
export function clock(): () => number {
  const began = process.hrtime.bigint()
  return () => Number(process.hrtime.bigint() - began) / 1e9
}
