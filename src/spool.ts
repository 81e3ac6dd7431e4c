/** Streams on their way in: a file without a name that grows, and is read meanwhile. */

import type { FileBytes } from './formats/sizes.js'
import type { NativeFile, NativeSpoolOptions } from './native.js'
import { native } from './native.js'
import type { Arriving, Part } from './source.js'
import { release } from './source.js'
import { type HeldJob, runHeld } from './support/jobs.js'
import { request, submit, toError } from './support/requests.js'

/** Bytes that tell a file's format. */
const HEAD = 1024

/** How far a spool is, in bytes. */
export interface SpoolProgress {
  readonly came: number
  /** Stored now. */
  readonly stored: number
  /** Stored at once, at most. */
  readonly peak: number
  /** Somebody waits for what has not come. */
  readonly wanted: boolean
}

/** A stream, as far as it came. */
export class Spool implements Arriving {
  readonly #held: HeldJob<number>
  readonly #length: number | undefined
  #came = 0
  #whole = false
  #waiting: { readonly until: number; wake(): void }[] = []

  private constructor(held: HeldJob<number>, length: number | undefined) {
    this.#held = held
    this.#length = length
  }

  /** One whose file lies in a folder. */
  static async open(folder: string, options: NativeSpoolOptions, signal: AbortSignal | undefined): Promise<Spool> {
    const held = await runHeld<number>(signal, (number, job, addon) => addon.openSpool(number, job, folder, options))
    return new Spool(held, options.length)
  }

  get #number(): number {
    return this.#held.value
  }

  /** Hands over what came next, a part of a chunk. */
  async feed(chunk: Uint8Array, offset: number, length: number): Promise<void> {
    try {
      await submit<void>(number => native.feedSpool(number, this.#number, chunk, offset, length), chunk)
    } catch (failure) {
      throw toError(failure)
    }
    this.#came += length
    this.#wake()
  }

  /** Nothing more comes, and that was all. */
  complete(): void {
    native.endSpool(this.#number)
    this.#whole = true
    this.#wake()
  }

  /** Whoever waits for what did not come gives up. */
  cancel(): void {
    this.#held.cancel()
    this.#whole = true
    this.#wake()
  }

  get progress(): SpoolProgress {
    const [came, stored, peak, wanted] = native.spoolProgress(this.#number)
    return { came, stored, peak, wanted: wanted > 0 || this.#waiting.length > 0 }
  }

  async open(part?: Part): Promise<NativeFile> {
    const head = Buffer.from(await this.bytes.at(part?.offset ?? 0, Math.min(HEAD, part?.length ?? HEAD)))
    const file = native.spooledFile(this.#number, part?.offset, part?.length)
    return { file, head, length: part?.length ?? this.#length ?? 0 }
  }

  /** Its bytes; who asks waits until they have come, and gets fewer behind the end. */
  get bytes(): FileBytes {
    return {
      length: this.#length,
      at: async (position, length) => {
        await this.#until(position + length)
        const buffer = Buffer.alloc(Math.max(0, Math.min(length, this.#came - position)))
        if (buffer.length === 0) return buffer
        await request<void>((number, addon) => addon.readSpool(number, this.#number, buffer, position))
        return buffer
      },
    }
  }

  /** It is not used any more. */
  async end(): Promise<void> {
    this.cancel()
    this.#held.end()
    await release(this.#number)
  }

  async #until(until: number): Promise<void> {
    if (this.#whole || this.#came >= until) return
    await new Promise<void>(resolve => {
      this.#waiting.push({ until, wake: resolve })
    })
  }

  #wake(): void {
    const done = this.#waiting.filter(({ until }) => this.#whole || this.#came >= until)
    this.#waiting = this.#waiting.filter(each => !done.includes(each))
    for (const { wake } of done) wake()
  }
}
