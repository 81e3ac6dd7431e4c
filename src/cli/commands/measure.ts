import type { Command } from 'commander'
import { PLAIN_FORMAT } from '../../formats/table.js'
import { type LongRunning, type MeasureResult, measure, type TargetFormat } from '../../index.js'
import { optionSpecs, targetFormat, toCreateOptions } from '../create-options.js'
import { describeError, openFailure } from '../errors.js'
import { CommandFailure, UsageFailure } from '../failure.js'
import { formatMeasure, measureJson } from '../format/measure.js'
import {
  alias,
  optionList,
  outputOption,
  SOURCES,
  TARGETS,
  takeDriverSyntax,
  takeMember,
  takeParent,
} from '../grammar.js'
import { formatOf, snapshotOf } from '../images.js'
import { parseOptionList } from '../options.js'
import type { Runner } from '../program.js'
import { withProgress } from '../progress.js'
import type { Session } from '../session.js'
import { sizeArgument, toSize } from '../size.js'
import { sourceOf } from '../sources.js'

interface MeasureArguments {
  readonly format?: string
  readonly targetFormat: string
  readonly options?: string
  readonly size?: bigint
  readonly snapshot?: string
  readonly forceShare?: boolean
  readonly output?: string
}

export function declareMeasure(program: Command, run: Runner): void {
  const command = program
    .command('measure')
    .summary('tell how large an image will be')
    .description('Tell the size of the file that an image, or a new disk of a size, needs in a format.')
    .usage('[options] (--size SIZE | FILENAME)')
    .argument('[files...]', 'the image to be converted')
    .option('-O, --target-format <fmt>', `format of the planned image: ${TARGETS}`, PLAIN_FORMAT)
    .option('-o, --options <list>', 'options of that format: name=value,...', optionList)
    .option('-s, --size <size>', 'a new disk of this size', text => sizeArgument('image size', text))
    .option('-f, --format <fmt>', `format of FILENAME: ${SOURCES} (default: what it looks like)`)
    .option('-l, --snapshot <snapshot>', 'measure this internal snapshot of FILENAME')
    .option('-U, --force-share', 'open an image that another process uses')
    .addOption(outputOption('human', 'json'))
  alias(command, '--options', '--target-format-options')
  alias(command, '--format', '--source-format')
  takeMember(command)
  takeParent(command)
  takeDriverSyntax(command)
  command.action((files: string[], options: MeasureArguments) => run(session => show(files, options, session)))
}

async function show(files: readonly string[], options: MeasureArguments, session: Session): Promise<number> {
  const result = await measured(argumentFor(files, options), options, session)
  session.stdout.write(options.output === 'json' ? measureJson(result) : formatMeasure(result))
  return 0
}

function argumentFor(files: readonly string[], { size, format, snapshot }: MeasureArguments): string | bigint {
  const [filename, excess] = files
  if (excess !== undefined) throw new UsageFailure('At most one filename argument is allowed.')
  if (filename === undefined && (format !== undefined || snapshot !== undefined)) {
    throw new CommandFailure('--image-opts, -f, and -l require a filename argument.')
  }
  if (filename !== undefined && size !== undefined) {
    throw new CommandFailure('--size N cannot be used together with a filename.')
  }
  const source = filename ?? size
  if (source === undefined) throw new CommandFailure('Either --size N or one filename must be specified.')
  return source
}

const measured = (
  source: string | bigint,
  options: MeasureArguments,
  session: Session,
): Promise<MeasureResult<bigint>> =>
  withProgress(session, { progress: false, quiet: true, verb: 'Measuring', step: 1 }, job =>
    measureWith(source, options, session, job),
  )

async function measureWith(
  source: string | bigint,
  options: MeasureArguments,
  session: Session,
  job: LongRunning,
): Promise<MeasureResult<bigint>> {
  const target = targetFormat(options.targetFormat)
  const { preallocation, ...shape } = toCreateOptions(parseShape(options, target), target, session.objects)
  // Nothing is opened by the name of the backing file, so its format does not matter.
  const { backingFile, backingFormat = backingFile === undefined ? undefined : PLAIN_FORMAT } = shape
  const create = { ...shape, backingFormat }
  const plan = { to: target, create, preallocation, bigint: true, ...job } as const
  if (typeof source === 'bigint') {
    return measure({ size: toSize(source) }, plan).catch(error => {
      throw session.signal.aborted ? error : new CommandFailure(describeError(error), { cause: error })
    })
  }
  try {
    const from = await formatOf(source, options.format, session)
    const snapshot = await snapshotOf(source, from, options.snapshot, options.forceShare, session)
    return await measure(await sourceOf(source, session), {
      ...plan,
      from,
      snapshot,
      references: session.objects.references,
      secret: session.objects.secretsOf(source),
      ...session.objects.sharingOf(source),
      ...(options.forceShare !== undefined && { forceShare: options.forceShare }),
    })
  } catch (error) {
    throw session.signal.aborted ? error : openFailure(source, error)
  }
}

function parseShape({ options }: MeasureArguments, target: TargetFormat) {
  try {
    const values = parseOptionList(options ?? '', optionSpecs(target))
    // Whose bytes the data file has does not matter to the size of the image.
    values.delete('keep_data_file')
    return values
  } catch (error) {
    if (!(error instanceof CommandFailure)) throw error
    throw new CommandFailure(`${error.message}\nInvalid options for file format '${target}'`, { cause: error })
  }
}
