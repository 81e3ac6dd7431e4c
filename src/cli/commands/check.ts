import { type Command, Option } from 'commander'
import { can } from '../../formats/table.js'
import { type CheckResult, check, Qcow2Error, verifyManifest } from '../../index.js'
import { describeError, failedChanging, openFailure } from '../errors.js'
import { CommandFailure, UsageFailure } from '../failure.js'
import { shownName } from '../filename.js'
import { checkExitCode, checkJson, formatCheck } from '../format/check.js'
import { formatManifest, manifestFindings, manifestJson } from '../format/manifest.js'
import {
  cacheMode,
  later,
  oneFile,
  outputOption,
  SOURCES,
  takeDriverSyntax,
  takeMember,
  takeParent,
} from '../grammar.js'
import { formatOf, withImage } from '../images.js'
import type { Runner } from '../program.js'
import { withProgress } from '../progress.js'
import { spokenCheckFailure } from '../qemu-words.js'
import type { Session } from '../session.js'
import { imageSource, writtenSource } from '../sources.js'

interface CheckArguments {
  readonly repair?: 'leaks' | 'all'
  readonly manifest?: boolean
  readonly format?: string
  readonly output?: string
  readonly forceShare?: boolean
  readonly quiet?: boolean
}

/** qemu-img's exit code where a format has nothing to check. */
const CHECK_NOT_SUPPORTED = 63

export function declareCheck(program: Command, run: Runner): void {
  const command = program
    .command('check')
    .summary('check the consistency of an image')
    .description(
      'Check the metadata of an image against itself, and repair it. Exit code: 0 consistent, 1 the check failed, ' +
        '2 corrupt, 3 leaked clusters only, 63 the format has nothing to check.',
    )
    .usage('[options] FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', `format of the image: ${SOURCES} (default: what it looks like)`)
    .option(
      '-T, --cache <mode>',
      'cache mode, as qemu-img takes it: a check reads through the page cache',
      cacheMode('source cache'),
    )
    .option('-U, --force-share', 'open an image that another process uses')
    .addOption(outputOption('human', 'json'))
    .option('-r, --repair <what>', 'repair leaked clusters (leaks), or all that can be repaired (all)', repairOf)
    .option('-q, --quiet', 'print nothing but errors')
  later(
    command,
    new Option('--manifest', 'check the files of an appliance (.ova, .ovf) against its manifest, and nothing else'),
  )
  takeMember(command)
  takeParent(command)
  takeDriverSyntax(command)
  command.action((files: string[], options: CheckArguments) =>
    run(session => checkFile(oneFile(files), options, session)),
  )
}

function repairOf(what: string): 'leaks' | 'all' {
  if (what === 'leaks' || what === 'all') return what
  throw new UsageFailure(`--repair (-r) expects 'leaks' or 'all', not '${what}'`)
}

async function checkFile(filename: string, options: CheckArguments, session: Session): Promise<number> {
  const { quiet = false, repair, forceShare } = options
  if (repair !== undefined && forceShare) {
    throw new CommandFailure(`Could not open '${filename}': force-share=on can only be used with read-only images`)
  }
  if (options.manifest) return await checkManifest(filename, options, session)
  const found = { ...(await checked(filename, options, session)), filename }
  for (const message of found.messages) session.stderr.write(`${message}\n`)
  await session.stderr.written()
  if (found.failure !== undefined) {
    const { lines, reason } = spokenCheckFailure(describeError(found.failure), session.program)
    session.stderr.write(lines)
    throw new CommandFailure(`Check failed: ${reason}`)
  }
  if (!quiet) session.stdout.write(options.output === 'json' ? checkJson(found) : formatCheck(found))
  if (found.checkErrors !== 0) throw new CommandFailure('Check failed')
  return checkExitCode(found)
}

async function checkManifest(
  filename: string,
  { quiet = false, repair, output }: CheckArguments,
  session: Session,
): Promise<number> {
  if (repair !== undefined) throw new UsageFailure('--manifest and --repair (-r) are mutually exclusive')
  const { signal } = session
  const found = await verifyManifest(writtenSource(filename, session), { signal, references: 'allow' }).catch(error => {
    if (signal.aborted) throw error
    const none = error instanceof Qcow2Error && error.code === 'ERR_QCOW2_FORMAT_UNKNOWN' && error.field === 'manifest'
    throw openFailure(filename, error, none ? CHECK_NOT_SUPPORTED : 1)
  })
  const name = shownName(filename)
  for (const line of manifestFindings(found)) session.stderr.write(`${line}\n`)
  await session.stderr.written()
  if (!quiet) session.stdout.write(output === 'json' ? manifestJson(name, found) : formatManifest(found))
  return found.ok ? 0 : 2
}

async function checked(
  filename: string,
  { forceShare, quiet = false, format, repair }: CheckArguments,
  session: Session,
): Promise<CheckResult> {
  const choice = { progress: false, quiet, verb: 'Checking', step: 1 }
  try {
    const from = await formatOf(filename, format, session)
    if (!can(from, 'check')) {
      // A file that is not there is the first thing to say.
      await withImage({ filename, format: from, references: 'layer', forceShare }, session, async () => undefined)
      throw new CommandFailure('This image format does not support checks', { exitCode: CHECK_NOT_SUPPORTED })
    }
    return await withProgress(session, choice, async job =>
      check(await imageSource(filename, session), {
        ...job,
        ...session.objects.sharingOf(filename),
        ...(forceShare !== undefined && { forceShare }),
        format: from,
        repair,
        references: session.objects.references,
      }),
    )
  } catch (error) {
    if (session.signal.aborted || error instanceof CommandFailure) throw error
    if (failedChanging(error)) throw new CommandFailure(`Check failed: ${describeError(error)}`, { cause: error })
    throw openFailure(filename, error)
  }
}
