/**
 * The `-o` grammar: `name=value,name=value`, a comma in a value doubled, a name alone meaning "on" (or, with "no" in
 * front, "off"), later settings overriding earlier ones.
 */

import { CommandFailure } from './failure.js'
import { parseSize, SIZE_HINT } from './size.js'

export type OptionType = 'string' | 'size' | 'number' | 'bool'

export interface OptionSpec {
  readonly name: string
  readonly type: OptionType
  readonly help: string
  readonly fallback?: string
  /** QEMU's own tool does not have it, or not in each version. */
  readonly own?: true
}

export type OptionValue = string | bigint | boolean
export type OptionValues = ReadonlyMap<string, OptionValue>

export interface Setting {
  readonly name: string
  /** Absent where only the name was given. */
  readonly value: string | undefined
}

/**
 * Adds one `-o` argument to those before it. A list that begins with a comma, or ends with an odd number of them, would
 * change meaning when joined to another, so it is refused.
 */
export function joinOptionLists(previous: string | undefined, list: string): string {
  const trailing = /,*$/.exec(list)?.[0].length ?? 0
  if (list === '' || list.startsWith(',') || trailing % 2 === 1) {
    throw new CommandFailure(`Invalid option list: ${list}`)
  }
  return previous === undefined ? list : `${previous},${list}`
}

/** The settings of a list, in order. */
export function settings(list: string): Setting[] {
  const found: Setting[] = []
  let rest = list
  while (rest !== '') {
    const name = /^[^=,]*/.exec(rest)?.[0] ?? ''
    rest = rest.slice(name.length)
    if (!rest.startsWith('=')) {
      found.push({ name, value: undefined })
      rest = rest.slice(1)
      continue
    }
    const raw = /^(?:[^,]|,,)*/.exec(rest.slice(1))?.[0] ?? ''
    found.push({ name, value: raw.replaceAll(',,', ',') })
    rest = rest.slice(1 + raw.length + 1)
  }
  return found
}

/** Whether the list asks for help instead: `help` or `?` standing alone. */
export const asksForHelp = (list: string): boolean =>
  settings(list).some(({ name, value }) => value === undefined && (name === 'help' || name === '?'))

/** Reads a list against what the format knows. */
export function parseOptionList(list: string, specs: readonly OptionSpec[]): Map<string, OptionValue> {
  const values = new Map<string, OptionValue>()
  for (const setting of settings(list)) {
    const { spec, text } = resolve(setting, specs)
    values.set(spec.name, parseValue(spec, text))
  }
  return values
}

function resolve({ name, value }: Setting, specs: readonly OptionSpec[]): { spec: OptionSpec; text: string } {
  const spec = specs.find(candidate => candidate.name === name)
  if (spec) return { spec, text: value ?? 'on' }
  const negated =
    value === undefined && name.startsWith('no') && specs.find(({ name: known }) => known === name.slice(2))
  if (negated) return { spec: negated, text: 'off' }
  throw new CommandFailure(`Invalid parameter '${name}'`)
}

/** One value by its type; messages name the parameter, as qemu-img's do. */
export function parseValue({ name, type }: Pick<OptionSpec, 'name' | 'type'>, text: string): OptionValue {
  switch (type) {
    case 'string':
      return text
    case 'bool':
      return parseBool(name, text)
    case 'number':
      return parseNumber(name, text)
    case 'size': {
      const parsed = parseSize(text)
      if ('value' in parsed) return parsed.value
      if (parsed.failure === 'range') {
        throw new CommandFailure(`Value '${text}' is out of range for parameter '${name}'`)
      }
      throw new CommandFailure(`Parameter '${name}' expects a non-negative number below 2^64`, { hint: SIZE_HINT })
    }
  }
}

function parseBool(name: string, text: string): boolean {
  if (['on', 'yes', 'true', 'y'].includes(text)) return true
  if (['off', 'no', 'false', 'n'].includes(text)) return false
  throw new CommandFailure(`Parameter '${name}' expects 'on' or 'off'`)
}

/** As C reads it: decimal, octal or hexadecimal; a minus sign wraps around, for later checks to refuse. */
function parseNumber(name: string, text: string): bigint {
  const [, sign, digits = ''] = /^\s*([+-]?)(0x[0-9a-f]+|\d+)$/i.exec(text) ?? []
  const octal = /^0\d+$/.test(digits)
  if (digits === '' || (octal && !/^[0-7]+$/.test(digits)))
    throw new CommandFailure(`Parameter '${name}' expects a number`)
  const value = BigInt(octal ? `0o${digits.slice(1)}` : digits)
  if (value >= 2n ** 64n) throw new CommandFailure(`Value '${text}' is too large for parameter '${name}'`)
  return sign === '-' ? BigInt.asUintN(64, -value) : value
}

/** `name=value` pairs in the order of `specs`, defaults included: the tail of the "Formatting" line. */
export function describeOptions(values: OptionValues, specs: readonly OptionSpec[]): string {
  const parts: string[] = []
  for (const { name, fallback } of specs) {
    const value = values.get(name) ?? fallback
    if (value === undefined) continue
    parts.push(`${name}=${valueText(value)}`)
  }
  return parts.join(' ')
}

function valueText(value: OptionValue): string {
  if (typeof value === 'string') return value.replaceAll(',', ',,')
  if (typeof value === 'boolean') return value ? 'on' : 'off'
  // As QEMU prints its 64-bit numbers: signed.
  return String(BigInt.asIntN(64, value))
}

const TYPE_LABEL: Readonly<Record<OptionType, string>> = {
  string: 'str',
  size: 'size',
  number: 'num',
  bool: 'bool (on/off)',
}

/** The table of `-o help`, sorted by name. */
export function optionHelp(specs: readonly OptionSpec[]): string {
  const rows = specs.map(({ name, type, help }) => `${`  ${name}=<${TYPE_LABEL[type]}>`.padEnd(24)} - ${help}\n`)
  return rows.sort().join('')
}
