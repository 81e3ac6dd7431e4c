/** Runs commands: those that were given, or lines of the input as they come. */

import { decodeText } from '../../text.js'
import type { Context } from './context.js'
import { LineFailure, parseWords, wordsOf } from './line.js'
import { COMMANDS, type IoCommand, usageOf } from './table.js'

const PROMPT = 'qemu-io> '

/** Runs one line. Tells whether it succeeded; a line without words does nothing. */
async function runLine(context: Context, line: string): Promise<boolean> {
  const [name, ...words] = wordsOf(line)
  if (name === undefined) return true
  const command = COMMANDS.find(each => each.name === name || each.alias === name)
  if (command === undefined) {
    await context.complain(`command "${name}" not found`)
    return false
  }
  try {
    if (!(await mayRun(context, command, name, words.length))) return false
    return await command.run(context, parseWords(name, words, command.flags ?? []))
  } catch (error) {
    if (!(error instanceof LineFailure)) throw error
    if (error.err !== undefined) await context.complain(error.err)
    if (error.out !== undefined) context.out(`${error.out}\n`)
    if (error.usage) context.out(`${usageOf(command)}\n`)
    return false
  }
}

/** Whether there are words enough, an image, and that it may be written to, where the command needs that. */
async function mayRun(context: Context, command: IoCommand, name: string, count: number): Promise<boolean> {
  const { least = 0, most = 0 } = command
  const { disk } = context
  if (command.withoutFile !== true && disk === undefined) {
    await context.complain("no file open, try 'help open'")
    return false
  }
  if (count < least || count > most) {
    const range =
      most === Number.POSITIVE_INFINITY
        ? `at least ${least} arguments`
        : least === most
          ? `${least} arguments`
          : `between ${least} and ${most} arguments`
    await context.complain(`bad argument count ${count} to ${name}, expected ${range}`)
    return false
  }
  if (command.writes === true && disk?.image.readOnly === true) {
    await context.complainAs('Block node is read-only')
    return false
  }
  return true
}

/** Runs commands one behind the other until one ends the program. Tells whether all succeeded. */
export async function runCommands(context: Context, lines: readonly string[]): Promise<boolean> {
  let right = true
  for (const line of lines) {
    context.session.signal.throwIfAborted()
    if (context.ended) break
    if (!(await runLine(context, line))) right = false
  }
  return right
}

/** Runs what comes on the input, line by line, and asks for each. */
export async function runInput(context: Context): Promise<boolean> {
  const { session } = context
  const { stdin, stdout, signal } = session
  const stop = (): unknown => stdin.destroy()
  signal.addEventListener('abort', stop)
  let right = true
  const ask = (): void => {
    stdout.write(PROMPT)
    stdout.flush()
  }
  try {
    ask()
    for await (const line of linesOf(stdin)) {
      if (!(await runCommands(context, [line]))) right = false
      if (context.ended) break
      ask()
    }
  } finally {
    signal.removeEventListener('abort', stop)
  }
  signal.throwIfAborted()
  return right
}

const NEWLINE = 10

/** The lines of a stream, as soon as they are whole; what is behind the last line's end is one, too. */
async function* linesOf(stream: AsyncIterable<string | Buffer>): AsyncGenerator<string> {
  let rest = Buffer.alloc(0)
  for await (const chunk of stream) {
    let bytes = Buffer.concat([rest, Buffer.from(chunk)])
    for (let end = bytes.indexOf(NEWLINE); end >= 0; end = bytes.indexOf(NEWLINE)) {
      yield decodeText(bytes.subarray(0, end))
      bytes = bytes.subarray(end + 1)
    }
    rest = bytes
  }
  if (rest.length > 0) yield decodeText(rest)
}
