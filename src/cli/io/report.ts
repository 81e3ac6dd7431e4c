/** The lines that qemu-io's commands print. */

import { fixed } from '../format/number.js'

const UNITS = [' bytes', ' KiB', ' MiB', ' GiB', ' TiB', ' PiB', ' EiB'] as const

/** An amount of bytes in the largest unit of which it has one, with three decimals unless they are zeroes. */
export function amount(bytes: number | bigint): string {
  let unit = 0
  let value = Number(bytes)
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024
    unit += 1
  }
  const text = fixed(value, unit === 0 ? 6 : 3)
  return `${text.replace(/\.0+$/, '')}${UNITS[unit]}`
}

const twoDigits = (value: number): string => String(value).padStart(2, '0')

/** A time: as much of it as there is, or `whole`, from hours on. */
function duration(seconds: number, whole: boolean): string {
  const hours = Math.floor(seconds / 3600)
  const minutes = Math.floor(seconds / 60) % 60
  const rest = fixed(seconds % 60, 2).padStart(5, '0')
  if (whole || hours > 0) return `${hours}:${twoDigits(minutes)}:${rest}`
  return minutes > 0 ? `${minutes}:${rest}` : `${rest} sec`
}

/** What a request has done. */
export interface Done {
  readonly what: string
  readonly offset: bigint
  readonly length: bigint
  readonly seconds: number
  /** For programs: the numbers alone. */
  readonly bare: boolean
}

export function report({ what, offset, length, seconds, bare }: Done): string {
  const bytes = Number(length)
  const rate = seconds > 0 ? bytes / seconds : 0
  const operations = seconds > 0 ? 1 / seconds : 0
  const time = duration(seconds, bare)
  if (bare) return `${bytes},1,${time},${fixed(rate, 3)},${fixed(operations, 3)}\n`
  return (
    `${what} ${length}/${length} bytes at offset ${offset}\n` +
    `${amount(bytes)}, 1 ops; ${time} (${amount(rate)}/sec and ${fixed(operations, 4)} ops/sec)\n`
  )
}

const ROW = 16

/** Bytes for people, with their places on the disk; piece by piece, since they can be many. */
export function* hexDump(bytes: Uint8Array, offset: bigint): Generator<string> {
  for (let at = 0; at < bytes.length; at += ROW) {
    const row = [...bytes.subarray(at, at + ROW)]
    const place = (offset + BigInt(at)).toString(16).padStart(8, '0')
    const digits = row.map(byte => `${byte.toString(16).padStart(2, '0')} `).join('')
    const letters = row.map(byte => (isAlphanumeric(byte) ? String.fromCharCode(byte) : '.')).join('')
    yield `${place}:  ${digits} ${letters}\n`
  }
}

const isAlphanumeric = (byte: number): boolean => /^[0-9A-Za-z]$/.test(String.fromCharCode(byte))
