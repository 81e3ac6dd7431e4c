import { type Command, Option } from 'commander'
import {
  can,
  isCompressed,
  isFormat,
  listed,
  PLAIN_FORMAT,
  SOURCE_FORMATS,
  STREAM_FORMATS,
} from '../../formats/table.js'
import {
  type Compression,
  type ConvertOptions,
  type ConvertResult,
  convert,
  type Format,
  inspect,
  Qcow2Error,
  type Qcow2SpecificInfo,
  type Qcow2StreamOptions,
  type Secrets,
  type SourceFormat,
  type TargetFormat,
} from '../../index.js'
import { exactText } from '../../text.js'
import {
  creatable,
  describeFormat,
  optionSpecs,
  targetFormat,
  toCreateOptions,
  warnOfFileHints,
} from '../create-options.js'
import { describeError, openFailure, pathOf } from '../errors.js'
import { CommandFailure, unsupported } from '../failure.js'
import { imagePath } from '../filename.js'
import {
  alias,
  cacheMode,
  optionList,
  rateLimit,
  TARGETS,
  takeDriverSyntax,
  takeMember,
  takeParent,
  wholeNumber,
} from '../grammar.js'
import { formatOf, snapshotOf, sourceFormatOf, unlockFailure, withImage } from '../images.js'
import { asksForHelp, type OptionValue, type OptionValues, parseOptionList } from '../options.js'
import type { Runner } from '../program.js'
import { withProgress } from '../progress.js'
import type { Session } from '../session.js'
import { sizeArgument } from '../size.js'
import { imageSource, placeOf, sourceOf, targetSource } from '../sources.js'
import { convertInput, isInput, refuseOutOfOrder } from './convert-input.js'
import { STANDARD_OUTPUT, streamedFormat, writeImage } from './convert-stream.js'
import { addBacking, fromImage } from './create.js'

interface ConvertArguments {
  readonly sourceFormat?: string
  readonly targetFormat: string
  readonly targetImageOpts?: boolean
  readonly targetOptions?: string
  readonly sourceSnapshot?: string
  readonly compress?: boolean
  readonly level?: number
  readonly window?: Compression['window']
  readonly backing?: string
  readonly backingFormat?: string
  /** `-n`: commander turns `--no-create` into this. */
  readonly create: boolean
  readonly targetIsZero?: boolean
  readonly sparseSize?: number
  readonly parallel?: number
  readonly copyRangeOffloading?: boolean
  readonly salvage?: boolean
  readonly rate?: number | bigint
  readonly forceShare?: boolean
  readonly bitmaps?: boolean
  readonly skipBrokenBitmaps?: boolean
  readonly targetCache: string
  readonly progress?: boolean
  readonly quiet?: boolean
}

export function declareConvert(program: Command, run: Runner): void {
  const command = program
    .command('convert')
    .summary('copy an image into another, of any format')
    .description(
      'Copy a disk image into a new file of a format of your choice. An existing file is replaced. The TARGET - is standard output.',
    )
    .usage('[options] FILENAME... TARGET')
    .argument('[files...]', 'the image to read (several become one disk; - is standard input) and the file to write')
    .option('-f, --source-format <fmt>', `format of FILENAME: ${READ} (default: what it looks like)`)
    .option('-O, --target-format <fmt>', `format of TARGET: ${TARGETS}`, PLAIN_FORMAT)
    .option('-o, --target-options <list>', 'options of that format: name=value,... ("-o help" lists them)', optionList)
    .option('-c, --compress', 'compress (qcow2 only)')
    .option('--level <n>', 'how hard to compress: zlib 1 to 12, zstd 1 to 22', wholeNumber('compression level', 1, 22))
    .addOption(
      new Option('--window <size>', 'how far back zlib may refer: small for readers that stream').choices([
        'full',
        'small',
      ]),
    )
    .option('-l, --source-snapshot <snapshot>', 'read this internal snapshot')
    .option('-B, --backing <file>', "backing file of TARGET: what is in it and in FILENAME's chain is not written")
    .option('-F, --backing-format <fmt>', 'format of the backing file')
    .option('-n, --no-create', 'write into TARGET as it exists')
    .option('--target-is-zero', 'with -n: TARGET reads as zeroes everywhere')
    .option(
      '-S, --sparse-size <size>',
      'zeroes of this length become a hole; 0 stores everything (default: 4k)',
      sparseSize,
    )
    .option(
      '-m, --parallel <n>',
      'worker threads (default: one per core, 8 at most)',
      wholeNumber('number of coroutines', 1, 16),
    )
    .option('--concurrency <n>', 'the same as -m', wholeNumber('number of threads', 1, 64))
    .option('-W, --oob-writes', 'as qemu-img takes it: the threads never wait for each other anyway')
    .option('-C, --copy-range-offloading', 'as qemu-img takes it: the kernel copies wherever it can anyway')
    .option(
      '-t, --target-cache <mode>',
      'cache mode of TARGET: all but "unsafe" make it durable',
      cacheMode('cache'),
      'unsafe',
    )
    .option(
      '-T, --source-cache <mode>',
      'cache mode, as qemu-img takes it: FILENAME is read through the page cache',
      cacheMode('source cache'),
    )
    .option('--bitmaps', 'copy the persistent bitmaps, too (qcow2 only)')
    .option('--skip-broken-bitmaps', 'with --bitmaps: leave inconsistent ones out')
    .option('-U, --force-share', 'open an image that another process uses')
    .option('--salvage', 'go on after read errors: what cannot be read becomes zeroes')
    .option('-r, --rate <rate>', 'bytes per second, at most', rateLimit)
    .option('-p, --progress', 'show the progress, also without a terminal')
    .option('-q, --quiet', 'print nothing but errors')
  alias(command, '--target-options', '--target-format-options')
  alias(command, '--source-snapshot', '--snapshot')
  alias(command, '--backing', '-b')
  alias(command, '--rate', '--rate-limit')
  takeMember(command)
  takeParent(command)
  takeDriverSyntax(command)
  command.option('--target-image-opts', 'with -n: TARGET is described by options, as with --image-opts')
  command.action((files: string[], options: ConvertArguments & { concurrency?: number }) =>
    run(session => convertFiles(files, { ...options, ...threads(options) }, session)),
  )
}

/** What a convert reads: compressed files hold raw disks. */
const READ = listed([...SOURCE_FORMATS, ...STREAM_FORMATS], 'or')

const threads = ({ parallel, concurrency }: { parallel?: number; concurrency?: number }) => {
  const count = concurrency ?? parallel
  return count === undefined ? {} : { parallel: count }
}

const SPARSE_LIMIT = 16 << 20

function sparseSize(text: string): number {
  const size = Number(sizeArgument('buffer size for sparse output', text))
  if (size % 512 === 0 && size <= SPARSE_LIMIT) return size
  throw new CommandFailure(
    'Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to ' +
      `${SPARSE_LIMIT}. Select 0 to disable sparse detection (fully allocates output).`,
  )
}

async function convertFiles(files: readonly string[], given: ConvertArguments, session: Session): Promise<number> {
  refuseContradictions(given)
  const target = files.length > 1 ? files[files.length - 1] : undefined
  if (given.targetOptions !== undefined && asksForHelp(given.targetOptions)) {
    session.stdout.write(describeFormat(creatable(given.targetFormat), target, session))
    return 0
  }
  const sources = files.slice(0, -1)
  if (sources.length === 0 || target === undefined) throw new CommandFailure('Must specify image file name')
  if (target === STANDARD_OUTPUT) return streamNamed(sources, given, session)
  await convertNamed(sources, target, given, session)
  return 0
}

function refuseContradictions(given: ConvertArguments): void {
  if (given.skipBrokenBitmaps && !given.bitmaps) {
    throw new CommandFailure('Use of --skip-broken-bitmaps requires --bitmaps')
  }
  const copyRange = given.copyRangeOffloading ?? false
  if (given.compress && copyRange) throw new CommandFailure('Cannot enable copy offloading when -c is used')
  if (given.sparseSize !== undefined && copyRange) {
    throw new CommandFailure('Cannot enable copy offloading when -S is used')
  }
  if (given.salvage && copyRange) throw new CommandFailure('Cannot use copy offloading in salvaging mode')
  if (!given.create && given.targetOptions !== undefined) {
    throw new CommandFailure('-o has no effect when skipping image creation')
  }
  if (given.targetImageOpts && given.create) throw new CommandFailure('--target-image-opts requires use of -n flag')
  if (given.targetIsZero && given.create) throw new CommandFailure('--target-is-zero requires use of -n flag')
  if (!given.create) refuseWithTarget(given)
  for (const name of ['level', 'window'] as const) {
    if (given[name] !== undefined && !given.compress) throw new CommandFailure(`--${name} requires use of -c flag`)
  }
}

async function convertNamed(
  sources: readonly string[],
  target: string,
  given: ConvertArguments,
  session: Session,
): Promise<void> {
  const { forceShare } = given
  const several = sources.length > 1
  const input = isInput(sources)
  if (input) refuseOutOfOrder(given)
  const { from, size, snapshot } = input ? await lookAtInput(given, session) : await lookAt(sources, given, session)
  const to = await formatOfTarget(target, given, session)
  const parts = given.create ? newTarget(target, to, given, several, session) : existingTarget(to, given)
  if (several && given.bitmaps) throw new CommandFailure('Copying bitmaps only possible with single source')
  if (given.bitmaps && !input) await checkBitmaps(sources[0] ?? target, to, parts, given, session)
  if (!given.create) await checkTarget(target, to, { size, bitmaps: given.bitmaps }, session)
  const options: ConvertOptions = {
    from,
    ...(given.bitmaps && { bitmaps: { skipBroken: given.skipBrokenBitmaps } }),
    to,
    references: session.objects.references,
    secret: secretsOf(sources, target, session),
    ...session.objects.sharingOf(...sources),
    ...(forceShare !== undefined && { forceShare }),
    ...(snapshot !== undefined && { snapshot }),
    // Compressed clusters are whole: but for 0, which stores everything, it is not looked at.
    ...(given.sparseSize !== undefined &&
      (!given.compress || given.sparseSize === 0) && { sparseSize: given.sparseSize }),
    ...(given.parallel !== undefined && { concurrency: given.parallel }),
    ...(given.salvage && { salvage: true }),
    ...(given.rate !== undefined && { rate: given.rate }),
    durable: given.targetCache !== 'unsafe',
    countData: given.progress ?? false,
    ...parts,
  }
  const choice = { progress: given.progress ?? false, quiet: given.quiet ?? false, verb: 'Converting', step: 1 }
  try {
    const converted = await withProgress(session, choice, async job =>
      input
        ? convertInput(target, from[0], { ...options, ...job, bigint: true }, session)
        : convert(await Promise.all(sources.map(name => sourceOf(name, session))), targetSource(target, session), {
            ...options,
            ...job,
            bigint: true,
          }),
    )
    if (!given.quiet) warn(converted, session)
    const hints = given.create ? parseOptionList(given.targetOptions ?? '', optionSpecs(to)) : new Map()
    warnOfFileHints(hints, target, session)
  } catch (error) {
    if (session.signal.aborted || error instanceof CommandFailure) throw error
    throw unlockFailure([...sources, target], error, session) ?? worded(target, to, parts.base, error)
  }
}

/** The image on standard output. */
async function streamNamed(sources: readonly string[], given: ConvertArguments, session: Session): Promise<number> {
  const to = streamedFormat(targetFormat(given.targetFormat), given, session)
  const { from, snapshot } = await lookAt(sources, given, session)
  const { create, preallocation, compress } = newTarget(STANDARD_OUTPUT, to, given, sources.length > 1, session)
  const options: Qcow2StreamOptions = {
    from,
    to,
    references: session.objects.references,
    secret: secretsOf(sources, STANDARD_OUTPUT, session),
    ...session.objects.sharingOf(...sources),
    ...(given.forceShare !== undefined && { forceShare: given.forceShare }),
    ...(snapshot !== undefined && { snapshot }),
    ...(given.parallel !== undefined && { concurrency: given.parallel }),
    ...(compress !== undefined && { compress }),
    create: { ...create, ...(preallocation !== undefined && { preallocation }) },
  }
  const choice = { progress: given.progress ?? false, quiet: given.quiet ?? false, verb: 'Converting', step: 1 }
  try {
    return await writeImage(sources, options, choice, session)
  } catch (error) {
    if (session.signal.aborted || error instanceof CommandFailure) throw error
    throw unlockFailure(sources, error, session) ?? worded(STANDARD_OUTPUT, to, undefined, error)
  }
}

/** What opens the sources, and a target that exists: each has secrets of its own. */
function secretsOf(sources: readonly string[], target: string, { objects }: Session): Secrets | undefined {
  if ([...sources, target].every(each => objects.secretsOf(each) === undefined)) return undefined
  return ({ source, depth }) =>
    objects.secretOfLayer((source === undefined ? target : sources[source]) ?? target, depth)
}

/** The format of the target: of one that is described what its description says, or what it looks like. */
async function formatOfTarget(target: string, given: ConvertArguments, session: Session): Promise<TargetFormat> {
  return targetFormat(given.targetImageOpts ? await formatOf(target, undefined, session) : given.targetFormat)
}

/** What is for new images only in this version. */
function refuseWithTarget(given: ConvertArguments): void {
  const refused = { level: '--level', window: '--window' } as const
  for (const name of ['level', 'window'] as const) {
    if (given[name] !== undefined) throw unsupported(`${refused[name]} together with -n`, 'it is for new images')
  }
}

/** Opens the sources once before anything else: what is wrong with one is said in its name, and before the target's. */
async function lookAt(
  sources: readonly string[],
  { sourceFormat, sourceSnapshot, forceShare, salvage }: ConvertArguments,
  session: Session,
): Promise<{ from: (SourceFormat | undefined)[]; size: number; snapshot: string | Buffer | undefined }> {
  const from: (SourceFormat | undefined)[] = []
  let size = 0
  for (const filename of sources) {
    const format = await sourceFormatOf(filename, sourceFormat, session).catch(error => {
      throw session.signal.aborted ? error : openFailure(filename, error)
    })
    if (!isFormat(format)) {
      // Where nothing was said, what it holds is looked at, too. How large that is, the convert finds out.
      from.push(sourceFormat === undefined ? undefined : format)
      if (sourceSnapshot !== undefined) {
        throw new CommandFailure(`Failed to load snapshot: '${filename}' is ${format}, and has no snapshots`)
      }
      continue
    }
    from.push(format)
    size += await withImage({ filename, format, forceShare, closed: true }, session, async image =>
      Number(image.virtualSizeBigInt),
    ).catch(async error => {
      // An image that is to be salvaged need not open: its header is enough.
      const { virtualSize } = salvage
        ? await inspect(await imageSource(filename, session), { bigint: true })
        : { virtualSize: 0n }
      if (virtualSize === 0n) throw error
      return Number(virtualSize)
    })
  }
  const [filename] = sources
  const [format] = from
  if (sourceSnapshot === undefined || filename === undefined || !isFormat(format)) {
    return { from, size, snapshot: undefined }
  }
  if (sources.length > 1) throw new CommandFailure('No support for concatenating multiple snapshot')
  const snapshot = await snapshotOf(filename, format, sourceSnapshot, forceShare, session)
  const viewed = { filename, format, snapshot, forceShare, closed: true }
  return { from, size: await withImage(viewed, session, async image => Number(image.virtualSizeBigInt)), snapshot }
}

/** Standard input is not looked at before it is read; its format is what it says of itself, unless it is said. */
async function lookAtInput(
  { sourceFormat, sourceSnapshot }: ConvertArguments,
  session: Session,
): ReturnType<typeof lookAt> {
  const from = sourceFormat === undefined ? undefined : await sourceFormatOf('-', sourceFormat, session)
  return { from: [from], size: 0, snapshot: sourceSnapshot }
}

function warn({ skippedBitmaps, skippedBitmapsBytes, unreadable }: ConvertResult<bigint>, session: Session): void {
  for (const [index, text] of (skippedBitmaps ?? []).entries()) {
    const name = exactText(text, skippedBitmapsBytes?.[index])
    session.stderr.write(`${session.program}: warning: Skipping inconsistent bitmap '${name}'\n`)
  }
  for (const { start, length, message } of unreadable ?? []) {
    const where = length > 512 ? `${length} bytes at offset ${start}` : `offset ${start}`
    session.stderr.write(`${session.program}: warning: error while reading ${where}: ${message}\n`)
  }
}

function worded(target: string, to: TargetFormat, base: ConvertOptions['base'], error: unknown): CommandFailure {
  const reason = describeError(error, placeOf(target))
  // QEMU finds that out when it opens the target that it made.
  if (base !== undefined && reason.startsWith('Could not open ') && pathOf(error) === String(base)) {
    return new CommandFailure(`Could not open '${target}': Could not open backing file: ${reason}`, { cause: error })
  }
  const failed = error instanceof Qcow2Error && !reason.startsWith('Could not') ? pathOf(error) : undefined
  if (failed !== undefined && failed !== placeOf(target)) {
    return new CommandFailure(`${failed}: error while reading: ${reason}`, { cause: error })
  }
  return new CommandFailure(`${target}: error while converting ${to}: ${reason}`, { cause: error })
}

/** The target that exists must be there, and large enough. */
async function checkTarget(
  filename: string,
  format: Format,
  { size, bitmaps = false }: { size: number; bitmaps: boolean | undefined },
  session: Session,
): Promise<void> {
  await withImage({ filename, format, flags: 'r+' }, session, async image => {
    if (image.virtualSizeBigInt < size) throw new CommandFailure('output file is smaller than input file')
    if (bitmaps && !hasBitmaps((await image.info({ bigint: true })).formatSpecific)) throw cannotHaveBitmaps(format)
  })
}

/** What qemu-img says before it copies bitmaps. */
async function checkBitmaps(
  source: string,
  to: TargetFormat,
  { create }: Partial<ConvertOptions>,
  { sourceFormat, skipBrokenBitmaps, forceShare }: ConvertArguments,
  session: Session,
): Promise<void> {
  const at = { filename: source, format: sourceFormat, references: 'layer', forceShare, closed: true } as const
  await withImage(at, session, async image => {
    const { formatSpecific } = await image.info({ bigint: true })
    if (!hasBitmaps(formatSpecific)) throw new CommandFailure('Source lacks bitmap support')
    const broken = formatSpecific?.bitmaps?.find(bitmap => bitmap.flags.includes('in-use'))
    if (broken !== undefined && !skipBrokenBitmaps) {
      const hint = `Try --skip-broken-bitmaps, or use '${session.program} bitmap --remove' to delete it`
      const name = exactText(broken.name, broken.nameBytes)
      throw new CommandFailure(`Cannot copy inconsistent bitmap '${name}'`, { hint })
    }
    if (!can(to, 'bitmaps') || (create && 'version' in create && create.version === 2)) throw cannotHaveBitmaps(to)
  })
}

/** Version 2 and raw images have none. */
const hasBitmaps = (specific: Qcow2SpecificInfo | undefined): boolean =>
  specific !== undefined && specific.compat !== '0.10'

const cannotHaveBitmaps = (to: Format): CommandFailure =>
  new CommandFailure(`Format driver '${to}' does not support bitmaps`)

function existingTarget(to: TargetFormat, given: ConvertArguments): Partial<ConvertOptions> {
  if (given.compress && !can(to, 'compress')) throw new CommandFailure('Compression not supported for this file format')
  return {
    existingTarget: true,
    ...(given.backing !== undefined && { base: imagePath(given.backing) }),
    ...(given.compress && { compress: true }),
    ...(given.targetIsZero && { targetIsZero: true }),
  }
}

function newTarget(
  target: string,
  to: TargetFormat,
  given: ConvertArguments,
  several: boolean,
  session: Session,
): Partial<ConvertOptions> {
  const values: Map<string, OptionValue> = parseOptionList(given.targetOptions ?? '', optionSpecs(to))
  addBacking(values, given, to)
  const backing = values.get('backing_file')
  if (several && backing !== undefined) {
    throw new CommandFailure(
      'Having a backing file for the target makes no sense when concatenating multiple input images',
    )
  }
  if (backing !== undefined && !values.has('backing_fmt')) {
    throw new CommandFailure('Use of backing file requires explicit backing format')
  }
  const { preallocation, ...shape } = shapeOf(target, to, values, session)
  if (given.compress && !isCompressed(to)) throw new CommandFailure('Compression not supported for this file format')
  if (given.compress && preallocation !== undefined && preallocation !== 'off') {
    throw new CommandFailure('Compression and preallocation not supported at the same time')
  }
  return {
    overwrite: true,
    create: shape,
    ...(preallocation !== undefined && { preallocation }),
    ...(given.compress && { compress: compressionOf(shape.compressionType, given) }),
    ...(typeof backing === 'string' && { base: imagePath(fromImage(target, backing)) }),
  }
}

function shapeOf(target: string, to: TargetFormat, values: OptionValues, { objects }: Session) {
  try {
    return toCreateOptions(values, to, objects)
  } catch (error) {
    if (!(error instanceof CommandFailure)) throw error
    throw new CommandFailure(`${target}: error while converting ${to}: ${error.message}`, { cause: error })
  }
}

function compressionOf(type: Compression['type'], { level, window }: ConvertArguments): Compression {
  if (level !== undefined && level > ZLIB_LEVELS && type !== 'zstd') {
    const hint = 'zstd, which -o compression_type=zstd chooses, has levels up to 22.'
    const range = `Must be between 1 and ${ZLIB_LEVELS} for zlib.`
    throw new CommandFailure(`Invalid compression level specified: '${level}'. ${range}`, { hint })
  }
  return {
    ...(type !== undefined && { type }),
    ...(level !== undefined && { level }),
    ...(window !== undefined && { window }),
  }
}

const ZLIB_LEVELS = 12
