/** The commands, and how a command line becomes a call of one of them. */

import { Command, CommanderError } from 'commander'
import { isTarget, listed, SOURCE_FORMATS, TARGET_FORMATS } from '../formats/table.js'
import { isDescription } from './descriptions.js'
import { EXAMPLES } from './examples.js'
import { CommandFailure, OptionFailure, UsageFailure } from './failure.js'
import { arrange, isRelativeSize } from './getopt.js'
import type { Session } from './session.js'

/** Runs what a command line asked for; resolves to its exit code. */
export type Runner = (work: (session: Session) => Promise<number>) => Promise<void>

const TARGETS = listed(TARGET_FORMATS, 'and')
const ONLY_READ = SOURCE_FORMATS.filter(format => !isTarget(format))

/** What the help says of the arguments of all commands. */
export const VALUES = `
Sizes take the suffixes k, M, G, T, P and E, powers of 1024. Formats are ${TARGETS}${ONLY_READ.length === 0 ? '' : `; only read: ${ONLY_READ.join(', ')}`}.
Backing files are followed by file name only, never json: or a protocol.`

type Declare = (program: Command, run: Runner, whole: () => Promise<Command>) => void

/** What each command is declared by, in the order of the help. Only that of the command that runs is loaded: all of them together take longer than most of them run. */
const COMMANDS: Readonly<Record<string, () => Promise<Declare>>> = {
  create: async () => (await import('./commands/create.js')).declareCreate,
  convert: async () => (await import('./commands/convert.js')).declareConvert,
  info: async () => (await import('./commands/info.js')).declareInfo,
  map: async () => (await import('./commands/map.js')).declareMap,
  check: async () => (await import('./commands/check.js')).declareCheck,
  measure: async () => (await import('./commands/measure.js')).declareMeasure,
  compare: async () => (await import('./commands/compare.js')).declareCompare,
  snapshot: async () => (await import('./commands/snapshot.js')).declareSnapshot,
  bitmap: async () => (await import('./commands/bitmap.js')).declareBitmap,
  resize: async () => (await import('./commands/resize.js')).declareResize,
  amend: async () => (await import('./commands/amend.js')).declareAmend,
  commit: async () => (await import('./commands/commit.js')).declareCommit,
  rebase: async () => (await import('./commands/rebase.js')).declareRebase,
  report: async () => (await import('./commands/report.js')).declareReport,
  compact: async () => (await import('./commands/compact.js')).declareCompact,
  dd: async () => (await import('./commands/dd.js')).declareDd,
  io: async () => (await import('./commands/io.js')).declareIo,
  nbd: async () => (await import('./commands/nbd.js')).declareNbd,
  bench: async () => (await import('./commands/bench.js')).declareBench,
  worker: async () => (await import('./commands/worker.js')).declareWorker,
  shims: async () => (await import('./commands/shims.js')).declareShims,
  completion: async () => (await import('./commands/completion.js')).declareCompletion,
}

/** The commands that are tools of their own in QEMU: a program of such a name is that command. */
const TOOLS: Readonly<Record<string, string>> = { 'qemu-io': 'io', 'qemu-nbd': 'nbd' }

/** What declaring the commands needs of a session; the rest is for running one. */
type Declaring = Pick<Session, 'program' | 'stdout' | 'objects'>

/** The whole program, or what it is with one command only. */
export async function buildProgram(session: Declaring, run: Runner, only?: string): Promise<Command> {
  const printVersion = (): never => {
    session.stdout.write(`${session.program} version ${packageVersion()}\n`)
    throw new CommanderError(0, 'commander.version', 'the version was printed')
  }
  const program = new Command(session.program)
    .description(`Create, convert, change, check and inspect ${TARGETS} disk images, with the grammar of qemu-img.`)
    .usage('COMMAND [options] ...')
    .option('-V, --version', 'print the version')
    .on('option:version', printVersion)
    .helpOption('-h, --help', 'print this help')
    .helpCommand(false)
    .configureHelp({ subcommandTerm: command => command.name() })
    .addHelpText('after', `${VALUES}\n\nRun ${session.program} COMMAND --help for the options of a command.`)
    .showSuggestionAfterError(false)
    .exitOverride()
    .configureOutput({
      writeOut: text => session.stdout.write(text),
      // Errors are thrown too, and worded in one place.
      writeErr: () => undefined,
    })
  for (const [name, load] of Object.entries(COMMANDS)) {
    if (only !== undefined && name !== only) continue
    const declare = await load()
    declare(program, run, () => buildProgram(session, run))
  }
  for (const command of program.commands) {
    // Of a tool it is the program's later.
    const name = command.name()
    command.on('option:version', printVersion)
    command.addHelpText('after', () => examplesOf(name, session.program))
    command.on('option:object', (definition: string) => session.objects.add(definition))
    command.hook('preAction', () => describeImages(command, name, session))
  }
  return program
}

/** Two command lines that do something. */
function examplesOf(command: string, program: string): string {
  // The program is the command itself, where it is one of these.
  const spoken = (example: string): string => (TOOLS[program] === command ? example.slice(command.length + 1) : example)
  return ['', 'Examples:', ...(EXAMPLES[command] ?? []).map(example => `  ${program} ${spoken(example)}`)].join('\n')
}

/** How many of a command's arguments are images that exist, from the first one on, where that is not one. */
const IMAGES: Readonly<Record<string, (count: number, options: Readonly<Record<string, unknown>>) => number>> = {
  // A target that is written into as it is exists, too.
  convert: (count, { create }) => (create === false ? count : count - 1),
  compare: () => 2,
  create: () => 0,
  worker: () => 0,
  shims: () => 0,
  completion: () => 0,
  // It has more options than those of images.
  io: () => 0,
}

/** Commands that write to the image that they are given. */
const WRITES: Readonly<Record<string, (options: Readonly<Record<string, unknown>>) => boolean>> = {
  amend: () => true,
  bitmap: () => true,
  check: ({ repair }) => repair !== undefined,
  commit: () => true,
  compact: ({ dryRun }) => dryRun !== true,
  rebase: () => true,
  resize: () => true,
  snapshot: ({ create, apply, delete: remove }) => (create ?? apply ?? remove) !== undefined,
}

/**
 * With `--image-opts` the arguments are descriptions, and one that begins with `json:` always is; what runs sees the names of the
 * images.
 */
function describeImages(command: Command, name: string, { objects }: Declaring): void {
  const options = command.opts<Record<string, unknown>>()
  const { imageOpts, format, sourceFormat, targetImageOpts } = options
  if (imageOpts === true && (format !== undefined || sourceFormat !== undefined)) {
    throw new CommandFailure('--image-opts and --format are mutually exclusive')
  }
  const files: unknown = command.processedArgs[0]
  if (!Array.isArray(files)) return
  const members = Array.isArray(options['member']) ? options['member'].map(String) : []
  const all = files.map(String)
  let images = 0
  const known = (argument: string, described: boolean): string =>
    described || isDescription(argument) ? objects.describe(argument) : argument
  const named = (argument: string, described: boolean): string => {
    const member = members[images]
    images += 1
    const image = known(argument, described)
    if (member === undefined || member === '') return image
    if (image === argument) return objects.choose(image, member, all)
    objects.chooseOf(image, member)
    return image
  }
  if (name === 'dd') {
    const input = files.findIndex(operand => String(operand).startsWith('if='))
    if (input >= 0) files[input] = `if=${named(String(files[input]).slice('if='.length), imageOpts === true)}`
    refuseMembers(members, images)
    if (input >= 0) putParents(String(files[input]).slice('if='.length), options, objects)
    return
  }
  const count = IMAGES[name]?.(files.length, options) ?? 1
  const last = files.length - 1
  for (const [index, file] of files.slice(0, count).entries()) {
    const isTarget = name === 'convert' && index === last
    const described = isTarget ? targetImageOpts === true : imageOpts === true
    if (isTarget && described && command.getOptionValueSource('targetFormat') === 'cli') {
      throw new CommandFailure('--image-opts and --format are mutually exclusive')
    }
    // A target is an image by itself.
    files[index] = (isTarget ? known : named)(String(file), described)
  }
  refuseMembers(members, images)
  const [top] = files
  if (count > 0 && typeof top === 'string') putParents(top, options, objects)
  if (typeof options['sourceFile'] === 'string')
    command.setOptionValue('sourceFile', named(options['sourceFile'], false))
  const [first] = files
  if (typeof first === 'string' && WRITES[name]?.(options)) objects.refuseReadOnly(first)
}

/** Takes what `--parent` says of the first image. */
function putParents(
  filename: string,
  { parent }: Readonly<Record<string, unknown>>,
  objects: Declaring['objects'],
): void {
  if (Array.isArray(parent)) objects.putBelow(filename, parent.map(String))
}

/** Refuses disks that are chosen of nothing. */
function refuseMembers({ length }: readonly string[], images: number): void {
  if (length <= images) return
  throw new CommandFailure(
    `--member is given ${length} times, and there ${images === 1 ? 'is one image' : `are ${images} images`}`,
  )
}

/** Read when asked for, by the package's own name: from the bundle and from its modules alike. */
function packageVersion(): string {
  const manifest = require('qcow2/package.json') as { version: string }
  return manifest.version
}

/** Understands a command line and runs it. Resolves to the exit code; rejects with what `main` is to report. */
export async function runProgram(given: readonly string[], session: Session): Promise<number> {
  let exitCode = 0
  const own = Object.hasOwn(TOOLS, session.program) ? TOOLS[session.program] : undefined
  const args = own === undefined ? given : [own, ...given]
  const [first] = args
  const command = first !== undefined && Object.hasOwn(COMMANDS, first) ? first : undefined
  const run: Runner = async work => {
    exitCode = await work(session)
  }
  const program = await buildProgram(session, run, command)
  const hint = (command?: string) =>
    `Try '${[session.program, command].filter(Boolean).join(' ')} --help' for more information`
  if (first === undefined) throw new CommandFailure('Not enough arguments', { hint: hint() })
  const chosen = command === undefined ? undefined : program.commands[0]
  // The command that a tool is has no name beside the program's.
  const spoken = own === undefined ? command : undefined
  if (own !== undefined && chosen !== undefined) {
    chosen.name(session.program)
    chosen.parent = null
  }
  if (command === undefined && !first.startsWith('-')) throw unknownCommand(first, hint())
  try {
    if (chosen === undefined) await program.parseAsync(arrange([...args], program), { from: 'user' })
    else {
      const rest = arrange(args.slice(1), chosen, command === 'resize' ? isRelativeSize : undefined)
      if (own === undefined) await program.parseAsync([chosen.name(), ...rest], { from: 'user' })
      else await chosen.parseAsync(rest, { from: 'user' })
    }
  } catch (error) {
    if (error instanceof CommanderError && error.exitCode === 0) return 0
    if (error instanceof CommanderError) throw new CommandFailure(usageMessage(error), { hint: hint(spoken) })
    if (error instanceof UsageFailure) throw usage(error, hint(spoken), spoken)
    throw error
  }
  return exitCode
}

function unknownCommand(name: string, hint: string): CommandFailure {
  return new CommandFailure(`Command not found: ${name}`, { hint })
}

const usage = (error: UsageFailure, hint: string, command: string | undefined): CommandFailure =>
  new CommandFailure(error.message, {
    hint,
    ...(error instanceof OptionFailure && command !== undefined && { command }),
    cause: error,
  })

/** What is left for commander to find: values that are none of an option's choices. */
const usageMessage = (error: CommanderError): string => error.message.replace(/^error: /, '')
