/** QAPI documents as qemu-img prints them: its order of fields, four spaces, every character beyond ASCII escaped. */

import { encodeText } from '../../text.js'

export type Json = string | number | bigint | boolean | readonly Json[] | { readonly [key: string]: Json | undefined }

/**
 * The order in which qemu-img writes fields, which is the order of its hash table and the same in every run. One list
 * serves all documents: within each of them it gives QEMU's order.
 */
const FIELD_ORDER = [
  'write-zeroes-alignment',
  'request-alignment',
  'min-mem-alignment',
  'max-hw-transfer',
  'discard-alignment',
  'opt-mem-alignment',
  'max-iov',
  'max-hw-iov',
  'limits',
  'ivgen-alg',
  'compat',
  'icount',
  'flags',
  'vm-clock-nsec',
  'detached-header',
  'image-end-offset',
  'name',
  'active',
  'compressed-clusters',
  'hash-alg',
  'backing-image',
  'iters',
  'compression-type',
  'compressed',
  'lazy-refcounts',
  'date-sec',
  'bitmaps',
  'cipher-alg',
  'refcount-bits',
  'uuid',
  'total-clusters',
  'extent-size-hint',
  'corruptions',
  'data-file',
  'ivgen-hash-alg',
  'corruptions-fixed',
  'check-errors',
  'children',
  'backing-filename-format',
  'date-nsec',
  'granularity',
  'required',
  'leaks',
  'snapshots',
  'key-offset',
  'leaks-fixed',
  'allocated-clusters',
  'virtual-size',
  'filename',
  'cluster-size',
  'fully-allocated',
  'format',
  'encrypt',
  'actual-size',
  'format-specific',
  'data-file-raw',
  'full-backing-filename',
  'cipher-mode',
  'stripes',
  'slots',
  'vm-clock-sec',
  'payload-offset',
  'encrypted',
  'type',
  'master-key-iters',
  'backing-filename',
  'corrupt',
  'fragmented-clusters',
  'id',
  'vm-state-size',
  'info',
  'dirty-flag',
  'extended-l2',
  'data',
] as const

const RANK: ReadonlyMap<string, number> = new Map(FIELD_ORDER.map((name, index) => [name, index]))

/** The set fields of an object, in QEMU's order; what QEMU does not know comes last. */
export function fields(object: { readonly [key: string]: Json | undefined }): [string, Json][] {
  const present = Object.entries(object).filter((entry): entry is [string, Json] => entry[1] !== undefined)
  const rank = (name: string): number => RANK.get(name) ?? FIELD_ORDER.length
  return present.sort(([a], [b]) => rank(a) - rank(b))
}

/** A document, without a final newline. */
export function toJson(value: Json, depth = 0): string {
  if (typeof value !== 'object') return typeof value === 'string' ? quote(value) : String(value)
  const open = '    '.repeat(depth + 1)
  const lines = isList(value)
    ? value.map(item => open + toJson(item, depth + 1))
    : fields(value).map(([name, item]) => `${open}${quote(name)}: ${toJson(item, depth + 1)}`)
  const [left, right] = isList(value) ? '[]' : '{}'
  return `${left}\n${lines.length > 0 ? `${lines.join(',\n')}\n` : ''}${'    '.repeat(depth)}${right}`
}

export const isList = (value: Json): value is readonly Json[] => Array.isArray(value)

const SHORT_ESCAPES: Readonly<Record<string, string>> = {
  '"': '\\"',
  '\\': '\\\\',
  '\b': '\\b',
  '\f': '\\f',
  '\n': '\\n',
  '\r': '\\r',
  '\t': '\\t',
}

const quote = (text: string): string => `"${toCodePoints(text).map(escapeCodePoint).join('')}"`

/** JSON writes what lies beyond the first plane as a pair. */
function escapeCodePoint(code: number): string {
  const text = String.fromCodePoint(code)
  if (code >= 0x20 && code < 0x7f && code !== 0x22 && code !== 0x5c) return text
  return SHORT_ESCAPES[text] ?? Array.from({ length: text.length }, (_, i) => escapeUnit(text.charCodeAt(i))).join('')
}

const escapeUnit = (unit: number): string => `\\u${unit.toString(16).toUpperCase().padStart(4, '0')}`

const REPLACEMENT = 0xfffd

/** The characters of a text as QEMU sees its bytes: with one replacement for each stretch that is none. */
function toCodePoints(text: string): number[] {
  const bytes = encodeText(text)
  const found: number[] = []
  for (let at = 0; at < bytes.length; ) {
    const { code, length } = codePointAt(bytes, at)
    found.push(code)
    at += length
  }
  return found
}

/** The smallest code point that needs as many bytes: two, three and so on, up to the six of early UTF-8. */
const SMALLEST = [0x80, 0x800, 0x10000, 0x200000, 0x4000000]

function codePointAt(bytes: Buffer, at: number): { code: number; length: number } {
  const first = bytes[at] ?? 0
  if (first < 0x80) return { code: first, length: 1 }
  const length = Math.clz32(~(first << 24))
  if (length < 2 || length > 6) return { code: REPLACEMENT, length: 1 }
  let code = first & (0x7f >> length)
  for (let i = 1; i < length; i++) {
    const next = bytes[at + i] ?? 0
    if ((next & 0xc0) !== 0x80) return { code: REPLACEMENT, length: i }
    code = code * 64 + (next & 0x3f)
  }
  // A null byte can be written as two.
  const shortest = code >= (SMALLEST[length - 2] ?? 0) || (code === 0 && length === 2)
  return { code: shortest && isCharacter(code) ? code : REPLACEMENT, length }
}

/** Surrogates are none, and some numbers never will be one. */
const isCharacter = (code: number): boolean =>
  code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) && (code < 0xfdd0 || code > 0xfdef) && (code & 0xfffe) !== 0xfffe
