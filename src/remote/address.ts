/** Addresses on the web, as callers give them, and as messages show them: without what may be secret. */

import { invalidArgument, Qcow2Error } from '../errors.js'
import { describe } from '../units.js'

/** Where a request goes. */
export interface Address {
  /** Without user, password and fragment. */
  readonly url: URL
  /** The user and password that were in it, as a header says them. */
  readonly authorization: string | undefined
}

const WEB: ReadonlySet<string> = new Set(['http:', 'https:'])

/** What a message shows of an address: a query can be a signature, and a user has a password. */
export const shownAddress = ({ origin, pathname, search }: URL): string =>
  `${origin}${pathname}${search === '' ? '' : '?…'}`

/** A text in which addresses are as {@link shownAddress} has them. */
export const withoutCredentials = (text: string): string =>
  text.replace(/https?:\/\/[^\s']+/gi, found => {
    const url = parse(found)
    return url === undefined ? found : shownAddress(url)
  })

/** Reads the address that the caller of `owner` gave. No message has what is wrong: it may be a password. */
export function toAddress(given: unknown, owner: string): Address {
  if (typeof given !== 'string' && !(given instanceof URL)) {
    throw invalidArgument('url', `${owner}: url must be a string or URL, not ${describe(given)}`)
  }
  const url = parse(String(given))
  if (url === undefined) throw invalidArgument('url', `${owner}: url is none: it begins with https:// and names a host`)
  if (!WEB.has(url.protocol)) {
    const message = `${owner}: url must be one of http: or https:, not of ${url.protocol}`
    throw new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', message, { field: 'url' })
  }
  return withoutUser(url)
}

function withoutUser(url: URL): Address {
  const { username, password } = url
  url.username = ''
  url.password = ''
  url.hash = ''
  if (username === '' && password === '') return { url, authorization: undefined }
  const pair = `${decode(username)}:${decode(password)}`
  return { url, authorization: `Basic ${Buffer.from(pair).toString('base64')}` }
}

/** The text that percent signs stand for; as it is, where they stand for none. */
function decode(text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    return text
  }
}

/** `URL.parse`, which older versions of Node do not have. */
function parse(text: string, base?: URL): URL | undefined {
  try {
    return new URL(text, base)
  } catch {
    return undefined
  }
}

/** Where a redirect leads, or why it is not followed. */
export function redirected(from: URL, location: string | null): URL | { readonly refused: string } {
  if (location === null) return { refused: 'a redirect that says not where to' }
  const to = parse(location, from)
  if (to === undefined || !WEB.has(to.protocol)) return { refused: 'a redirect to what is no address on the web' }
  if (from.protocol === 'https:' && to.protocol === 'http:') {
    return { refused: `a redirect from https to ${shownAddress(to)}, which anybody on the way can change` }
  }
  return withoutUser(to).url
}
