/** Numbers as C's printf writes them. */

/** `%.Nf`. Unlike `toFixed`, an exact half goes to the even digit: 320.5 is "320". */
export function fixed(value: number, digits: number): string {
  // Sixty more decimals are all that a sum of sizes divided by a power of 1024 can have.
  const exact = value.toFixed(digits + 60)
  const end = exact.indexOf('.') + 1 + digits
  const kept = exact.slice(0, digits === 0 ? end - 1 : end)
  const half = /^50*$/.test(exact.slice(end))
  return half && /[02468]$/.test(kept) ? kept : value.toFixed(digits)
}

/** `%.3g` for a number that is not negative. */
export function threeDigits(value: number): string {
  if (value === 0) return '0'
  const exponent = Math.floor(Math.log10(Number(value.toPrecision(3))))
  if (exponent < -4 || exponent >= 3) {
    const [mantissa = '', power = ''] = value.toExponential(2).split('e')
    const digits = power.replace(/^[+-]/, '').padStart(2, '0')
    return `${trimZeros(mantissa)}e${power.startsWith('-') ? '-' : '+'}${digits}`
  }
  return trimZeros(fixed(value, 2 - exponent))
}

const trimZeros = (text: string): string => (text.includes('.') ? text.replace(/\.?0+$/, '') : text)

const UNITS = ['', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei'] as const

/** A size for people, as qemu-img prints it: three digits and a binary unit, the next unit from 1000 on. */
export function humanSize(size: number | bigint): string {
  const bytes = Number(size)
  let unit = 0
  let divisor = 1
  while (unit < UNITS.length - 1 && bytes / divisor >= 1000) {
    divisor *= 1024
    unit += 1
  }
  return `${threeDigits(bytes / divisor)} ${UNITS[unit]}B`
}

/** `%#x`: no prefix on zero. */
export const hex = (value: number | bigint): string => (BigInt(value) === 0n ? '0' : `0x${value.toString(16)}`)
