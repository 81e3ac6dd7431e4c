/** A command line of qemu-io: its words, and the flags among them. Nothing is done here. */

/** A command that ends early, and what is said about it: on stdout, or on stderr. Both are whole lines without their end. */
export class LineFailure extends Error {
  override readonly name = 'LineFailure'
  readonly out: string | undefined
  readonly err: string | undefined
  /** How the command is called is said on stdout. */
  readonly usage: boolean

  constructor(said: { out?: string; err?: string; usage?: boolean; cause?: unknown }) {
    super(said.err ?? said.out ?? 'wrong usage', { cause: said.cause })
    this.out = said.out
    this.err = said.err
    this.usage = said.usage ?? false
  }
}

/** What is wrong with a request, said where results are said. */
export const refused = (out: string): LineFailure => new LineFailure({ out })

/** A command that was called in a way that it cannot be. */
export const misused = (err?: string): LineFailure =>
  new LineFailure({ usage: true, ...(err !== undefined && { err }) })

/** Words are what is between spaces; nothing quotes a space. */
export const wordsOf = (line: string): string[] => line.split(' ').filter(word => word !== '')

/** A flag of a command. */
export interface Flag {
  readonly letter: string
  /** Takes a value. */
  readonly value?: true
  /** For the command's help. */
  readonly help: string
}

/** The words behind a command's name, understood. */
export interface Arguments {
  /** As they were called: a command has more than one name. */
  readonly name: string
  readonly operands: readonly string[]
  has(letter: string): boolean
  /** The value of a flag; of one that was given more than once, the last. */
  value(letter: string): string | undefined
}

/** Sorts flags from operands, which come in any order; `--` ends the flags. A number below zero is taken for flags. */
export function parseWords(name: string, words: readonly string[], flags: readonly Flag[]): Arguments {
  const given = new Map<string, string>()
  const operands: string[] = []
  for (let index = 0; index < words.length; index++) {
    const word = words[index] ?? ''
    if (word === '--') {
      operands.push(...words.slice(index + 1))
      break
    }
    if (!word.startsWith('-') || word === '-') {
      operands.push(word)
      continue
    }
    for (let at = 1; at < word.length; at++) {
      const letter = word.charAt(at)
      const flag = flags.find(known => known.letter === letter)
      if (flag === undefined) throw misused(`${name}: invalid option -- '${letter}'`)
      if (flag.value === undefined) {
        given.set(letter, '')
        continue
      }
      const rest = word.slice(at + 1)
      const value = rest === '' ? words[++index] : rest
      if (value === undefined) throw misused(`${name}: option requires an argument -- '${letter}'`)
      given.set(letter, value)
      break
    }
  }
  return { name, operands, has: letter => given.has(letter), value: letter => given.get(letter) }
}
