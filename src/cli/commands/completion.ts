import type { Command } from 'commander'
import { SOURCE_FORMATS } from '../../formats/table.js'
import { UsageFailure } from '../failure.js'
import type { Runner } from '../program.js'

/** What the shells are told of a command. */
interface Entry {
  readonly name: string
  readonly summary: string
  readonly options: readonly {
    readonly flags: readonly string[]
    readonly help: string
    readonly takesValue: boolean
  }[]
}

export function declareCompletion(program: Command, run: Runner, whole: () => Promise<Command>): void {
  program
    .command('completion')
    .summary('print what a shell completes commands and options by')
    .description('Print a script that completes commands, options and formats: for bash, zsh or fish.')
    .usage('bash | zsh | fish')
    .argument('[shells...]', 'the shell')
    .action((shells: string[]) =>
      run(async session => {
        const [shell = ''] = shells
        const write = Object.hasOwn(SCRIPTS, shell) ? SCRIPTS[shell] : undefined
        if (write === undefined || shells.length !== 1) throw new UsageFailure('Expecting a shell: bash, zsh or fish')
        session.stdout.write(write(entriesOf(await whole())))
        return 0
      }),
    )
}

const entriesOf = (program: Command): Entry[] =>
  program.commands.map(command => ({
    name: command.name(),
    summary: command.summary(),
    options: command.options
      .filter(option => !option.hidden)
      .map(({ short, long, description, required }) => ({
        flags: [short, long].filter(flag => flag !== undefined),
        help: description,
        takesValue: required,
      })),
  }))

const FORMAT_FLAGS = ['-f', '--format', '-F', '-O', '--target-format', '--source-format', '--backing-format']

/** One word of a shell. */
const quoted = (text: string): string => `'${text.replaceAll("'", "'\\''")}'`

function bash(entries: readonly Entry[]): string {
  const cases = entries.map(
    ({ name, options }) => `    ${name}) words='${options.flatMap(({ flags }) => flags).join(' ')}' ;;`,
  )
  return `_qcow2() {
  local word="\${COMP_WORDS[COMP_CWORD]}" before="\${COMP_WORDS[COMP_CWORD-1]}" words=''
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W '${entries.map(({ name }) => name).join(' ')}' -- "$word"))
    return
  fi
  case "$before" in
    ${FORMAT_FLAGS.join('|')}) COMPREPLY=($(compgen -W '${SOURCE_FORMATS.join(' ')}' -- "$word")); return ;;
  esac
  case "\${COMP_WORDS[1]}" in
${cases.join('\n')}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
    *) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
}
complete -o filenames -F _qcow2 qcow2
`
}

function zsh(entries: readonly Entry[]): string {
  const plain = (text: string): string => text.replace(/[[\]:]/g, ' ')
  const commands = entries.map(({ name, summary }) => `    ${quoted(`${name}:${plain(summary)}`)}`)
  const cases = entries.map(({ name, options }) => {
    const specs = options.flatMap(({ flags, help, takesValue }) =>
      flags.map(flag => {
        const value = FORMAT_FLAGS.includes(flag)
          ? `:format:(${SOURCE_FORMATS.join(' ')})`
          : takesValue
            ? ':value:'
            : ''
        return quoted(`*${flag}[${plain(help)}]${value}`)
      }),
    )
    return `    ${name}) _arguments ${[...specs, "'*:file:_files'"].join(' ')} ;;`
  })
  return `#compdef qcow2
_qcow2() {
  local -a commands
  commands=(
${commands.join('\n')}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command="\${words[2]}"
  shift words
  (( CURRENT-- ))
  case "$command" in
${cases.join('\n')}
  esac
}
compdef _qcow2 qcow2
`
}

function fish(entries: readonly Entry[]): string {
  const word = (text: string): string => `'${text.replace(/[\\']/g, '\\$&')}'`
  const lines = entries.flatMap(({ name, summary, options }) => [
    `complete -c qcow2 -n __fish_use_subcommand -f -a ${name} -d ${word(summary)}`,
    ...options.map(({ flags, help, takesValue }) => {
      const spelled = flags.map(flag => (flag.startsWith('--') ? `-l ${flag.slice(2)}` : `-s ${flag.slice(1)}`))
      const format = flags.some(flag => FORMAT_FLAGS.includes(flag))
      const value = format ? ` -x -a ${word(SOURCE_FORMATS.join(' '))}` : takesValue ? ' -r' : ''
      return `complete -c qcow2 -n '__fish_seen_subcommand_from ${name}' ${spelled.join(' ')}${value} -d ${word(help)}`
    }),
  ])
  return `${lines.join('\n')}\n`
}

const SCRIPTS: Readonly<Record<string, (entries: readonly Entry[]) => string>> = { bash, zsh, fish }
