import type { Command } from 'commander'
import { PLAIN_FORMAT } from '../../formats/table.js'
import { convert, type TargetFormat } from '../../index.js'
import { targetFormat } from '../create-options.js'
import { describeError } from '../errors.js'
import { CommandFailure } from '../failure.js'
import { alias, SOURCES, TARGETS, takeDriverSyntax, takeMember, takeParent } from '../grammar.js'
import { formatOf, unlockFailure, withImage } from '../images.js'
import type { Runner } from '../program.js'
import { withProgress } from '../progress.js'
import type { Session } from '../session.js'
import { sizeArgument, toSize } from '../size.js'
import { placeOf, sourceOf, targetSource } from '../sources.js'

interface DdArguments {
  readonly format?: string
  readonly targetFormat: string
  readonly forceShare?: boolean
}

/** The operands, in their own units. */
interface Operands {
  blockSize: bigint
  count: bigint | undefined
  skip: bigint
  input: string | undefined
  output: string | undefined
}

const INT_MAX = 2n ** 31n - 1n
const INT64_MAX = 2n ** 63n - 1n

export function declareDd(program: Command, run: Runner): void {
  const command = program
    .command('dd')
    .summary('copy a part of an image')
    .description(
      'Copy a part of a disk into a new image. if=FILE and of=FILE name the image and the target; bs=SIZE is the block size (512), ' +
        'skip=N the first block to copy, count=N the block to stop at.',
    )
    .usage('[options] [bs=SIZE] [count=N] [skip=N] if=FILE of=FILE')
    .argument('[operands...]', 'bs=, count=, skip=, if= and of=')
    .option('-f, --format <fmt>', `format of the image: ${SOURCES} (default: what it looks like)`)
    .option('-O, --target-format <fmt>', `format of the target: ${TARGETS}`, PLAIN_FORMAT)
    .option('-U, --force-share', 'open an image that another process uses')
  alias(command, '--target-format', '--output-format')
  takeMember(command)
  takeParent(command)
  takeDriverSyntax(command)
  command.action((operands: string[], options: DdArguments) => run(session => dd(operands, options, session)))
}

function read(list: readonly string[]): Operands {
  const operands: Operands = { blockSize: 512n, count: undefined, skip: 0n, input: undefined, output: undefined }
  for (const operand of list) {
    const [name, value] = operand.split(/=(.*)/s, 2)
    if (value === undefined) throw new CommandFailure(`unrecognized operand ${operand}`)
    switch (name) {
      case 'bs':
        operands.blockSize = sizeArgument('bs', value, { min: 1n, max: INT_MAX })
        break
      case 'count':
        operands.count = sizeArgument('count', value)
        break
      case 'skip':
        operands.skip = sizeArgument('skip', value)
        break
      case 'if':
        operands.input = value
        break
      case 'of':
        operands.output = value
        break
      default:
        throw new CommandFailure(`unrecognized operand ${name}`)
    }
  }
  return operands
}

function formatFor(name: string): TargetFormat {
  try {
    return targetFormat(name)
  } catch (error) {
    if (!(error instanceof CommandFailure) || !error.message.startsWith('Unknown file format')) throw error
    throw new CommandFailure('Unknown file format', { cause: error })
  }
}

async function dd(list: readonly string[], options: DdArguments, session: Session): Promise<number> {
  const { blockSize, count, skip, input, output } = read(list)
  if (input === undefined || output === undefined) throw new CommandFailure('Must specify both input and output files')
  const { forceShare } = options
  const request = { filename: input, format: options.format, forceShare, closed: true }
  const disk = await withImage(request, session, async image => image.virtualSizeBigInt)
  const from = await formatOf(input, options.format, session)
  const to = formatFor(options.targetFormat)
  // `count` says where to stop, whatever was skipped.
  const end = count !== undefined && count * blockSize < disk ? count * blockSize : disk
  const start = skip * blockSize
  const beyond = start > INT64_MAX || start > end
  if (beyond) session.stderr.write(`${session.program}: ${input}: cannot skip to specified offset\n`)
  const range = beyond ? { start: 0, length: 0 } : { start: toSize(start), length: toSize(end - start) }
  // As dd is: nothing is shown unless somebody asks.
  const choice = { progress: false, quiet: true, verb: 'Copying', step: 1 }
  const secret = session.objects.secretsOf(input)
  const sharing = { ...session.objects.sharingOf(input), ...(forceShare !== undefined && { forceShare }) }
  const copy = {
    from,
    to,
    ...range,
    ...sharing,
    references: session.objects.references,
    secret,
    overwrite: true,
  } as const
  await withProgress(session, choice, async job =>
    convert(await sourceOf(input, session), targetSource(output, session), { ...copy, ...job, bigint: true }),
  ).catch(error => {
    if (session.signal.aborted) throw error
    const closed = unlockFailure([input], error, session)
    if (closed !== undefined) throw closed
    const reason = describeError(error, placeOf(output))
    throw new CommandFailure(`${output}: error while creating output image: ${reason}`, { cause: error })
  })
  return 0
}
