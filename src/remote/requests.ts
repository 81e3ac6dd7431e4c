/** GET requests of one address: its redirects, and who may see which headers. */

import { invalidArgument } from '../errors.js'
import type { Reader } from '../options.js'
import { answer } from '../support/signals.js'
import { describe } from '../units.js'
import { type Address, redirected, shownAddress } from './address.js'
import { failed, type RequestPlace } from './failures.js'
import type { Attempt } from './retry.js'

/** Headers of requests, by their names. */
export type RequestHeaders = Readonly<Record<string, string>>

/** {@link RequestHeaders}, or what gives fresh ones for each request. */
export type HeadersOption = RequestHeaders | (() => RequestHeaders | Promise<RequestHeaders>)

/** What is `httpSource`'s own to say. */
const OWN: readonly string[] = [
  'range',
  'if-range',
  'if-match',
  'if-none-match',
  'if-modified-since',
  'if-unmodified-since',
  'accept-encoding',
]

/** Reads {@link HeadersOption}. No message has a value in it. */
export const requestHeaders: Reader<HeadersOption> = (value, name) =>
  typeof value === 'function' ? (value as HeadersOption) : toHeaders(value, name)

function toHeaders(value: unknown, name: string): RequestHeaders {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw invalidArgument(name, `${name} must be an object or a function that returns one, not ${describe(value)}`)
  }
  const headers = Object.entries(value)
  for (const [header, text] of headers) check(header, text, name)
  return Object.fromEntries(headers)
}

function check(header: string, text: unknown, name: string): void {
  if (typeof text !== 'string') throw invalidArgument(name, `${name}: '${header}' must be a string`)
  if (OWN.includes(header.toLowerCase())) throw invalidArgument(name, `${name}: '${header}' is set by httpSource`)
  try {
    new Headers([[header, text]])
  } catch {
    throw invalidArgument(name, `${name}: '${header}' cannot be a header, or its value is none`)
  }
}

const REDIRECTS: ReadonlySet<number> = new Set([301, 302, 303, 307, 308])

/** Answers of an address that a redirect gave, and that was good for some time only. */
const EXPIRED: ReadonlySet<number> = new Set([400, 401, 403, 404, 410])

/** What a source asks its server with. */
export interface RequestOptions {
  readonly headers: HeadersOption | undefined
  readonly maxRedirects: number
  readonly fetch: typeof fetch | undefined
}

/** GET requests of one address. */
export class Requests {
  readonly name: string
  readonly #address: Address
  readonly #options: RequestOptions
  /** Where redirects led: asked from then on, as long as that answers. */
  #current: URL

  constructor(address: Address, options: RequestOptions) {
    this.name = shownAddress(address.url)
    this.#address = address
    this.#options = options
    this.#current = address.url
  }

  get place(): RequestPlace {
    return { name: this.name, call: 'GET' }
  }

  /** The caller's headers. What the caller's function throws is thrown. */
  async headers(signal: AbortSignal | undefined): Promise<RequestHeaders> {
    const { headers } = this.#options
    const given =
      typeof headers === 'function' ? toHeaders(await answer(headers, signal), 'httpSource: headers') : headers
    const { authorization } = this.#address
    return { ...(authorization !== undefined && { authorization }), ...lowered(given ?? {}) }
  }

  /** An answer, whose body is not read yet. `own`: the caller's headers. */
  async get(headers: RequestHeaders, own: RequestHeaders, attempt: Attempt): Promise<Response> {
    const start = this.#current
    // Unless this answers.
    this.#current = this.#address.url
    const response = await this.#follow(start, headers, own, attempt)
    if (start === this.#address.url || !EXPIRED.has(response.status)) return response
    discard(response)
    return this.#follow(this.#address.url, headers, own, attempt)
  }

  async #follow(start: URL, headers: RequestHeaders, own: RequestHeaders, attempt: Attempt): Promise<Response> {
    const { maxRedirects, fetch = globalThis.fetch } = this.#options
    let url = start
    for (let left = maxRedirects; ; left--) {
      // What the caller says is for the server that the caller named.
      const all = url.origin === this.#address.url.origin ? { ...own, ...headers } : headers
      const response = await fetch(url, { headers: all, redirect: 'manual', signal: attempt.signal })
      if (!REDIRECTS.has(response.status)) {
        if (response.status === 206) this.#current = url
        return response
      }
      attempt.answered()
      discard(response)
      if (left === 0) throw failed('ERR_QCOW2_IO', `more than ${maxRedirects} redirects: maxRedirects`, this.place)
      const to = redirected(url, response.headers.get('location'))
      if ('refused' in to) throw failed('ERR_QCOW2_IO', to.refused, this.place)
      url = to
    }
  }
}

const lowered = (headers: RequestHeaders): RequestHeaders =>
  Object.fromEntries(Object.entries(headers).map(([name, value]) => [name.toLowerCase(), value]))

/** Gives a body up that nobody wants. */
export function discard({ body }: Response): void {
  body?.cancel().catch(() => {})
}
