/**
 * The arguments of a command as getopt_long takes them: options and operands in any order, long options by their first letters where
 * only one begins so, short options together in one word. What is wrong is said in its words.
 */

import type { Command, Option } from 'commander'
import { OptionFailure } from './failure.js'
import { isLater } from './grammar.js'

/** Whether a word that begins with a dash is an operand all the same; `operands` are those before it. */
export type IsOperand = (word: string, operands: readonly string[]) => boolean

/** A size with a minus looks like an option; it comes behind the image. */
export const isRelativeSize: IsOperand = (word, [filename]) => filename !== undefined && /^-[\d.]/.test(word)

/** What a word is: arguments for commander, and whether the word behind it is its value. */
interface Taken {
  readonly words: readonly string[]
  readonly usesNext: boolean
}

/** The arguments with the names of their long options in full, options before operands. */
export function arrange(args: readonly string[], command: Command, isOperand: IsOperand = () => false): string[] {
  const options: string[] = []
  const operands: string[] = []
  for (let index = 0; index < args.length; index++) {
    const word = args[index] ?? ''
    if (word === '--') {
      operands.push(...args.slice(index + 1))
      break
    }
    // A dash alone is a name.
    if (!word.startsWith('-') || word === '-' || isOperand(word, operands)) {
      operands.push(word)
      continue
    }
    const { words, usesNext } = (word.startsWith('--') ? long : short)(word, args[index + 1], command)
    options.push(...words)
    if (usesNext) index++
  }
  return operands.length === 0 ? options : [...options, '--', ...operands]
}

function long(word: string, next: string | undefined, command: Command): Taken {
  const [written = '', value] = word.split(/=(.*)/s, 2)
  const known = [...command.options.flatMap(option => option.long ?? []), '--help']
  const begun = known.filter(option => option.startsWith(written))
  // What newer versions added does not make a word of the older ones ambiguous.
  const added = new Set(command.options.filter(isLater).map(option => option.long))
  const older = begun.filter(option => !added.has(option))
  const meant = known.includes(written) ? [written] : older.length > 0 ? older : begun
  if (meant.length > 1) {
    const list = meant.map(option => `'${option}'`).join(' ')
    throw new OptionFailure(`option '${word}' is ambiguous; possibilities: ${list}`)
  }
  const [name] = meant
  if (name === undefined) throw new OptionFailure(`unrecognized option '${word}'`)
  const needsValue = command.options.find(option => option.long === name)?.required ?? false
  if (!needsValue && value !== undefined) throw new OptionFailure(`option '${name}' doesn't allow an argument`)
  if (!needsValue) return { words: [name], usesNext: false }
  if (value !== undefined) return { words: [`${name}=${value}`], usesNext: false }
  if (next === undefined) throw new OptionFailure(`option '${name}' requires an argument`)
  return { words: [name, next], usesNext: true }
}

/** Short options stand together; the first that has a value takes the rest of the word for it, or the next word. */
function short(word: string, next: string | undefined, command: Command): Taken {
  const known = (letter: string): Option | undefined => command.options.find(option => option.short === `-${letter}`)
  const words: string[] = []
  for (let at = 1; at < word.length; at++) {
    const letter = word.charAt(at)
    const option = known(letter)
    if (option === undefined && letter !== 'h') throw new OptionFailure(`invalid option -- '${letter}'`)
    words.push(`-${letter}`)
    if (!option?.required) continue
    const rest = word.slice(at + 1)
    if (rest === '' && next === undefined) throw new OptionFailure(`option requires an argument -- '${letter}'`)
    return { words: [...words, rest === '' ? (next ?? '') : rest], usesNext: rest === '' }
  }
  return { words, usesNext: false }
}
