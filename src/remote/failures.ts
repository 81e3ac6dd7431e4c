/** What becomes of failures of requests: coded errors, which have no credentials in them, and whether they can pass. */

import { type ErrorPlace, Qcow2Error, type SystemErrorCode } from '../errors.js'
import { Passing } from './retry.js'

/** Where a request failed: the other side as messages name it, and what was asked of it. */
export interface RequestPlace {
  readonly name: string
  readonly call: string
}

const placeOf = ({ name, call }: RequestPlace): ErrorPlace => ({ path: name, syscall: call })

const sentence = (code: string, message: string, { name, call }: RequestPlace): string =>
  `${code.startsWith('ERR_') ? '' : `${code}: `}${message}, ${call} '${name}'`

/** A failure for good. */
export const failed = (code: Qcow2Error['code'], message: string, place: RequestPlace, cause?: unknown): Qcow2Error =>
  new Qcow2Error(code, sentence(code, message, place), { ...placeOf(place), cause })

/** A failure that can pass. */
export const passing = (
  code: Qcow2Error['code'],
  message: string,
  place: RequestPlace,
  more: { readonly cause?: unknown; readonly after?: number | undefined } = {},
): Passing => new Passing(code, sentence(code, message, place), { ...placeOf(place), cause: more.cause }, more.after)

/** What was being read has changed: no part of it fits those that came before. */
export const changed = (how: string, place: RequestPlace, cause?: unknown): Qcow2Error =>
  failed('ERR_QCOW2_SOURCE_CHANGED', `it changed while it was read: ${how}`, place, cause)

/** The other side said nothing for so long. */
export const silent = (milliseconds: number, place: RequestPlace): Passing =>
  passing('ETIMEDOUT', `the server said too little for ${milliseconds} ms`, place)

/** Statuses that can pass. */
const PASSING: ReadonlySet<number> = new Set([408, 425, 429, 500, 502, 503, 504])

const STATUS_CODES: Readonly<Record<number, SystemErrorCode>> = {
  401: 'EACCES',
  403: 'EACCES',
  404: 'ENOENT',
  407: 'EACCES',
  410: 'ENOENT',
}

/** A status that is no answer to what was asked. */
export function badStatus(
  status: number,
  place: RequestPlace,
  more: { readonly cause?: unknown; readonly after?: number | undefined; readonly words?: string } = {},
): Error {
  const message = more.words ?? `the server answered with status ${status}`
  if (PASSING.has(status)) return passing('ERR_QCOW2_IO', message, place, more)
  return failed(STATUS_CODES[status] ?? 'ERR_QCOW2_IO', message, place, more.cause)
}

/** Errors of connections that can pass, as Node and its fetch name them, and the system's name for each. */
const CONNECTION: Readonly<Record<string, SystemErrorCode>> = {
  ECONNABORTED: 'ECONNABORTED',
  ECONNREFUSED: 'ECONNREFUSED',
  ECONNRESET: 'ECONNRESET',
  EHOSTUNREACH: 'EHOSTUNREACH',
  ENETUNREACH: 'ENETUNREACH',
  EPIPE: 'EPIPE',
  ETIMEDOUT: 'ETIMEDOUT',
  EAI_AGAIN: 'EAI_AGAIN',
  UND_ERR_SOCKET: 'ECONNRESET',
  UND_ERR_RES_CONTENT_LENGTH_MISMATCH: 'ECONNRESET',
  UND_ERR_CONNECT_TIMEOUT: 'ETIMEDOUT',
  UND_ERR_HEADERS_TIMEOUT: 'ETIMEDOUT',
  UND_ERR_BODY_TIMEOUT: 'ETIMEDOUT',
}

/** Where nothing has ever come from there, these are rather a wrong address. */
const WRONG_ADDRESS: ReadonlySet<string> = new Set(['ECONNREFUSED', 'EHOSTUNREACH', 'ENETUNREACH'])

/** How deep causes are looked into. */
const CAUSES = 5

/** The code of an error, or of what caused it, and its words. */
function rootOf(error: unknown): { readonly code: string | undefined; readonly reason: string } {
  let reason = ''
  let at = error
  for (let depth = 0; depth < CAUSES && at instanceof Error; depth++) {
    reason = at.message
    if ('code' in at && typeof at.code === 'string' && at.code !== '') return { code: at.code, reason }
    at = at.cause
  }
  return { code: undefined, reason }
}

/** A connection that failed. `known`: there was an answer before, so that the address is right. */
export function badConnection(error: unknown, place: RequestPlace, known: boolean): Error {
  const { code, reason } = rootOf(error)
  const why = reason === '' ? 'the request failed' : reason
  const system = code === undefined ? undefined : CONNECTION[code]
  if (system !== undefined && (known || !WRONG_ADDRESS.has(system))) {
    return passing(system, why, place, { cause: error })
  }
  const named = code !== undefined && /^E[A-Z]+$/.test(code) ? (code as SystemErrorCode) : 'ERR_QCOW2_IO'
  return failed(named, why, place, error)
}
