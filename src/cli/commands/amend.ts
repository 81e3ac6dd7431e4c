import type { Command } from 'commander'
import { can, isFormat, isKnown } from '../../formats/table.js'
import { type AmendOptions, amend, type Format, Qcow2Error } from '../../index.js'
import { toName } from '../../text.js'
import { isCreateOption, qcow2Options, toRefcountBits, toVersion } from '../create-options.js'
import { describeError, failedOpening, openFailure, openHint } from '../errors.js'
import { CommandFailure, UsageFailure, unsupported } from '../failure.js'
import { cacheMode, formatsThat, oneFile, takeDriverSyntax } from '../grammar.js'
import { formatOf, lockingOf, type Request, withImage } from '../images.js'
import { type KeyChange, type KeyPrefix, keyOptions, toKeyChange } from '../key-options.js'
import {
  asksForHelp,
  joinOptionLists,
  type OptionSpec,
  type OptionValues,
  optionHelp,
  parseOptionList,
} from '../options.js'
import type { Runner } from '../program.js'
import { withProgress } from '../progress.js'
import type { Session } from '../session.js'
import { toSize } from '../size.js'
import { writtenSource } from '../sources.js'

interface AmendArguments {
  readonly format?: string
  readonly options?: string
  readonly shrink?: boolean
  readonly force?: boolean
  readonly progress?: boolean
  readonly quiet?: boolean
}

/** The options of a format. One that can nothing else has its key slots amended. */
const optionsOf = (format: Format): readonly OptionSpec[] => [
  ...(can(format, 'amend') ? OPTIONS : []),
  ...keyOptions(prefixOf(format)),
]

const prefixOf = (format: Format): KeyPrefix => (can(format, 'amend') ? 'encrypt.' : '')

const OPTIONS = qcow2Options(
  'backing_file',
  'backing_fmt',
  'compat',
  'data_file',
  'data_file_raw',
  'lazy_refcounts',
  'refcount_bits',
  'size',
)

export function declareAmend(program: Command, run: Runner): void {
  const command = program
    .command('amend')
    .summary('change the options of an image')
    .description('Change the options of an existing qcow2 image. The contents of the disk stay as they are.')
    .usage('[options] -o OPTIONS FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', `format of the image: ${formatsThat('amend')} (default: what it looks like)`)
    .option(
      '-o, --options <list>',
      'options as name=value,name=value; help lists them',
      (list: string, previous: string | undefined) => joinOptionLists(previous, list),
    )
    .option('--shrink', 'allow a smaller size: what lies behind it is lost')
    .option('-p, --progress', 'show progress')
    .option('-q, --quiet', 'print nothing but errors')
    .option('-t, --cache <mode>', 'cache mode, as qemu-img takes it', cacheMode('cache'))
    .option('--force', 'overwrite key slots in use, and erase the last one, without which an image cannot be read')
  takeDriverSyntax(command)
  command.action((files: string[], options: AmendArguments) => run(session => amendFile(files, options, session)))
}

async function amendFile(files: readonly string[], options: AmendArguments, session: Session): Promise<number> {
  const { options: list, progress = false, quiet = false } = options
  if (list === undefined) throw new UsageFailure('Must specify options (-o)')
  if (asksForHelp(list) && options.format !== undefined) return showOptions(options.format, session)
  if (asksForHelp(list) && files.length !== 1) throw new CommandFailure('Expecting one image file name')
  const filename = oneFile(files)
  const format = await formatOf(filename, options.format, session).catch(error => {
    throw session.signal.aborted ? error : openFailure(filename, error)
  })
  if (asksForHelp(list)) return showOptions(format, session)
  if (!isAmended(format)) throw cannotAmend(format)
  const values = parse(list, optionsOf(format))
  const changes = toAmendOptions(values)
  const { objects } = session
  const keys = toKeyChange(
    values,
    prefixOf(format),
    objects,
    objects.secretOfLayer(filename, 0),
    options.force ?? false,
  )
  const choice = { progress: progress && !quiet, quiet, verb: 'Amending', step: 1 }
  await withProgress(session, choice, async job => {
    if (keys === undefined || Object.keys(changes).length > 0) {
      await amend(writtenSource(filename, session), {
        ...job,
        ...lockingOf(filename, session),
        ...changes,
        shrink: options.shrink,
        references: session.objects.references,
      })
    }
    if (keys !== undefined) await amendKeys({ filename, format, flags: 'r+' }, session, keys)
  }).catch(error => {
    throw session.signal.aborted ? error : worded(filename, error)
  })
  return 0
}

/** Of a format by its name, or of the image's. */
function showOptions(format: string, { stdout }: Session): number {
  if (!isKnown(format)) throw new CommandFailure(`Unknown file format '${format}'`)
  if (!isFormat(format) || !isAmended(format)) throw cannotAmend(format)
  stdout.write(`Amend options for '${format}':\n${optionHelp(optionsOf(format))}`)
  return 0
}

const isAmended = (format: Format): boolean => can(format, 'amend') || can(format, 'keys')

const cannotAmend = (format: string): CommandFailure =>
  new CommandFailure(`Format driver '${format}' does not support option amendment`)

const amendKeys = (request: Request, session: Session, change: KeyChange): Promise<void> =>
  withImage(request, session, async image => {
    const { formatSpecific, luks } = await image.info({ bigint: true })
    if (luks === undefined && formatSpecific?.encrypt === undefined) {
      throw new CommandFailure("Can't amend encryption options - encryption not present")
    }
    await change(image, session.signal)
  })

/** Parses the list; an option that exists when an image is made is told apart from one that does not exist. */
function parse(list: string, options: readonly OptionSpec[]): OptionValues {
  try {
    return parseOptionList(list, options)
  } catch (error) {
    const name = /^Invalid parameter '(.*)'$/.exec(error instanceof Error ? error.message : '')?.[1]
    if (name === undefined || !isCreateOption(name)) throw error
    const hint = 'This option is only supported for image creation'
    throw new CommandFailure(`Invalid parameter '${name}'`, { hint, cause: error })
  }
}

function toAmendOptions(values: OptionValues): AmendOptions {
  const options: AmendOptions = {}
  for (const [name, value] of values) {
    switch (name) {
      case 'compat':
        options.version = version(String(value))
        break
      case 'backing_file':
        options.backingFile = toName(String(value))
        break
      case 'backing_fmt':
        options.backingFormat = value as Format
        break
      case 'data_file':
        options.dataFile = toName(String(value))
        break
      case 'data_file_raw':
        options.dataFileRaw = value === true
        break
      case 'lazy_refcounts':
        options.lazyRefcounts = value === true
        break
      case 'refcount_bits':
        options.refcountBits = toRefcountBits(value)
        break
      case 'size':
        if (typeof value === 'bigint') options.size = toSize(value)
        break
      default:
        // Those of key slots are for others to read.
        if (OPTIONS.some(option => option.name === name)) throw unsupported(`Option '${name}'`, 'it cannot be amended')
    }
  }
  return options
}

function version(compat: string): 2 | 3 {
  const found = toVersion(compat)
  if (found === undefined) throw new CommandFailure(`Unknown compatibility level ${compat}`)
  return found
}

/** Of a header that makes no sense, or asks for what is not known here. */
const UNREADABLE: ReadonlySet<string> = new Set(['ERR_QCOW2_INVALID_HEADER', 'ERR_QCOW2_UNSUPPORTED_FEATURE'])

/** A refusal in qemu-img's words, where options have its names; anything else as for every command. */
function worded(filename: string, error: unknown): CommandFailure {
  if (!(error instanceof Qcow2Error) || failedOpening(error)) return openFailure(filename, error)
  if (UNREADABLE.has(error.code) || openHint(filename, error) !== undefined) return openFailure(filename, error)
  if (error.code !== 'ERR_QCOW2_INVALID_ARGUMENT') {
    const message = describeError(error).replace('say shrink: true if that is meant', 'use --shrink if that is meant')
    return new CommandFailure(message, { cause: error })
  }
  const message = describeError(error)
    .replace(` (${error.code})`, '')
    .replace(` (field ${error.field})`, '')
    .replace('refcountBits=', 'refcount_bits=')
  const hint = error.field === 'backingFile' ? "You can use 'qemu-img rebase' instead." : undefined
  return new CommandFailure(message, { cause: error, ...(hint !== undefined && { hint }) })
}
