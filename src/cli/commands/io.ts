import type { Command } from 'commander'
import { UsageFailure } from '../failure.js'
import { SOURCES, takeDriverSyntax } from '../grammar.js'
import { Context } from '../io/context.js'
import { openAsked } from '../io/files.js'
import { runCommands, runInput } from '../io/run.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'

interface IoArguments {
  readonly cmd?: readonly string[]
  readonly format?: string
  readonly readOnly?: boolean
  readonly snapshot?: boolean
  readonly nocache?: boolean
  readonly copyOnRead?: boolean
  readonly forceShare?: boolean
  readonly imageOpts?: boolean
  readonly cache?: string
  readonly aio?: string
  readonly discard?: string
}

export function declareIo(program: Command, run: Runner): void {
  const command = program
    .command('io')
    .summary('read and write the disk of an image, by commands')
    .description(
      "Read and write the disk of an image, by commands: those of -c, or lines of the input. '-c help' lists them.",
    )
    .usage('[options] [-c COMMAND]... [FILENAME]')
    .argument('[files...]', 'the image')
    .option('-c, --cmd <command>', 'a command, as often as there are commands', (each: string, all: string[] = []) => [
      ...all,
      each,
    ])
    .option('-f, --format <fmt>', `format of the image: ${SOURCES} (default: what it looks like)`)
    .option('-r, --read-only', 'open the image for reading only')
    .option('-s, --snapshot', 'write to an overlay that is not kept')
    .option('-n, --nocache', "as -t none: bypass the host's page cache")
    .option('-C, --copy-on-read', 'not supported: reading does not write to the image')
    .option('-m, --misalign', 'accepted for compatibility')
    .option('-k, --native-aio', 'accepted for compatibility')
    .option('-i, --aio <mode>', 'threads, native or io_uring: accepted for compatibility')
    .option('-t, --cache <mode>', 'cache mode of the image (default: writeback)')
    .option('-d, --discard <mode>', 'what a discard does: ignore or unmap (default: unmap)')
    .option('-T, --trace <what>', 'accepted for compatibility')
    .option('-U, --force-share', 'with -r: open an image that another process uses')
    .option('-V, --version', 'print the version')
  takeDriverSyntax(command)
  command.action((files: string[], options: IoArguments) => run(session => exercise(files, options, session)))
}

async function exercise(files: readonly string[], options: IoArguments, session: Session): Promise<number> {
  const [filename] = files
  if (files.length > 1) throw new UsageFailure('Expecting one image file name')
  const context = new Context(session)
  if (filename !== undefined) await openFirst(filename, options, context)
  let right: boolean
  try {
    right = options.cmd === undefined ? await runInput(context) : await runCommands(context, options.cmd)
    await context.settled()
  } finally {
    // What was written is durable when the program ends.
    await context.disk?.image.close()
  }
  return right ? 0 : 1
}

async function openFirst(file: string, options: IoArguments, context: Context): Promise<void> {
  await openAsked(
    {
      filename: options.imageOpts ? undefined : file,
      options: options.imageOpts ? file : undefined,
      format: options.format,
      readOnly: options.readOnly ?? false,
      snapshot: options.snapshot ?? false,
      copyOnRead: options.copyOnRead ?? false,
      noCache: options.nocache ?? false,
      forceShare: options.forceShare ?? false,
      cache: options.cache,
      aio: options.aio,
      discard: options.discard,
    },
    context,
  )
}
