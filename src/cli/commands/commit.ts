import { isAbsolute } from 'node:path'
import type { Command } from 'commander'
import { can } from '../../formats/table.js'
import { type CacheMode, commit, type ImageInfo } from '../../index.js'
import { realPath } from '../../support/files.js'
import { exactText, toName } from '../../text.js'
import { describeError, openFailure } from '../errors.js'
import { CommandFailure } from '../failure.js'
import { localPath } from '../filename.js'
import { alias, cacheMode, formatsThat, oneFile, rateLimit, takeDriverSyntax, toCacheMode } from '../grammar.js'
import { formatOf, lockingOf, unlockFailure, withImage } from '../images.js'
import type { Runner } from '../program.js'
import { withProgress } from '../progress.js'
import type { Session } from '../session.js'
import { writtenSource } from '../sources.js'

interface CommitArguments {
  readonly format?: string
  readonly cache: string
  readonly base?: string
  readonly drop?: boolean
  readonly rate?: number | bigint
  readonly progress?: boolean
  readonly quiet?: boolean
}

export function declareCommit(program: Command, run: Runner): void {
  const command = program
    .command('commit')
    .summary('write the changes of an overlay into its backing file')
    .description('Write what an image has into its backing file, which grows if it is smaller, and empty the image.')
    .usage('[options] FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', `format of the image: ${formatsThat('commit')} (default: what it looks like)`)
    .option('-t, --cache <mode>', 'cache mode of the files that are written', cacheMode('cache'), 'writeback')
    .option('-b, --base <file>', 'commit into this file of the backing chain; implies -d')
    .option('-d, --drop', 'leave the image as it is, do not empty it')
    .option('-r, --rate <rate>', 'bytes per second, at most', rateLimit)
    .option('-p, --progress', 'show the progress, also without a terminal')
    .option('-q, --quiet', 'print nothing but errors')
  alias(command, '--rate', '--rate-limit')
  takeDriverSyntax(command)
  command.action((files: string[], options: CommitArguments) => run(session => commitFile(files, options, session)))
}

async function commitFile(files: readonly string[], options: CommitArguments, session: Session): Promise<number> {
  const filename = oneFile(files)
  const { format, quiet = false, rate } = options
  // The key is derived once, by the job itself.
  const request = { filename, format, closed: true }
  const base = await withImage(request, session, async image =>
    baseOf(filename, options.base, await image.chain({ bigint: true })),
  )
  const from = await formatOf(filename, format, session)
  if (!can(from, 'commit')) throw new CommandFailure(`Format driver '${from}' does not support commit`)
  const choice = { progress: options.progress ?? false, quiet, verb: 'Committing', step: 1 }
  const drop = options.drop || options.base !== undefined
  const cache: CacheMode = toCacheMode(options.cache)
  await withProgress(session, choice, job =>
    commit(writtenSource(filename, session), {
      ...job,
      ...lockingOf(filename, session),
      references: session.objects.references,
      secret: session.objects.secretsOf(filename),
      cache,
      drop,
      ...(base !== undefined && { base }),
      ...(rate !== undefined && { rate }),
    }),
  ).catch(error => {
    if (session.signal.aborted) throw error
    const locked = unlockFailure([filename], error, session)
    if (locked !== undefined) throw locked
    const opening = /^Could not|^Failed to get/.test(describeError(error))
    throw opening ? openFailure(filename, error) : new CommandFailure(describeError(error), { cause: error })
  })
  if (!quiet) session.stdout.write('Image committed.\n')
  return 0
}

/** The file of the chain that `-b` means: a relative name is relative to the directory of each image above it. */
async function baseOf(
  filename: string,
  wanted: string | undefined,
  chain: readonly ImageInfo<bigint>[],
): Promise<string | Buffer | undefined> {
  if (chain.length < 2) {
    if (wanted === undefined) throw new CommandFailure('Image does not have a backing file')
    throw notFound(wanted, filename)
  }
  if (wanted === undefined) return undefined
  const name = localPath(wanted)
  for (const [depth, layer] of chain.slice(1).entries()) {
    const above = nameOf(chain[depth]) ?? filename
    const path = isAbsolute(name) ? name : above.slice(0, above.lastIndexOf('/') + 1) + name
    const [a, b] = await Promise.all([path, nameOf(layer) ?? ''].map(realOf))
    if (a !== undefined && b !== undefined && a.equals(b)) return layer.filenameBytes ?? layer.filename
  }
  throw notFound(wanted, filename)
}

const nameOf = (layer: ImageInfo<bigint> | undefined): string | undefined =>
  layer && exactText(layer.filename, layer.filenameBytes)

const realOf = (path: string): Promise<Buffer | undefined> => realPath(toName(path)).catch(() => undefined)

const notFound = (base: string, filename: string): CommandFailure =>
  new CommandFailure(`Did not find '${base}' in the backing chain of '${filename}'`)
