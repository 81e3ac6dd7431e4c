import { type Command, Option } from 'commander'
import { isPlain } from '../../formats/table.js'
import type { Image } from '../../index.js'
import { writeWhole } from '../../support/files.js'
import { shownText, toName } from '../../text.js'
import { CommandFailure } from '../failure.js'
import { Allocation } from '../format/allocation.js'
import { colorDepthOf } from '../format/color.js'
import { Layout } from '../format/layout.js'
import { humanMap, jsonMap, type MapWriter } from '../format/map.js'
import { drawPicture, terminalGrid } from '../format/picture.js'
import { drawSvg, svgGrid } from '../format/svg.js'
import { oneFile, outputOption, SOURCES, takeDriverSyntax, takeMember, takeParent } from '../grammar.js'
import { withImage } from '../images.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'
import { sizeArgument, toSize } from '../size.js'
import { captionOf, extentsOf, type Range, refuseFilesOf, survey } from '../survey.js'

interface MapArguments {
  readonly format?: string
  readonly output?: string
  readonly picture?: boolean
  readonly write?: string
  readonly startOffset?: bigint
  readonly maxLength?: bigint
  readonly forceShare?: boolean
}

export function declareMap(program: Command, run: Runner): void {
  const command = program
    .command('map')
    .summary('show where the data of an image is')
    .description('Show which parts of the disk hold data, and in which file: as a list or as a picture.')
    .usage('[options] FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', `format of the image: ${SOURCES} (default: what it looks like)`)
    .option('-s, --start-offset <offset>', 'begin here', text => sizeArgument('start offset', text))
    .option('-l, --max-length <length>', 'show no more than this', text => sizeArgument('max length', text))
    .option('-U, --force-share', 'open an image that another process uses')
    .addOption(outputOption('human', 'json', 'svg'))
    .addOption(new Option('--picture', 'draw the disk in the terminal'))
    .option('-o, --write <file>', 'with --output=svg: write the picture into this file')
  takeMember(command)
  takeParent(command)
  takeDriverSyntax(command)
  command.action((files: string[], options: MapArguments) => run(session => map(oneFile(files), options, session)))
}

async function map(filename: string, options: MapArguments, session: Session): Promise<number> {
  if (options.picture && options.output !== undefined && options.output !== 'human') {
    throw new CommandFailure(`--picture cannot be used together with --output=${options.output}.`)
  }
  if (options.write !== undefined && options.output !== 'svg') {
    throw new CommandFailure('-o requires --output=svg.')
  }
  await withImage({ filename, format: options.format, forceShare: options.forceShare }, session, async image => {
    const range = rangeOf(image, options)
    if (options.picture) return drawTerminal(filename, image, range, session)
    if (options.output === 'svg') return drawFile(filename, image, range, options.write, session)
    return list(image, range, options.output === 'json' ? jsonMap(toSize(BigInt(range.start))) : humanMap(), session)
  })
  return 0
}

function rangeOf(image: Image, { startOffset = 0n, maxLength }: MapArguments): Range {
  const rest = image.virtualSizeBigInt - startOffset
  const length = maxLength !== undefined && maxLength < rest ? maxLength : rest
  return { start: Number(startOffset), length: length > 0n ? Number(length) : 0 }
}

async function list(image: Image, range: Range, writer: MapWriter, session: Session): Promise<void> {
  session.stdout.write(writer.begin)
  if (range.length > 0) {
    for await (const extent of extentsOf(image, range, session)) {
      session.stdout.write(writer.extent(extent))
      if (session.stdout.closed) return
      await session.stdout.drained()
    }
  }
  session.stdout.write(writer.end)
}

async function drawTerminal(filename: string, image: Image, range: Range, session: Session): Promise<void> {
  const { stream } = session.stdout
  const grid = terminalGrid(range.start, range.length, stream.columns ?? 80)
  const allocation = new Allocation(grid)
  await survey(image, range, [allocation], session)
  const caption = await captionOf(filename, image)
  session.stdout.write(drawPicture(allocation, caption, colorDepthOf(stream, session.env)))
}

async function drawFile(
  filename: string,
  image: Image,
  range: Range,
  path: string | undefined,
  session: Session,
): Promise<void> {
  const allocation = new Allocation(svgGrid(range.start, range.length))
  const { format, fileLength, formatSpecific } = await image.info({ bigint: true })
  // Offsets into an external data file say nothing about this one.
  const own = !isPlain(format) && formatSpecific?.dataFile === undefined
  const layout = own ? new Layout(range.start, range.length, Number(fileLength)) : undefined
  await survey(image, range, layout ? [allocation, layout] : [allocation], session)
  // An XML document is text.
  const svg = shownText(drawSvg(allocation, await captionOf(filename, image), layout))
  if (path === undefined) return session.stdout.write(svg)
  await refuseFilesOf(image, path, 'picture')
  await writeWhole(toName(path), svg)
}
