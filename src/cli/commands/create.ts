import { isAbsolute } from 'node:path'
import type { Command } from 'commander'
import { isFormat, PLAIN_FORMAT, traitsOf } from '../../formats/table.js'
import { type CreateOptions, create, type TargetFormat } from '../../index.js'
import { toName } from '../../text.js'
import {
  creatable,
  describeFormat,
  optionSpecs,
  sizeOption,
  targetFormat,
  toCreateOptions,
  warnOfFileHints,
} from '../create-options.js'
import { describeError } from '../errors.js'
import { CommandFailure, UsageFailure } from '../failure.js'
import { argumentOf, localPath } from '../filename.js'
import { alias, optionList, TARGETS, takeObjects } from '../grammar.js'
import { formatOf, withImage } from '../images.js'
import { asksForHelp, describeOptions, type OptionValue, parseOptionList } from '../options.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'
import { checkDiskSize } from '../shape-rules.js'
import { sizeArgument } from '../size.js'

interface CreateArguments {
  readonly format: string
  readonly options?: string
  readonly backing?: string
  readonly backingFormat?: string
  readonly backingUnsafe?: boolean
  readonly quiet?: boolean
}

export function declareCreate(program: Command, run: Runner): void {
  const command = program
    .command('create')
    .summary('create an image')
    .description('Create a new disk image. An existing file is replaced.')
    .usage('[options] FILENAME [SIZE]')
    .argument('[files...]', 'the image, and its size with an optional suffix k, M, G, T, P or E')
    .option('-f, --format <fmt>', `format of the new image: ${TARGETS}`, PLAIN_FORMAT)
    .option('-o, --options <list>', 'options of the format: name=value,... ("-o help" lists them)', optionList)
    .option('-b, --backing <file>', 'read what is not written from this image')
    .option('-F, --backing-format <fmt>', 'format of the backing file')
    .option('-u, --backing-unsafe', 'do not open the backing file')
    .option('-q, --quiet', 'print nothing but errors')
  alias(command, '--backing-format', '-B')
  takeObjects(command)
  command.action((files: string[], options: CreateArguments) => run(session => createImage(files, options, session)))
}

async function createImage(files: readonly string[], given: CreateArguments, session: Session): Promise<number> {
  const [filename, sizeText, excess] = files
  if (given.options !== undefined && asksForHelp(given.options)) {
    session.stdout.write(describeFormat(creatable(given.format), filename, session))
    return 0
  }
  if (filename === undefined) throw new UsageFailure('Expecting image file name')
  const size = sizeText === undefined ? undefined : sizeArgument('image size', sizeText)
  if (excess !== undefined) throw new UsageFailure(`Unexpected argument: ${excess}`)
  try {
    await createNamed(localPath(filename), filename, size, given, session)
  } catch (error) {
    if (session.signal.aborted) throw error
    throw new CommandFailure(
      `${filename}: ${error instanceof CommandFailure ? error.message : describeError(error, localPath(filename))}`,
      {
        cause: error,
        ...(error instanceof CommandFailure && error.hint !== undefined && { hint: error.hint }),
      },
    )
  }
  return 0
}

async function createNamed(
  path: string,
  filename: string,
  sizeGiven: bigint | undefined,
  given: CreateArguments,
  session: Session,
): Promise<void> {
  const format = targetFormat(given.format)
  const specs = optionSpecs(format)
  const values = parseOptionList(given.options ?? '', specs)
  addBacking(values, given, format)
  if (sizeGiven !== undefined) {
    if (values.has('size')) throw new CommandFailure('The image size must be specified only once')
    values.set('size', sizeGiven)
  }
  await completeBacking(values, filename, given.backingUnsafe ?? false, session)
  const size = sizeOption(values)
  if (size === undefined) throw new CommandFailure('Image creation needs a size parameter')

  if (!given.quiet) {
    session.stdout.write(`Formatting '${filename}', fmt=${format} ${describeOptions(values, specs)}\n`)
    session.stdout.flush()
  }
  const shape = toCreateOptions(values, format, session.objects)
  // A guest's disk has whole sectors.
  const sectors = wholeSectors(size)
  checkDiskSize(format, shape, sectors)
  // Which of them the format has, its table of options said.
  const image = await create(toName(path), {
    format,
    ...shape,
    size: sectors,
    // A backing file that was to be looked at has been: see above. What is below it must not be the new image, either.
    references: given.backingUnsafe ? 'layer' : session.objects.references,
    overwrite: true,
    signal: session.signal,
  } as CreateOptions)
  await image.close()
  warnOfFileHints(values, filename, session)
}

/** The next multiple of 512 bytes. */
export const wholeSectors = (size: number | bigint): bigint => ((BigInt(size) + 511n) / 512n) * 512n

/** `-b` and `-F` are short for options of `-o`, and stronger. */
export function addBacking(
  values: Map<string, OptionValue>,
  { backing, backingFormat }: Pick<CreateArguments, 'backing' | 'backingFormat'>,
  format: TargetFormat,
): void {
  const takesBacking = traitsOf(format).backingFile
  if (backing !== undefined) {
    if (!takesBacking) throw new CommandFailure(`Backing file not supported for file format '${format}'`)
    values.set('backing_file', backing)
  }
  if (backingFormat !== undefined) {
    if (!takesBacking) throw new CommandFailure(`Backing file format not supported for file format '${format}'`)
    values.set('backing_fmt', backingFormat)
  }
}

/** The backing file must be named with its format, be there, and give its size to a disk that has none of its own. */
async function completeBacking(
  values: Map<string, OptionValue>,
  filename: string,
  unchecked: boolean,
  session: Session,
): Promise<void> {
  const backing = values.get('backing_file')
  if (typeof backing !== 'string') return
  if (backing === '') throw new CommandFailure('Expected backing file name, got empty string')
  if (backing === filename) {
    throw new CommandFailure('Error: Trying to create an image with the same filename as the backing file')
  }
  const named = values.get('backing_fmt')
  const format = typeof named === 'string' ? named : undefined
  if (format !== undefined && !isFormat(format)) {
    throw new CommandFailure(`Unknown backing file format '${format}'`)
  }
  if (unchecked && format !== undefined) return

  const path = fromImage(filename, backing)
  if (format === undefined) {
    throw await formatMissing(path, unchecked, session)
  }
  const request = { filename: path, format }
  const size = await withImage(request, session, async image => image.virtualSizeBigInt).catch(error => {
    if (!(error instanceof CommandFailure)) throw error
    const reason = describeError(error.cause)
    const message = /^Could not open |^Image is not in /.test(reason) ? reason : error.message
    throw new CommandFailure(message, { hint: 'Could not open backing image.', cause: error })
  })
  if (!values.has('size')) values.set('size', size)
}

/** What is wrong first: the file is not there, or its format was not given; which it has can be said then. */
async function formatMissing(path: string, unchecked: boolean, session: Session): Promise<CommandFailure> {
  const message = 'Backing file specified without backing format'
  if (unchecked) return new CommandFailure(message)
  try {
    return new CommandFailure(message, { hint: `Detected format of ${await formatOf(path, undefined, session)}.` })
  } catch (error) {
    if (session.signal.aborted) throw error
    const reason = error instanceof CommandFailure ? error.message : describeError(error)
    return new CommandFailure(reason, { hint: 'Could not open backing image.', cause: error })
  }
}

/** A backing file by an argument of its own: its name is relative to the image that names it, unless it says `file:`. */
export function fromImage(filename: string, backing: string): string {
  const path = localPath(backing)
  if (isAbsolute(path) || path !== backing) return argumentOf(path)
  const image = localPath(filename)
  return argumentOf(image.slice(0, image.lastIndexOf('/') + 1) + path)
}
