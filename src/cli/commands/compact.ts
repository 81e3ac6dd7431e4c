import type { Command } from 'commander'
import { can } from '../../formats/table.js'
import { type CompactResult, compact, Qcow2Error } from '../../index.js'
import { describeError, failedChanging, openFailure } from '../errors.js'
import { CommandFailure } from '../failure.js'
import { compactJson, formatCompact } from '../format/compact.js'
import { formatsThat, oneFile, outputOption, takeDriverSyntax } from '../grammar.js'
import { formatOf, lockingOf, withImage } from '../images.js'
import type { Runner } from '../program.js'
import { withProgress } from '../progress.js'
import type { Session } from '../session.js'
import { writtenSource } from '../sources.js'

interface CompactArguments {
  readonly format?: string
  readonly rewrite?: boolean
  readonly zeroes?: boolean
  readonly dryRun?: boolean
  readonly output?: string
  readonly progress?: boolean
  readonly quiet?: boolean
}

export function declareCompact(program: Command, run: Runner): void {
  const command = program
    .command('compact')
    .summary('give back to the file system what an image does not need')
    .description(
      'Free leaked clusters, punch holes for free ones, and cut the file. What the disk and its snapshots read as stays. ' +
        'Interrupted at any point, the image is sound, and compacted in part.',
    )
    .usage('[options] FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', `format of the image: ${formatsThat('compact')}`)
    .option('--rewrite', 'also move clusters from the end of the file into free ones, so that it becomes short')
    .option('--zeroes', 'also give up clusters that hold nothing but zeroes: reads all data')
    .option('-n, --dry-run', 'change nothing: tell what would be had')
    .addOption(outputOption('human', 'json'))
    .option('-p, --progress', 'show the progress, also without a terminal')
    .option('-q, --quiet', 'print nothing but errors')
  takeDriverSyntax(command)
  command.action((files: string[], options: CompactArguments) =>
    run(session => compactFile(oneFile(files), options, session)),
  )
}

async function compactFile(filename: string, options: CompactArguments, session: Session): Promise<number> {
  const { dryRun = false, quiet = false, output } = options
  const result = await compacted(filename, options, session)
  if (quiet) return 0
  session.stdout.write(output === 'json' ? compactJson(result) : formatCompact(result, dryRun))
  return 0
}

/** Errors of an image that was open. */
const BEHIND_OPENING: ReadonlySet<string> = new Set(['ERR_QCOW2_CORRUPT', 'ERR_QCOW2_IO'])

async function compacted(filename: string, options: CompactArguments, session: Session): Promise<CompactResult> {
  const { rewrite = false, zeroes, dryRun, progress = false, quiet = false, output } = options
  const format = await formatOf(filename, options.format, session)
  if (!can(format, 'compact')) {
    // A file that is not there is the first thing to say.
    await withImage({ filename, format, references: 'layer' }, session, async () => undefined)
    throw new CommandFailure('This image format does not support compaction')
  }
  const choice = { progress: progress && output !== 'json', quiet, verb: 'Compacting', step: 1 }
  const secret = session.objects.secretsOf(filename)
  const mode = rewrite ? 'rewrite' : 'in-place'
  try {
    return await withProgress(session, choice, job =>
      compact(writtenSource(filename, session), {
        ...job,
        ...lockingOf(filename, session),
        mode,
        zeroes,
        dryRun,
        references: session.objects.references,
        secret,
      }),
    )
  } catch (error) {
    if (session.signal.aborted || error instanceof CommandFailure) throw error
    if (failedChanging(error) || (error instanceof Qcow2Error && BEHIND_OPENING.has(error.code))) {
      throw new CommandFailure(`Compaction failed: ${describeError(error)}`, { cause: error })
    }
    throw openFailure(filename, error)
  }
}
