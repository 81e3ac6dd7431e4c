import { stat } from 'node:fs/promises'
import type { Command } from 'commander'
import { type ImageInfo, inspect, probe } from '../../index.js'
import { openFailure } from '../errors.js'
import { CommandFailure } from '../failure.js'
import { formatInfo, type InfoDocument } from '../format/info.js'
import { toJson } from '../format/json.js'
import { snapshotDocuments } from '../format/snapshots.js'
import { oneFile, outputOption, refuseDriverSyntax } from '../grammar.js'
import { localPath, shownName, warnOfDamage, withImage } from '../images.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'

interface InfoArguments {
  readonly format?: string
  readonly output?: string
  readonly backingChain?: boolean
  readonly forceShare?: boolean
}

export function declareInfo(program: Command, run: Runner): void {
  const command = program
    .command('info')
    .summary('show what an image is')
    .description('Show the format, sizes, snapshots and features of an image, without opening what it names.')
    .usage('[options] FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', 'format of the image: qcow2 or raw (default: what it looks like)')
    .option('-b, --backing-chain', 'show every image of the backing chain')
    .option('-U, --force-share', 'open an image that another process uses')
    .addOption(outputOption('human', 'json'))
  refuseDriverSyntax(command)
  command.action((files: string[], options: InfoArguments) =>
    run(session => showInfo(oneFile(files), options, session)),
  )
}

async function showInfo(filename: string, options: InfoArguments, session: Session): Promise<number> {
  const documents = await collect(filename, options, session)
  if (options.output !== 'json') session.stdout.write(formatInfo(documents))
  else session.stdout.write(`${toJson(options.backingChain ? documents : (documents[0] ?? {}))}\n`)
  return 0
}

/** Each image is opened by itself, so that a chain can be shown as far as it goes. */
async function collect(top: string, options: InfoArguments, session: Session): Promise<InfoDocument[]> {
  const documents: InfoDocument[] = []
  const seen = new Set<string>()
  const { forceShare } = options
  let next: { filename: string; format: string | undefined } | undefined = { filename: top, format: options.format }
  while (next !== undefined) {
    const { filename, format }: { filename: string; format: string | undefined } = next
    if (seen.has(filename)) throw new CommandFailure(`Backing file '${filename}' creates an infinite loop.`)
    seen.add(filename)
    const other = await describeOther(filename, format, session)
    if (other !== undefined) {
      documents.push(other)
      return documents
    }
    const info: ImageInfo = await withImage({ filename, format, references: 'layer', forceShare }, session, image =>
      image.info(),
    )
    warnOfDamage(filename, info, session)
    documents.push(infoDocument(shownName(filename), info))
    next = options.backingChain ? below(info) : undefined
  }
  return documents
}

/** An image of a format that is recognised and not read: its name and its size. What is below it is not known. */
async function describeOther(
  filename: string,
  format: string | undefined,
  session: Session,
): Promise<InfoDocument | undefined> {
  if (format === 'qcow2' || format === 'raw') return undefined
  const path = localPath(filename)
  const { signal } = session
  const looks = await probe(path, { signal }).catch(error => {
    throw signal.aborted ? error : openFailure(filename, error)
  })
  if (looks === 'qcow2' || looks === 'raw' || (format !== undefined && format !== looks)) return undefined
  const { virtualSize } = await inspect(path, { signal })
  const { size, blocks } = await stat(path)
  const name = shownName(filename)
  const actualSize = blocks * 512
  return {
    filename: name,
    format: looks,
    'virtual-size': virtualSize,
    'actual-size': actualSize,
    ...(looks === 'luks' && { encrypted: true }),
    'dirty-flag': false,
    children: [{ name: 'file', info: fileDocument(name, { fileLength: size, actualSize }) }],
  }
}

function below(info: ImageInfo): { filename: string; format: string | undefined } | undefined {
  if (info.backingFilename === undefined) return undefined
  if (info.fullBackingFilename === undefined) {
    throw new CommandFailure(
      `Could not determine absolute backing filename, but backing filename '${info.backingFilename}' present`,
    )
  }
  return { filename: info.fullBackingFilename, format: info.backingFilenameFormat }
}

/** The QAPI document of one image: names with dashes, and the file that holds it as a node of its own. */
function infoDocument(filename: string, info: ImageInfo): InfoDocument {
  const specific = info.formatSpecific
  return {
    filename,
    format: info.format,
    'virtual-size': info.virtualSize,
    'actual-size': info.actualSize,
    ...(info.clusterSize !== undefined && info.format !== 'raw' && { 'cluster-size': info.clusterSize }),
    ...(info.encrypted && { encrypted: true }),
    'dirty-flag': info.dirtyFlag,
    ...(info.backingFilename !== undefined && { 'backing-filename': info.backingFilename }),
    ...(info.fullBackingFilename !== undefined && { 'full-backing-filename': info.fullBackingFilename }),
    ...(info.backingFilenameFormat !== undefined && { 'backing-filename-format': info.backingFilenameFormat }),
    ...(info.snapshots.length > 0 && { snapshots: snapshotDocuments(info.snapshots) }),
    ...(specific && { 'format-specific': { type: specific.type, data: specificData(specific) } }),
    children: [{ name: 'file', info: fileDocument(filename, info) }],
  }
}

const specificData = (specific: NonNullable<ImageInfo['formatSpecific']>) => ({
  compat: specific.compat,
  'compression-type': specific.compressionType,
  'lazy-refcounts': specific.lazyRefcounts,
  'refcount-bits': specific.refcountBits,
  corrupt: specific.corrupt,
  'extended-l2': specific.extendedL2,
  'data-file': specific.dataFile,
  'data-file-raw': specific.dataFileRaw,
  encrypt: specific.encrypt && { format: specific.encrypt.format },
  bitmaps: specific.bitmaps?.map(({ name, granularity, flags }) => ({ name, granularity, flags })),
})

const fileDocument = (filename: string, info: Pick<ImageInfo, 'fileLength' | 'actualSize'>): InfoDocument => ({
  children: [],
  filename,
  format: 'file',
  // QEMU counts a file in whole sectors.
  'virtual-size': Math.ceil(info.fileLength / 512) * 512,
  'actual-size': info.actualSize,
  'format-specific': { type: 'file', data: {} },
  'dirty-flag': false,
})
