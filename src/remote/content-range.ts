/** What servers say of ranges and versions, in headers of RFC 9110. It is the other side's text: nothing of it is believed unread. */

/** Bytes of a whole, the last one included. */
export interface ContentRange {
  readonly first: number
  readonly last: number
  /** Bytes of the whole; undefined where the server does not tell. */
  readonly total: number | undefined
}

const RANGE = /^bytes +(\d{1,19})-(\d{1,19})\/(\d{1,19}|\*)$/i
const UNSATISFIED = /^bytes +\*\/(\d{1,19})$/i

/** Reads `Content-Range` of a part; undefined for what is none. */
export function readContentRange(text: string | null | undefined): ContentRange | undefined {
  const found = RANGE.exec(text?.trim() ?? '')
  if (found === null) return undefined
  const [first, last, total] = found.slice(1).map(Number)
  if (first === undefined || last === undefined || last < first) return undefined
  return { first, last, total: found[3] === '*' ? undefined : total }
}

/** Reads `Content-Range` of an answer 416: the bytes of the whole. */
export function readUnsatisfied(text: string | null | undefined): number | undefined {
  const found = UNSATISFIED.exec(text?.trim() ?? '')
  return found === null ? undefined : Number(found[1])
}

/** Reads `Content-Length`. */
export const readLength = (text: string | null | undefined): number | undefined =>
  text !== undefined && text !== null && /^\d{1,19}$/.test(text.trim()) ? Number(text) : undefined

/** Reads `Retry-After`, a number of seconds or a date: milliseconds from now on. */
export function readRetryAfter(text: string | null | undefined, now = Date.now()): number | undefined {
  const trimmed = text?.trim() ?? ''
  if (/^\d+$/.test(trimmed)) return Number(trimmed) * 1000
  const date = Date.parse(trimmed)
  return Number.isNaN(date) ? undefined : Math.max(0, date - now)
}

/** By what a server tells versions apart. */
export interface Version {
  /** Of the whole, in bytes. */
  readonly size: number
  readonly etag: string | undefined
  readonly modified: string | undefined
}

/** Whether an entity tag is strong: equal ones are equal bytes. */
export const isStrong = (etag: string | undefined): etag is string => etag?.startsWith('"') ?? false

/** What differs between two versions, as a message says it; undefined where nothing shows that they do. */
export function difference(before: Version, now: Version): string | undefined {
  if (now.size !== before.size) return `it has ${now.size} bytes now, and had ${before.size}`
  if (before.etag !== undefined && now.etag !== undefined) {
    return now.etag === before.etag ? undefined : 'it has another ETag now'
  }
  const known = before.modified !== undefined && now.modified !== undefined
  return known && now.modified !== before.modified ? 'it has another Last-Modified now' : undefined
}

/**
 * Holds what came for a range against what was asked for. `whole`: bytes of the whole, where that is known. The reason why it is not taken,
 * undefined for what is right.
 */
export function wrongPart(
  asked: { readonly first: number; readonly last: number },
  range: ContentRange | undefined,
  whole: number | undefined,
): string | undefined {
  if (range === undefined) return 'a part without a Content-Range that says which one'
  const { first, last, total } = range
  if (total === undefined) return 'a part of a whole whose size it does not tell'
  if (!Number.isSafeInteger(total)) return `a part of a whole of ${total} bytes, beyond 2^53 - 1`
  if (last >= total) return `bytes ${first}-${last} of a whole that has only ${total}`
  const end = Math.min(asked.last, (whole ?? total) - 1)
  if (first !== asked.first || last !== end) return `bytes ${first}-${last}, and was asked for ${asked.first}-${end}`
  return undefined
}
