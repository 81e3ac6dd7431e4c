/** Sizes and offsets: `number` or `bigint` in, `number` out unless bigints are asked for; exact or refused. */

import { invalidArgument, Qcow2Error } from './errors.js'

/**
 * A size or offset in bytes: a whole number of 0 to 2^53 - 1, or a `bigint`. Beyond 2^53 - 1, where not every number is exact, only a
 * `bigint` of whole sectors of 512 bytes is taken; anything else is refused with `ERR_QCOW2_INVALID_ARGUMENT`, never rounded.
 */
export type Size = number | bigint

/** What a call's results say sizes and offsets in. */
export interface BigIntResults {
  /**
   * Sizes and offsets of the result are bigints, as Node's `fs.stat` has it. Without it they are numbers, and one beyond 2^53 - 1, where
   * numbers are not exact any more, is refused with `ERR_QCOW2_LIMIT`. Default false.
   */
  bigint?: boolean | undefined
}

/** What a message shows of a bad value: its type, and the value where that is short. */
export function describe(value: unknown): string {
  if (value === null || value === undefined) return String(value)
  if (typeof value === 'string') return value.length > 40 ? `'${value.slice(0, 40)}…'` : `'${value}'`
  if (typeof value === 'bigint') return `${value}n`
  if (typeof value === 'number' || typeof value === 'boolean') return String(value)
  if (typeof value === 'function') return 'a function'
  if (typeof value === 'symbol') return 'a symbol'
  if (Array.isArray(value)) return 'an array'
  return `an object (${value.constructor?.name ?? 'no prototype'})`
}

/** Bytes of a sector: of what is counted in them, doubles are exact far beyond 2^53. */
const SECTOR = 512n
/** 2^63, which no size reaches. */
const LIMIT = 2n ** 63n

/** Reads a {@link Size} as a number that is exactly that; `name` is the argument's, for the message. */
export function toBytes(value: unknown, name: string): number {
  if (typeof value !== 'number' && typeof value !== 'bigint') {
    throw invalidArgument(name, `${name} must be a number or bigint of bytes, not ${describe(value)}`)
  }
  if (typeof value === 'number' && !Number.isInteger(value)) {
    throw invalidArgument(name, `${name} must be a whole number of bytes, not ${describe(value)}`)
  }
  if (value < 0) throw invalidArgument(name, `${name} must not be negative: ${describe(value)}`)
  if (value > Number.MAX_SAFE_INTEGER) return toManyBytes(value, name)
  return Number(value)
}

function toManyBytes(value: number | bigint, name: string): number {
  if (typeof value === 'number') {
    throw invalidArgument(
      name,
      `${name} is beyond 2^53 - 1, the largest number that is exact: give a bigint, not ${value}`,
    )
  }
  const number = Number(value)
  if (value >= LIMIT || value % SECTOR !== 0n || BigInt(number) !== value) {
    const rule = 'beyond 2^53 - 1 only whole sectors of 512 bytes are counted'
    throw invalidArgument(name, `${name} is ${describe(value)}: ${rule}`)
  }
  return number
}

/** A number that came from {@link toBytes}, or from the addon, as what it is read from again. */
export const toSize = (exact: number): Size => (exact > Number.MAX_SAFE_INTEGER ? BigInt(exact) : exact)

/** Refuses a size of a result that its caller, who did not ask for bigints, would get wrong. */
export function safe(value: number | bigint, name: string): number {
  if (value <= Number.MAX_SAFE_INTEGER) return Number(value)
  const message = `${name} is ${BigInt(value)}, beyond 2^53 - 1, the largest number that is exact: ask with bigint: true`
  throw new Qcow2Error('ERR_QCOW2_LIMIT', message, { field: name })
}

/** How sizes of a result are said: see {@link BigIntResults}. */
export const sizesIn = (big: boolean | undefined): ((value: number | bigint, name: string) => number | bigint) =>
  big ? value => BigInt(value) : safe
