import type { Command } from 'commander'
import { describeError } from '../errors.js'
import { CommandFailure, UsageFailure, unsupported } from '../failure.js'
import { refuse, refuseDriverSyntax } from '../grammar.js'
import { withImage } from '../images.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'
import { sizeArgument, toSize } from '../size.js'

interface ResizeArguments {
  readonly format?: string
  readonly shrink?: boolean
  readonly quiet?: boolean
}

export function declareResize(program: Command, run: Runner): void {
  const command = program
    .command('resize')
    .summary('grow the disk of an image')
    .description('Grow the disk of an image to a size, or by an amount (+SIZE). The new part reads as zeroes.')
    .usage('[options] FILENAME [+]SIZE')
    .argument('[files...]', 'the image and the size')
    .option('-f, --format <fmt>', 'format of the image: qcow2 or raw (default: what it looks like)')
    .option('--shrink', 'not in this version: a disk only grows')
    .option('-q, --quiet', 'print nothing but errors')
    // A size with a minus looks like an option.
    .allowUnknownOption()
  refuse(command, '--preallocation <mode>', 'the new part of a disk is not preallocated')
  refuseDriverSyntax(command)
  command.action((files: string[], options: ResizeArguments) => run(session => resize(files, options, session)))
}

async function resize(args: readonly string[], options: ResizeArguments, session: Session): Promise<number> {
  const unknown = args.find(arg => arg.startsWith('-') && !/^-[\d.]/.test(arg))
  if (unknown !== undefined) throw new UsageFailure(`unrecognized option '${unknown}'`)
  const [filename, text, excess] = args
  if (filename === undefined || text === undefined || excess !== undefined) {
    throw new UsageFailure('Expecting image file name and size')
  }
  const sign = /^[+-]/.exec(text)?.[0]
  const amount = sizeArgument('image size', sign === undefined ? text : text.slice(1))
  return withImage({ filename, format: options.format, flags: 'r+' }, session, async image => {
    const now = BigInt(image.virtualSize)
    const wanted = sign === '+' ? now + amount : sign === '-' ? now - amount : amount
    if (wanted <= 0n) throw new CommandFailure('New image size must be positive')
    if (wanted < now) {
      if (options.shrink) throw unsupported("Option '--shrink'", 'a disk only grows')
      throw new CommandFailure(
        "Shrinking an image will delete all data beyond the shrunken image's end, and this version does not do it",
      )
    }
    // A disk is whole sectors, as qemu-img has it.
    const sectors = ((wanted + 511n) / 512n) * 512n
    await image.truncate(toSize(sectors)).catch(error => {
      throw session.signal.aborted ? error : new CommandFailure(describeError(error), { cause: error })
    })
    if (!options.quiet) session.stdout.write('Image resized.\n')
    return 0
  })
}
