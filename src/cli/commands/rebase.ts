import type { Command } from 'commander'
import { can, isKnown } from '../../formats/table.js'
import { type CacheMode, Qcow2Error, rebase } from '../../index.js'
import { toName } from '../../text.js'
import { describeError, openFailure, openHint, pathOf } from '../errors.js'
import { CommandFailure, UsageFailure } from '../failure.js'
import { alias, cacheMode, formatsThat, oneFile, takeDriverSyntax, toCacheMode } from '../grammar.js'
import { formatOf, lockingOf, unlockFailure, withImage } from '../images.js'
import type { Runner } from '../program.js'
import { withProgress } from '../progress.js'
import type { Session } from '../session.js'
import { placeOf, writtenSource } from '../sources.js'

/** Names that QEMU has for what a backing file can be, beside formats. */
const PROTOCOLS: ReadonlySet<string> = new Set(
  'file ftp ftps host_cdrom host_device http https nbd nvme rbd ssh vvfat'.split(' '),
)

interface RebaseArguments {
  readonly format?: string
  readonly backing?: string
  readonly backingFormat?: string
  readonly unsafe?: boolean
  readonly compress?: boolean
  readonly cache: string
  readonly progress?: boolean
  readonly quiet?: boolean
}

export function declareRebase(program: Command, run: Runner): void {
  const command = program
    .command('rebase')
    .summary('change the backing file of an image')
    .description(
      'Give an image another backing file (-b), or none (-b ""). What the two differ in is copied into the image first, so that ' +
        'its disk stays as it is; -u only changes the name.',
    )
    .usage('[options] -b BACKING -F FMT FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', `format of the image: ${formatsThat('rebase')} (default: what it looks like)`)
    .option('-b, --backing <file>', 'the new backing file, by the name that the image is to store; "" for none')
    .option('-F, --backing-format <fmt>', 'format of the new backing file')
    .option('-u, --unsafe', 'change the name only: for a backing file that was moved')
    .option('-c, --compress', 'compress what is copied')
    .option('-t, --cache <mode>', 'cache mode of the image', cacheMode('cache'), 'writeback')
    .option(
      '-T, --source-cache <mode>',
      'cache mode, as qemu-img takes it: backing files are read through the page cache',
      cacheMode('source cache'),
    )
    .option('-U, --force-share', 'as qemu-img takes it: backing files are shared with other readers anyway')
    .option('-p, --progress', 'show the progress, also without a terminal')
    .option('-q, --quiet', 'print nothing but errors')
  alias(command, '--backing-format', '-B')
  alias(command, '--source-cache', '--backing-cache')
  alias(command, '--unsafe', '--backing-unsafe')
  takeDriverSyntax(command)
  command.action((files: string[], options: RebaseArguments) => run(session => rebaseFile(files, options, session)))
}

async function rebaseFile(files: readonly string[], options: RebaseArguments, session: Session): Promise<number> {
  if (files.length !== 1) throw new UsageFailure('Expecting one image file name')
  const { backing, unsafe = false, compress = false, quiet = false } = options
  if (!unsafe && backing === undefined) {
    throw new UsageFailure('Must specify backing file (-b) or use unsafe mode (-u)')
  }
  const filename = oneFile(files)
  const references = unsafe ? 'layer' : session.objects.references
  // Opened once before anything else: what is wrong with the image is said in its name.
  await withImage({ filename, format: options.format, references, closed: true }, session, async () => undefined)
  const from = await formatOf(filename, options.format, session)
  if (compress && !can(from, 'compress')) throw new CommandFailure('Compression not supported for this file format')
  const backingFormat = toFormat(options.backingFormat)
  const next = backing === undefined || backing === '' ? null : backing
  if (!can(from, 'rebase')) throw changeFailure(next, 'Operation not supported')
  if (next !== null && backingFormat === undefined) throw changeFailure(next, 'backing format must be specified')
  const choice = { progress: options.progress ?? false, quiet, verb: 'Rebasing', step: 2 }
  const cache: CacheMode = toCacheMode(options.cache)
  await withProgress(session, choice, job =>
    rebase(writtenSource(filename, session), next === null ? null : toName(next), {
      ...job,
      ...lockingOf(filename, session),
      // Unsafe is unsafe: nothing but the name is looked at.
      references,
      secret: session.objects.secretsOf(filename),
      cache,
      ...(next !== null && { backingFormat }),
      // What qemu-img allocates is allocated.
      ...(unsafe ? { unsafe, acknowledgeDataLoss: true } : { compress, detectZeroes: false }),
    }),
  ).catch(error => {
    if (session.signal.aborted) throw error
    throw unlockFailure([filename], error, session) ?? worded(filename, next, error)
  })
  return 0
}

function toFormat(name: string | undefined): string | undefined {
  if (name === undefined || isKnown(name) || PROTOCOLS.has(name)) return name
  throw new CommandFailure(`Invalid format name: '${name}'`)
}

/** Why the name could not be changed, as qemu-img says it at the end. */
const changeFailure = (backing: string | null, reason: string, cause?: unknown): CommandFailure =>
  new CommandFailure(`Could not change the backing file to '${backing ?? '(null)'}': ${reason}`, { cause })

function worded(filename: string, backing: string | null, error: unknown): CommandFailure {
  const { code, field } = error instanceof Qcow2Error ? error : {}
  if (code === 'ERR_QCOW2_LIMIT' && field === 'backing_file') {
    return changeFailure(backing, 'No space left in the file header', error)
  }
  if (code === 'ERR_QCOW2_INVALID_ARGUMENT' && field === 'backing') {
    return changeFailure(backing, 'Invalid argument', error)
  }
  const reason = describeError(error)
  const ofImage = error instanceof Qcow2Error && (error.path === undefined || pathOf(error) === placeOf(filename))
  if (ofImage || backing === null) return openFailureOr(filename, reason, error)
  const hint = openHint(backing, error, '-F')
  return new CommandFailure(`Could not open new backing file '${backing}': ${reason}`, {
    cause: error,
    ...(hint !== undefined && { hint }),
  })
}

const openFailureOr = (filename: string, reason: string, error: unknown): CommandFailure =>
  /^Could not|^Failed to get/.test(reason) ? openFailure(filename, error) : new CommandFailure(reason, { cause: error })
