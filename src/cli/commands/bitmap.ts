import { type Command, Option } from 'commander'
import type { Image } from '../../index.js'
import { toName } from '../../text.js'
import { describeError } from '../errors.js'
import { CommandFailure, UsageFailure } from '../failure.js'
import { formatsThat, later, takeDriverSyntax } from '../grammar.js'
import { withImage } from '../images.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'
import { sizeArgument, toSize } from '../size.js'

/** One thing to do; several are done in the order of the command line. */
type Action = {
  readonly verb: 'add' | 'remove' | 'remove-all' | 'clear' | 'enable' | 'disable' | 'merge'
  readonly source?: string
}

interface BitmapArguments {
  readonly format?: string
  readonly granularity?: string
  readonly sourceFile?: string
  readonly sourceFormat?: string
}

export function declareBitmap(program: Command, run: Runner): void {
  const actions: Action[] = []
  const command = program
    .command('bitmap')
    .summary('add, remove or change a persistent bitmap')
    .description('Change a persistent bitmap of an image. Several actions are carried out in the order given.')
    .usage(
      '[options] (--add | --remove | --remove-all | --clear | --enable | --disable | --merge SOURCE)... FILENAME [BITMAP]',
    )
    .argument('[files...]', 'the image and the name of the bitmap; --remove-all alone takes no name')
    .option('-f, --format <fmt>', `format of the image: ${formatsThat('bitmaps')} (default: what it looks like)`)
    .option('-g, --granularity <size>', 'with --add: bytes that one bit stands for (0: as without -g)')
    .option('-b, --source-file <file>', 'with --merge: the image that has the source bitmap')
    .option('-F, --source-format <fmt>', 'format of the source image')
    .option('-q, --quiet', 'print nothing but errors')
  const flags = {
    add: 'add the bitmap, recording from now on',
    remove: 'remove it',
    clear: 'make all of it clean',
    enable: 'start recording',
    disable: 'stop recording',
  } as const
  for (const [verb, what] of Object.entries(flags)) {
    command.option(`--${verb}`, what)
    command.on(`option:${verb}`, () => actions.push({ verb: verb as keyof typeof flags }))
  }
  later(command, new Option('--remove-all', 'remove all bitmaps of the image'))
  command.on('option:remove-all', () => actions.push({ verb: 'remove-all' }))
  command.option('--merge <source>', 'mark in it what is dirty in another bitmap')
  command.on('option:merge', (source: string) => actions.push({ verb: 'merge', source }))
  takeDriverSyntax(command)
  command.action((files: string[], options: BitmapArguments) =>
    run(session => bitmap(files, actions, options, session)),
  )
}

async function bitmap(
  files: readonly string[],
  actions: readonly Action[],
  options: BitmapArguments,
  session: Session,
): Promise<number> {
  const verbs = actions.map(({ verb }) => verb)
  if (verbs.length === 0) {
    throw new UsageFailure(
      'Need at least one of --add, --remove, --remove-all, --clear, --enable, --disable, or --merge',
    )
  }
  const named = verbs.some(verb => verb !== 'remove-all')
  const [filename, name = '', ...excess] = files
  if (options.granularity !== undefined && !verbs.includes('add')) {
    throw new UsageFailure('granularity only supported with --add')
  }
  if (options.sourceFile !== undefined && !verbs.includes('merge')) {
    throw new UsageFailure('Merge bitmap source file only supported with --merge')
  }
  if (options.sourceFormat !== undefined && options.sourceFile === undefined) {
    throw new UsageFailure('-F only supported with -b')
  }
  if (filename === undefined || excess.length > 0 || named !== files.length > 1) {
    throw new UsageFailure(named ? 'Expecting filename and bitmap name' : 'Expecting filename')
  }
  const granularity = options.granularity === undefined ? undefined : sizeArgument('granularity', options.granularity)
  const bitmapName = toName(name)
  const act = ({ verb, source: from = '' }: Action, image: Image, source: Image): Promise<void> => {
    if (verb === 'remove-all') return image.bitmaps.removeAll()
    if (verb === 'add') return image.bitmaps.add(bitmapName, granularity ? { granularity: toSize(granularity) } : {})
    if (verb === 'merge') {
      return image.bitmaps.merge(bitmapName, [{ bitmaps: source.bitmaps, name: toName(from) }])
    }
    return image.bitmaps[verb](bitmapName)
  }
  const what = (verb: Action['verb']): string => (verb === 'remove-all' ? verb : `${verb} on bitmap ${name}`)
  const perform = async (image: Image, source: Image) => {
    for (const action of actions) {
      const { verb } = action
      await act(action, image, source).catch(error => {
        if (session.signal.aborted) throw error
        const reason = describeError(error)
        throw new CommandFailure(`Operation ${what(verb)} failed: ${reason}`, { cause: error })
      })
    }
  }
  const [first = 'add'] = verbs
  const unwritable = `Operation ${what(first)} failed: Operation not supported`
  const at = { filename, format: options.format, flags: 'r+', unwritable } as const
  return withImage(at, session, async image => {
    const { sourceFile, sourceFormat } = options
    if (sourceFile === undefined) {
      await perform(image, image)
    } else {
      const from = { filename: sourceFile, format: sourceFormat, formatOption: '-F', references: 'layer' } as const
      await withImage(from, session, source => perform(image, source))
    }
    return 0
  })
}
