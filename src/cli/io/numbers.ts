/** The numbers of qemu-io's commands. */

import { MAX_SIZE, parseSize } from '../size.js'
import { type Arguments, misused, refused } from './line.js'

/** The longest request: what fits an `int`, in whole sectors. */
export const MAX_REQUEST = 2n ** 31n - 512n

const SECTOR = 512n

/** An offset or a length. */
export function toNumber(text: string): bigint {
  const parsed = parseSize(text)
  if ('failure' in parsed && parsed.failure === 'syntax') {
    throw refused(`Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- ${text}`)
  }
  if ('failure' in parsed || parsed.value > MAX_SIZE) throw refused(`Parsing error: argument too large -- ${text}`)
  return parsed.value
}

/** A byte as C reads numbers: decimal, hexadecimal or octal. */
export function toPattern(text: string): number {
  const [, digits = ''] = /^\s*[+]?(0x[0-9a-f]+|\d+)$/i.exec(text) ?? []
  const octal = /^0\d+$/.test(digits)
  const value = octal && !/^[0-7]+$/.test(digits) ? Number.NaN : Number(octal ? `0o${digits.slice(1)}` : digits)
  if (digits === '' || !(value <= 0xff)) throw refused(`${text} is not a valid pattern byte`)
  return value
}

/** The pattern that a flag gives, if it does. */
export function patternOf(args: Arguments): number | undefined {
  const text = args.value('P')
  return text === undefined ? undefined : toPattern(text)
}

/** A part of the disk, as a command names it. It need not be inside. */
export interface Range {
  readonly offset: bigint
  readonly length: bigint
}

/** The two operands of commands that take one part; `unless` says that there is no limit, in the words of the message. */
export function toRange(args: Arguments, { limited = true, unless = '' } = {}): Range {
  const [offset = '', length = ''] = args.operands
  if (args.operands.length !== 2) throw misused()
  const range = { offset: toNumber(offset), length: toNumber(length) }
  if (limited && range.length > MAX_REQUEST) {
    throw refused(`length cannot exceed ${MAX_REQUEST}${unless}, given ${length}`)
  }
  return range
}

/** The operands of commands that take several buffers: where, and how much each of them holds. */
export function toVector(args: Arguments): Range & { readonly lengths: readonly bigint[] } {
  const [first, ...rest] = args.operands
  if (first === undefined || rest.length === 0) throw misused()
  const offset = toNumber(first)
  let length = 0n
  const lengths = rest.map(text => {
    const each = toNumber(text)
    if (each > MAX_REQUEST) throw refused(`Argument '${text}' exceeds maximum size ${MAX_REQUEST}`)
    length += each
    if (length > MAX_REQUEST) throw refused(`The total number of bytes exceed the maximum size ${MAX_REQUEST}`)
    return each
  })
  return { offset, length, lengths }
}

/** Some requests take whole sectors only. */
export function wholeSectors({ offset, length }: Range): void {
  if (offset % SECTOR !== 0n) throw refused(`${offset} is not a sector-aligned value for 'offset'`)
  if (length % SECTOR !== 0n) throw refused(`${length} is not a sector-aligned value for 'count'`)
}
