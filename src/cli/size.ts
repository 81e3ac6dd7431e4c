import { CommandFailure } from './failure.js'

/** 2^63 - 1: the largest size that qemu-img accepts anywhere. */
export const MAX_SIZE = 2n ** 63n - 1n

/** What a size may be. */
export const SIZE_HINT =
  'Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.'

const U64_LIMIT = 2n ** 64n
const SUFFIX_BITS: Readonly<Record<string, bigint>> = { B: 0n, K: 10n, M: 20n, G: 30n, T: 40n, P: 50n, E: 60n }

export type ParsedSize = { readonly value: bigint } | { readonly failure: 'syntax' | 'range' }

/**
 * A size in QEMU's notation: decimal with an optional fraction and one of the suffixes b k M G T P E (powers of 1024,
 * either case), or plain hexadecimal. Exact: the fraction is taken as a double and scaled in 64.64 fixed point, halves
 * round up, as QEMU does, so that both tools create disks of the same size.
 */
export function parseSize(text: string): ParsedSize {
  const hex = /^\s*\+?0x([0-9a-f]+)$/i.exec(text)
  if (hex) return inU64(BigInt(`0x${hex[1]}`))
  if (/^\s*-\d+$/.test(text)) return { failure: 'range' }

  const match = /^\s*\+?(\d*)(\.\d*)?([bkmgtpe])?$/i.exec(text)
  const [, whole = '', fraction = '', suffix = 'B'] = match ?? []
  if (!match || (whole === '' && fraction.length < 2)) return { failure: 'syntax' }

  const shift = SUFFIX_BITS[suffix.toUpperCase()] ?? 0n
  const fixed = fraction.length > 1 ? BigInt(Math.trunc(Number(`0${fraction}`) * 2 ** 64)) : 0n
  // Part of a byte has no meaning: a fraction needs a scale.
  if (shift === 0n && fixed % U64_LIMIT !== 0n) return { failure: 'syntax' }
  const scaled = (BigInt(whole || '0') * U64_LIMIT + fixed) << shift
  return inU64((scaled + (1n << 63n)) >> 64n)
}

const inU64 = (value: bigint): ParsedSize => (value < U64_LIMIT ? { value } : { failure: 'range' })

/** A size given on the command line as an argument of its own; `name` is what it is ("image size"). */
export function sizeArgument(name: string, text: string, range: { min?: bigint; max?: bigint } = {}): bigint {
  const { min = 0n, max = MAX_SIZE } = range
  const parsed = parseSize(text)
  if ('failure' in parsed && parsed.failure === 'syntax') {
    throw new CommandFailure(`Invalid ${name} specified: '${text}'.`, { hint: SIZE_HINT })
  }
  if ('failure' in parsed || parsed.value < min || parsed.value > max) {
    throw new CommandFailure(`Invalid ${name} specified. Must be between ${min} and ${max}.`)
  }
  return parsed.value
}

/** The value as a number where that is exact, else as the bigint it is: the library says which limit it passes. */
export const toSize = (value: bigint): number | bigint =>
  value <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(value) : value
