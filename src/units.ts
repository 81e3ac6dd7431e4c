/** Sizes and offsets: `number` or `bigint` in, `number` out, exact or refused. */

import { invalidArgument } from './errors.js'

/**
 * A size or offset in bytes: a whole number of 0 to 2^53 - 1. A `bigint` is accepted for callers that compute with
 * them; beyond 2^53 - 1 either is refused with `ERR_QCOW2_INVALID_ARGUMENT`, never rounded.
 */
export type Size = number | bigint

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

/** Reads a {@link Size}; `name` is the argument's, for the message. */
export function toBytes(value: unknown, name: string): number {
  if (typeof value !== 'number' && typeof value !== 'bigint') {
    throw invalidArgument(name, `${name} must be a number or bigint of bytes, not ${describe(value)}`)
  }
  if (typeof value === 'number' && !Number.isInteger(value)) {
    throw invalidArgument(name, `${name} must be a whole number of bytes, not ${describe(value)}`)
  }
  if (value < 0) throw invalidArgument(name, `${name} must not be negative: ${describe(value)}`)
  if (value > Number.MAX_SAFE_INTEGER) {
    throw invalidArgument(name, `${name} is beyond 2^53 - 1, the largest size that is exact: ${describe(value)}`)
  }
  return Number(value)
}
