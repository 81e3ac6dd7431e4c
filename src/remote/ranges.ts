/** Ranges of one file on a web server: what is asked, and what must hold of the answer. */

import { Qcow2Error } from '../errors.js'
import { readBody, wrongAnswer } from './body.js'
import {
  difference,
  isStrong,
  readContentRange,
  readLength,
  readRetryAfter,
  readUnsatisfied,
  type Version,
  wrongPart,
} from './content-range.js'
import { badConnection, badStatus, changed, failed, silent } from './failures.js'
import { FIRST } from './ranged-source.js'
import { discard, type RequestHeaders, type Requests } from './requests.js'
import { Attempt, Passing, type Patience, retrying } from './retry.js'

/** Requests of ranges of one file. */
export class Ranges {
  readonly #requests: Requests
  readonly #patience: Patience

  constructor(requests: Requests, patience: Patience) {
    this.#requests = requests
    this.#patience = patience
  }

  get name(): string {
    return this.#requests.name
  }

  /** Asks for the beginning, and so for all else that is to be known. */
  async begin(
    signal: AbortSignal | undefined,
  ): Promise<{ readonly version: Version; readonly first: Uint8Array<ArrayBuffer> }> {
    let version: Version | undefined
    let first = new Uint8Array(0)
    await retrying(this.#patience, signal, () =>
      this.#attempt(signal, false, async (attempt, own) => {
        const response = await this.#requests.get(rangeHeader(0, FIRST - 1), own, attempt)
        version = this.#readVersion(response)
        // Of a file that has nothing there is no range.
        if (version.size === 0) return discard(response)
        first = new Uint8Array(Math.min(FIRST, version.size))
        this.#checkBody(response, first.length)
        await readBody(response.body ?? [], { buffer: first, start: 0, attempt, place: this.#requests.place })
      }),
    )
    if (version === undefined) throw new Qcow2Error('ERR_QCOW2_INTERNAL', 'a request ended without an answer')
    return { version, first }
  }

  /** Fills the buffer with the bytes from `position` on, of that version. */
  async fill(buffer: Uint8Array, position: number, version: Version, signal: AbortSignal | undefined): Promise<void> {
    let filled = 0
    const attempt = (): Promise<void> =>
      this.#attempt(signal, true, async (attempt, own) => {
        const [first, last] = [position + filled, position + buffer.length - 1]
        const headers = { ...rangeHeader(first, last), ...conditions(version) }
        const response = await this.#requests.get(headers, own, attempt)
        this.#checkPart(response, first, last, version)
        this.#checkBody(response, buffer.length - filled)
        const came = (count: number): void => {
          filled += count
        }
        await readBody(response.body ?? [], { buffer, start: filled, attempt, place: this.#requests.place, came })
      })
    await retrying(this.#patience, signal, attempt, () => filled)
  }

  /** One try, and what its failure means. */
  async #attempt(
    signal: AbortSignal | undefined,
    known: boolean,
    work: (attempt: Attempt, own: RequestHeaders) => Promise<void>,
  ): Promise<void> {
    const own = await this.#requests.headers(signal)
    const attempt = new Attempt(this.#patience.silence, signal)
    try {
      await work(attempt, own)
    } catch (error) {
      if (attempt.silent) throw silent(this.#patience.silence, this.#requests.place)
      if (error instanceof Qcow2Error || error instanceof Passing || signal?.aborted) throw error
      throw badConnection(error, this.#requests.place, known)
    } finally {
      attempt.end()
    }
  }

  #readVersion(response: Response): Version {
    const { status, headers } = response
    const { place } = this.#requests
    const rest = { etag: headers.get('etag') ?? undefined, modified: headers.get('last-modified') ?? undefined }
    if (status === 416 && readUnsatisfied(headers.get('content-range')) === 0) return { size: 0, ...rest }
    if (status === 200 && readLength(headers.get('content-length')) === 0) return { size: 0, ...rest }
    if (status === 200) throw noRanges(place)
    if (status !== 206) throw this.#badStatus(response)
    const range = readContentRange(headers.get('content-range'))
    const wrong = wrongPart({ first: 0, last: FIRST - 1 }, range, undefined)
    if (wrong !== undefined || range?.total === undefined) throw wrongAnswer(`${wrong}`, place)
    return { size: range.total, ...rest }
  }

  #checkPart(response: Response, first: number, last: number, version: Version): void {
    const { status, headers } = response
    const { place } = this.#requests
    if (status === 412) throw changed('the server has no such version any more', place)
    const range = readContentRange(headers.get('content-range'))
    const total = status === 416 ? readUnsatisfied(headers.get('content-range')) : range?.total
    const whole = status === 200 ? readLength(headers.get('content-length')) : total
    const now = {
      size: whole ?? version.size,
      etag: headers.get('etag') ?? undefined,
      modified: headers.get('last-modified') ?? undefined,
    }
    const how = status === 200 || status === 206 || status === 416 ? difference(version, now) : undefined
    if (how !== undefined) throw changed(how, place)
    if (status === 200) throw noRanges(place)
    if (status !== 206) throw this.#badStatus(response)
    const wrong = wrongPart({ first, last }, range, version.size)
    if (wrong !== undefined) throw wrongAnswer(wrong, place)
  }

  /** What must hold of a body before any of it is read. */
  #checkBody({ headers }: Response, length: number): void {
    const { place } = this.#requests
    const type = headers.get('content-type') ?? ''
    if (/^multipart\//i.test(type)) throw wrongAnswer('several parts, and was asked for one', place)
    const encoding = headers.get('content-encoding') ?? 'identity'
    if (!/^(?:identity)?$/i.test(encoding.trim())) {
      const message =
        'the server encodes the file (Content-Encoding), and was asked not to: no range of it is one of the disk'
      throw failed('ERR_QCOW2_UNSUPPORTED_FEATURE', message, place)
    }
    const said = readLength(headers.get('content-length'))
    if (said !== undefined && said !== length) throw wrongAnswer(`${said} bytes, where there must be ${length}`, place)
  }

  #badStatus({ status, headers }: Response): Error {
    return badStatus(status, this.#requests.place, { after: readRetryAfter(headers.get('retry-after')) })
  }
}

/** With a range, Node's fetch asks for no encoding. */
const rangeHeader = (first: number, last: number): RequestHeaders => ({ range: `bytes=${first}-${last}` })

/** What the server is to hold the range against: it sends nothing of another version then. */
function conditions({ etag, modified }: Version): RequestHeaders {
  if (isStrong(etag)) return { 'if-match': etag }
  return modified === undefined ? {} : { 'if-unmodified-since': modified }
}

function noRanges(place: Requests['place']): Qcow2Error {
  const message =
    'the server answers with the whole file, and not with the range that it was asked for: download it, or take its body in by ingest()'
  return failed('ERR_QCOW2_UNSUPPORTED_FEATURE', message, place)
}
