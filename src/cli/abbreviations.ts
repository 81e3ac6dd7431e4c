/** Long options by their first letters, as getopt_long takes them where only one option begins so. */

import type { Command, Option } from 'commander'
import { UsageFailure } from './failure.js'
import { isLater } from './grammar.js'

/** The arguments of a command with the names of their long options in full. */
export function expandOptions(args: readonly string[], command: Command): string[] {
  const expanded: string[] = []
  for (let index = 0; index < args.length; index++) {
    const written = args[index] ?? ''
    // Operands from here on.
    if (written === '--') return [...expanded, ...args.slice(index)]
    const arg = written.startsWith('--') ? expand(written, command) : written
    expanded.push(arg)
    const value = args[index + 1]
    if (value !== undefined && takesNext(arg, command)) {
      expanded.push(value)
      index++
    }
  }
  return expanded
}

function expand(written: string, command: Command): string {
  const [name = '', value] = written.split(/=(.*)/s, 2)
  const known = [...command.options.flatMap(option => option.long ?? []), '--help']
  if (known.includes(name)) return written
  const begun = known.filter(option => option.startsWith(name))
  const added = new Set(command.options.filter(isLater).map(option => option.long))
  const older = begun.filter(option => !added.has(option))
  const meant = older.length > 0 ? older : begun
  if (meant.length > 1) {
    const list = meant.map(option => `'${option}'`).join(' ')
    throw new UsageFailure(`option '${name}' is ambiguous; possibilities: ${list}`)
  }
  const [only = name] = meant
  return value === undefined ? only : `${only}=${value}`
}

/** Whether the argument behind this one is its value, whatever it looks like. */
function takesNext(arg: string, command: Command): boolean {
  const needsValue = (flag: (option: Option) => boolean): boolean => command.options.find(flag)?.required ?? false
  if (arg.startsWith('--')) return needsValue(option => option.long === arg)
  if (!arg.startsWith('-')) return false
  // Short options stand together; the first that has a value takes the rest of the word for it.
  const letters = [...arg.slice(1)]
  const first = letters.findIndex(letter => needsValue(option => option.short === `-${letter}`))
  return first !== -1 && first === letters.length - 1
}
