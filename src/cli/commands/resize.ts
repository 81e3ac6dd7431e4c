import type { Command } from 'commander'
import { isPlain } from '../../formats/table.js'
import type { Preallocation } from '../../index.js'
import { describeError } from '../errors.js'
import { CommandFailure, UsageFailure } from '../failure.js'
import { SOURCES, takeDriverSyntax } from '../grammar.js'
import { withImage } from '../images.js'
import { parseValue } from '../options.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'
import { toSize } from '../size.js'

interface ResizeArguments {
  readonly format?: string
  readonly shrink?: boolean
  readonly preallocation?: Preallocation
  readonly quiet?: boolean
}

export function declareResize(program: Command, run: Runner): void {
  const command = program
    .command('resize')
    .summary('change the size of the disk of an image')
    .description(
      'Give the disk of an image a size, or change it by an amount (+SIZE, -SIZE). A new part reads as zeroes; what lies behind ' +
        'a smaller size is lost.',
    )
    .usage('[options] FILENAME [+ | -]SIZE')
    .argument('[files...]', 'the image and the size')
    .option('-f, --format <fmt>', `format of the image: ${SOURCES} (default: what it looks like)`)
    .option('--shrink', 'allow a smaller size')
    .option('--preallocation <mode>', 'what the new part has: off, metadata, falloc or full', preallocationOf)
    .option('-q, --quiet', 'print nothing but errors')
  takeDriverSyntax(command)
  command.action((files: string[], options: ResizeArguments) => run(session => resize(files, options, session)))
}

async function resize(args: readonly string[], options: ResizeArguments, session: Session): Promise<number> {
  const [filename, text, excess] = args
  if (filename === undefined || text === undefined) throw new UsageFailure('Expecting image file name and size')
  if (excess !== undefined) throw new UsageFailure('Extra argument(s) in command line')
  const sign = /^[+-]/.exec(text)?.[0]
  const { shrink, preallocation } = options
  const amount = BigInt(parseValue({ name: 'size', type: 'size' }, sign === undefined ? text : text.slice(1)))
  const unwritable = 'Image format driver does not support resize'
  return withImage({ filename, format: options.format, flags: 'r+', unwritable }, session, async image => {
    const now = image.virtualSizeBigInt
    const wanted = sign === '+' ? now + amount : sign === '-' ? now - amount : amount
    if (wanted <= 0n) throw new CommandFailure('New image size must be positive')
    if (wanted <= now && (preallocation ?? 'off') !== 'off') {
      throw new CommandFailure('Preallocation can only be used for growing images')
    }
    if (wanted < now && !shrink) {
      throw new CommandFailure(
        'Use the --shrink option to perform a shrink operation.\n' +
          "warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an " +
          'operation, make sure there is no important data there.',
      )
    }
    // Like qemu-img: a raw disk is filled up to whole sectors, one with metadata has to be told so.
    if (wanted % 512n !== 0n && !isPlain((await image.info({ bigint: true })).format)) {
      throw new CommandFailure('The new size must be a multiple of 512')
    }
    const sectors = ((wanted + 511n) / 512n) * 512n
    await image.truncate(toSize(sectors), { shrink, preallocation, signal: session.signal }).catch(error => {
      throw session.signal.aborted ? error : new CommandFailure(describeError(error), { cause: error })
    })
    if (!options.quiet) session.stdout.write('Image resized.\n')
    return 0
  })
}

function preallocationOf(mode: string): Preallocation {
  if (mode === 'off' || mode === 'metadata' || mode === 'falloc' || mode === 'full') return mode
  throw new CommandFailure(`Invalid preallocation mode '${mode}'`)
}
