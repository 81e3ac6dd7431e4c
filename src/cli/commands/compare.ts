import type { Command } from 'commander'
import { type CompareResult, compare } from '../../index.js'
import { describeError } from '../errors.js'
import { CommandFailure, UsageFailure } from '../failure.js'
import { cacheMode, SOURCES, takeDriverSyntax, takeMember, takeParent } from '../grammar.js'
import { formatOf, type Request, unlockFailure, withImage } from '../images.js'
import type { Runner } from '../program.js'
import { withProgress } from '../progress.js'
import type { Session } from '../session.js'
import { sourceOf } from '../sources.js'

interface CompareArguments {
  readonly aFormat?: string
  readonly bFormat?: string
  readonly strict?: boolean
  readonly forceShare?: boolean
  readonly progress?: boolean
  readonly quiet?: boolean
}

/** qemu-img's exit codes: images that cannot be opened, and data that cannot be read. */
const CANNOT_OPEN = 2
const CANNOT_READ = 4

export function declareCompare(program: Command, run: Runner): void {
  const command = program
    .command('compare')
    .summary('compare the contents of two images')
    .description(
      'Compare what two images read as. Exit code: 0 identical, 1 different, 2 an image cannot be opened, ' +
        '3 its allocation or 4 its data cannot be read.',
    )
    .usage('[options] FILENAME1 FILENAME2')
    .argument('[files...]', 'the two images')
    .option('-f, --a-format <fmt>', `format of FILENAME1: ${SOURCES} (default: what it looks like)`)
    .option('-F, --b-format <fmt>', 'format of FILENAME2')
    .option('-s, --strict', 'sizes and allocation must be equal too')
    .option(
      '-T, --cache <mode>',
      'cache mode, as qemu-img takes it: images are read through the page cache',
      cacheMode('source cache', CANNOT_OPEN),
    )
    .option('-U, --force-share', 'open images that another process uses')
    .option('-p, --progress', 'show the progress, also without a terminal')
    .option('-q, --quiet', 'print nothing but errors')
  takeMember(command)
  takeParent(command)
  takeDriverSyntax(command)
  command.action((files: string[], options: CompareArguments) => run(session => compareFiles(files, options, session)))
}

async function compareFiles(files: readonly string[], options: CompareArguments, session: Session): Promise<number> {
  const [a, b, excess] = files
  if (a === undefined || b === undefined || excess !== undefined) {
    throw new UsageFailure('Expecting two image file names')
  }
  const sizeA = await sizeOf(a, { format: options.aFormat, formatOption: '-f' }, options.forceShare, session)
  const sizeB = await sizeOf(b, { format: options.bFormat, formatOption: '-F' }, options.forceShare, session)
  const choice = {
    progress: options.progress ?? false,
    quiet: options.quiet ?? false,
    verb: 'Comparing',
    step: 2,
    whole: (result: CompareResult<bigint>) => result.identical && Math.max(sizeA, sizeB) > 0,
  }
  const formatA = await formatOf(a, options.aFormat, session)
  const formatB = await formatOf(b, options.bFormat, session)
  const { strict, forceShare } = options
  const { objects } = session
  const secrets = { secretA: objects.secretsOf(a), secretB: objects.secretsOf(b) }
  const sharing = { ...objects.sharingOf(a, b), ...(forceShare !== undefined && { forceShare }) }
  const request = { formatA, formatB, ...secrets, ...sharing, strict, references: objects.references } as const
  const result = await withProgress(session, choice, async job =>
    compare(await sourceOf(a, session), await sourceOf(b, session), { ...request, ...job, bigint: true }),
  ).catch(error => {
    if (session.signal.aborted) throw error
    const closed = unlockFailure([a, b], error, session, CANNOT_OPEN)
    const message = `Error while comparing ${a} and ${b}: ${describeError(error)}`
    throw closed ?? new CommandFailure(message, { exitCode: CANNOT_READ, cause: error })
  })
  if (!options.quiet) session.stdout.write(verdict(result, Math.min(sizeA, sizeB), sizeA !== sizeB))
  return result.identical ? 0 : 1
}

/** Opened once before the comparison: a missing file and unreadable data have different exit codes. */
const sizeOf = (
  filename: string,
  format: Pick<Request, 'format' | 'formatOption'>,
  forceShare: boolean | undefined,
  session: Session,
): Promise<number> =>
  withImage({ filename, ...format, forceShare, exitCode: CANNOT_OPEN, closed: true }, session, async image =>
    Number(image.virtualSizeBigInt),
  )

/** What is printed: the warning comes when the shorter image ends, so a difference before that comes without it. */
export function verdict(result: CompareResult<number | bigint>, common: number, sizesDiffer: boolean): string {
  const { identical, reason, firstDifference = 0 } = result
  if (reason === 'size') return 'Strict mode: Image size mismatch!\n'
  if (reason === 'allocation') return `Strict mode: Offset ${firstDifference} block status mismatch!\n`
  const warning = sizesDiffer && (identical || firstDifference >= common) ? 'Warning: Image size mismatch!\n' : ''
  return `${warning}${identical ? 'Images are identical.' : `Content mismatch at offset ${firstDifference}!`}\n`
}
