/** The manual page: written when the package is built, from the commands' own table, in the macros that man reads. */

import { PassThrough } from 'node:stream'
import type { Command, Option } from 'commander'
import { EXAMPLES } from './examples.js'
import { buildProgram, VALUES } from './program.js'
import { Objects } from './secrets.js'
import { Output } from './session.js'

/** What roff takes for something else. A character that is not ASCII is named by its number. */
const ESCAPED: Readonly<Record<string, string>> = {
  '\\': '\\e',
  "'": '\\(aq',
  '`': '\\(ga',
  '^': '\\(ha',
  '~': '\\(ti',
  '-': '\\-',
}

/** Text of a line that begins with none of roff's own. */
function escaped(text: string): string {
  const plain = text.replace(/[\\'`^~-]|[^\n -~]/gu, character => ESCAPED[character] ?? named(character))
  return plain.startsWith('.') ? `\\&${plain}` : plain
}

const named = (character: string): string =>
  `\\[u${(character.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, '0')}]`

/** A paragraph; its lines are filled anew. */
const paragraph = (text: string): string[] => text.trim().split('\n').map(escaped)

/** An argument of a macro. */
const argument = (text: string): string => `"${escaped(text).replaceAll('"', '\\(dq')}"`

/** `-f, --format <fmt>`: what is typed is bold, what stands for something else is not. */
function flagsOf({ flags }: Option): string {
  const words = flags.split(/( <[^>]+>)/)
  return words.map(word => (word.startsWith(' <') ? `\\fI${escaped(word)}\\fR` : `\\fB${escaped(word)}\\fR`)).join('')
}

const optionLines = (option: Option): string[] => ['.TP', flagsOf(option), ...paragraph(option.description)]

const visible = (command: Command): Option[] => command.options.filter(option => !option.hidden)

function commandLines(program: string, command: Command): string[] {
  const examples = (EXAMPLES[command.name()] ?? []).map(example => escaped(`${program} ${example}`))
  return [
    `.SS ${argument(command.name())}`,
    '.PP',
    `\\fB${escaped(`${program} ${command.name()}`)}\\fR ${escaped(command.usage())}`,
    '.PP',
    ...paragraph(command.description()),
    ...visible(command).flatMap(optionLines),
    '.PP',
    'Examples:',
    '.PP',
    '.nf',
    ...examples.map(example => `    ${example}`),
    '.fi',
  ]
}

/** The program with all of its commands, by that name, as it is declared; nothing of it runs. */
export const declared = (name: string): Promise<Command> =>
  buildProgram({ program: name, stdout: new Output(new PassThrough()), objects: new Objects() }, async () => undefined)

/** The page of the program by that name. */
export async function manualPage(name: string, version: string): Promise<string> {
  const program = await declared(name)
  const lines = [
    `.TH ${argument(name.toUpperCase())} 1 "" ${argument(`${name} ${version}`)} "User Commands"`,
    '.SH NAME',
    `${escaped(name)} \\- create, convert, change, check and inspect disk images`,
    '.SH SYNOPSIS',
    `\\fB${escaped(name)}\\fR ${escaped(program.usage())}`,
    '.SH DESCRIPTION',
    ...paragraph(program.description()),
    '.PP',
    ...paragraph(VALUES),
    '.SH OPTIONS',
    ...visible(program).flatMap(optionLines),
    '.SH COMMANDS',
    ...program.commands.flatMap(command => commandLines(name, command)),
    '.SH "SEE ALSO"',
    '.BR qemu\\-img (1),',
    '.BR qemu\\-io (8),',
    '.BR qemu\\-nbd (8)',
  ]
  return `${lines.filter(line => line !== '').join('\n')}\n`
}
