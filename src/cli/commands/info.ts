import { basename, isAbsolute } from 'node:path'
import { type Command, Option } from 'commander'
import { meant } from '../../backing/appliance.js'
import { type Listing, listAppliance } from '../../backing/listing.js'
import { isFormat, isKnownByStart, isStream, traitsOf } from '../../formats/table.js'
import {
  type BlockLimits,
  type EncryptInfo,
  type ImageInfo,
  inspect,
  type LuksInfo,
  probe,
  type ReferencePolicy,
  type VmdkExtentInfo,
  type VmdkInfo,
} from '../../index.js'
import { fileStat } from '../../support/files.js'
import { exactText } from '../../text.js'
import { describeError, openFailure } from '../errors.js'
import { CommandFailure } from '../failure.js'
import { argumentOf, imagePath, isRemote, localPath, shownName } from '../filename.js'
import { applianceDocument } from '../format/appliance.js'
import { formatInfo, type InfoDocument } from '../format/info.js'
import { type Json, toJson } from '../format/json.js'
import { snapshotDocuments } from '../format/snapshots.js'
import {
  cacheMode,
  later,
  oneFile,
  outputOption,
  SOURCES,
  takeDriverSyntax,
  takeMember,
  takeParent,
  toCacheMode,
} from '../grammar.js'
import { warnOfDamage, withImage } from '../images.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'
import { imageSource } from '../sources.js'

interface InfoArguments {
  readonly format?: string
  readonly output?: string
  readonly backingChain?: boolean
  readonly forceShare?: boolean
  readonly cache?: string
  readonly limits?: boolean
}

export function declareInfo(program: Command, run: Runner): void {
  const command = program
    .command('info')
    .summary('show what an image is')
    .description('Show the format, sizes, snapshots and features of an image, without opening what it names.')
    .usage('[options] FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', `format of the image: ${SOURCES} (default: what it looks like)`)
    .option('-b, --backing-chain', 'show every image of the backing chain')
    .option('-U, --force-share', 'open an image that another process uses')
    .addOption(outputOption('human', 'json'))
  later(command, new Option('--limits', 'show what requests on the image should look like'))
  later(command, new Option('-t, --cache <mode>', 'cache mode that the limits are for').argParser(cacheMode('cache')))
  takeMember(command)
  takeParent(command)
  takeDriverSyntax(command)
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
  const { forceShare, limits = false } = options
  const cache = options.cache === undefined ? undefined : toCacheMode(options.cache)
  let next: { filename: string; format: string | undefined } | undefined = { filename: top, format: options.format }
  while (next !== undefined) {
    const { filename, format }: { filename: string; format: string | undefined } = next
    if (seen.has(filename)) throw new CommandFailure(`Backing file '${filename}' creates an infinite loop.`)
    seen.add(filename)
    const listing: Listing | undefined = documents.length === 0 ? await listingOf(filename, format, session) : undefined
    const appliance = listing && { appliance: applianceDocument(listing) }
    const image: string | undefined = listing === undefined ? filename : chosenOf(listing, filename, session)
    const other =
      image === undefined
        ? await fileWithDisks(filename, listing?.kind ?? '')
        : await describeOther(image, format, session)
    if (image === undefined || other !== undefined) {
      if (other !== undefined) documents.push({ ...other, ...appliance })
      return documents
    }
    const request = { filename: image, format, forceShare, cache, closed: true } as const
    const look = (references: ReferencePolicy): Promise<ImageInfo<bigint>> =>
      withImage({ ...request, references }, session, image => image.info({ bigint: true }))
    const info = await withExtents(await look('layer'), look)
    warnOfDamage(image, info, session)
    const document = { ...infoDocument(shownName(image), info), ...appliance }
    documents.push(limits ? withLimits(document, info, format === undefined) : document)
    next = options.backingChain ? below(image, info, session) : undefined
  }
  return documents
}

/** The image with the files that its disk is made of, as far as that is no matter of its backing file. */
async function withExtents(
  info: ImageInfo<bigint>,
  look: (references: ReferencePolicy) => Promise<ImageInfo<bigint>>,
): Promise<ImageInfo<bigint>> {
  if (info.backingFilename !== undefined || (info.vmdk?.extents.every(extent => extent.opened) ?? true)) return info
  return look('allow')
}

/** What an appliance or a descriptor has. One that is damaged is for opening it to say. */
async function listingOf(filename: string, format: string | undefined, session: Session): Promise<Listing | undefined> {
  if (filename === '' || isRemote(filename) || (isFormat(format) && !isKnownByStart(format))) return undefined
  const stat = await fileStat(imagePath(filename)).catch(() => undefined)
  if (!stat?.isFile()) return undefined
  const listing = await listAppliance({ path: localPath(filename) }).catch(() => undefined)
  if (listing?.damage !== undefined) {
    const said = describeError(listing.damage)
    session.stderr.write(`${session.program}: warning: ${filename}: its descriptor is not read: ${said}\n`)
  }
  return listing
}

/** The image that is shown of an appliance: the disk that is chosen, or its only one; undefined where there are several, or none that is read. */
function chosenOf({ kind, disks }: Listing, filename: string, session: Session): string | undefined {
  const member = session.objects.memberOf(filename)
  const there = disks.filter(({ found }) => found !== undefined && isFormat(found.format))
  const listed = there.filter(disk => disk.listed !== undefined)
  const [disk, ...others] =
    member === undefined
      ? listed.length > 0
        ? listed
        : there
      : meant(
          there,
          ({ file }) => file === member,
          ({ listed }) => listed?.diskId === member,
        )
  // What is wrong with the name of one, opening it says.
  if (kind === 'ova' && member !== undefined) return filename
  if (disk === undefined && member !== undefined) {
    const names = disks.flatMap(({ file }) => file ?? []).join(', ')
    throw new CommandFailure(
      `Could not open '${filename}': the appliance has no disk '${member}' here: it lists ${names}`,
    )
  }
  if (disk === undefined || others.length > 0) return undefined
  return disk.found?.path === undefined ? filename : argumentOf(disk.found.path)
}

/** A file that is no image itself, of which nothing more is known. */
async function fileWithDisks(filename: string, format: string): Promise<InfoDocument> {
  const { size, blocks } = await fileStat(imagePath(filename))
  const actualSize = BigInt(blocks) * 512n
  const name = shownName(filename)
  const file = fileDocument(name, { fileLength: BigInt(size), actualSize, protocol: 'file' })
  return {
    filename: name,
    format,
    'actual-size': actualSize,
    'dirty-flag': false,
    children: [{ name: 'file', info: file }],
  }
}

/** An image of a format that is recognised and not read: its name and its size. What is below it is not known. */
async function describeOther(
  filename: string,
  format: string | undefined,
  session: Session,
): Promise<InfoDocument | undefined> {
  if (filename === '' || isFormat(format) || isRemote(filename)) return undefined
  const path = imagePath(filename)
  const { signal } = session
  const source = await imageSource(filename, session)
  const looks = await probe(source, { signal }).catch(error => {
    throw signal.aborted ? error : openFailure(filename, error)
  })
  if (isFormat(looks) || (format !== undefined && format !== looks)) return undefined
  const { virtualSize } = await inspect(source, { signal, bigint: true })
  const stats = await fileStat(path)
  const [size, blocks] = [BigInt(stats.size), BigInt(stats.blocks)]
  const protocol = stats.isBlockDevice() ? 'host_device' : 'file'
  const name = shownName(filename)
  const actualSize = blocks * 512n
  return {
    filename: name,
    format: looks,
    // Of gzip, only reading all of it tells.
    ...((virtualSize > 0n || !isStream(looks)) && { 'virtual-size': virtualSize }),
    'actual-size': actualSize,
    'dirty-flag': false,
    children: [{ name: 'file', info: fileDocument(name, { fileLength: size, actualSize, protocol }) }],
  }
}

function below(
  filename: string,
  info: ImageInfo<bigint>,
  { objects }: Session,
): { filename: string; format: string | undefined } | undefined {
  if (info.backingFilename === undefined) return undefined
  const given = isRemote(filename) ? undefined : objects.belowOf(localPath(filename))
  if (given !== undefined) return { filename: argumentOf(given.path), format: given.format }
  if (info.fullBackingFilename === undefined) {
    throw new CommandFailure(
      `Could not determine absolute backing filename, but backing filename '${exactText(info.backingFilename, info.backingFilenameBytes)}' present`,
    )
  }
  const full = exactText(info.fullBackingFilename, info.fullBackingFilenameBytes)
  return { filename: argumentOf(full), format: info.backingFilenameFormat }
}

/** The QAPI document of one image: names with dashes, and the file that holds it as a node of its own. */
function infoDocument(filename: string, info: ImageInfo<bigint>): InfoDocument {
  const specific = info.formatSpecific
  const { silent = false } = traitsOf(info.format)
  return {
    filename,
    format: info.format,
    'virtual-size': info.virtualSize,
    ...(info.actualSize !== undefined && { 'actual-size': sizeInAll(info) }),
    ...(info.clusterSize !== undefined && !silent && { 'cluster-size': info.clusterSize }),
    ...(info.encrypted && { encrypted: true }),
    // QEMU asks the export where the format has nothing to say, and no server tells.
    ...((info.protocol !== 'nbd' || specific !== undefined) && !silent && { 'dirty-flag': info.dirtyFlag }),
    ...(info.backingFilename !== undefined && {
      'backing-filename': exactText(info.backingFilename, info.backingFilenameBytes),
    }),
    ...(info.fullBackingFilename !== undefined && {
      'full-backing-filename': fullName(filename, info.backingFilename ?? '', info),
    }),
    ...(info.backingFilenameFormat !== undefined && { 'backing-filename-format': info.backingFilenameFormat }),
    ...(info.snapshots.length > 0 && { snapshots: snapshotDocuments(info.snapshots) }),
    ...(specific && { 'format-specific': { type: specific.type, data: specificData(specific) } }),
    ...(info.luks && { 'format-specific': { type: 'luks', data: luksData(info.luks) } }),
    ...(info.vmdk && { 'format-specific': { type: 'vmdk', data: vmdkData(info.vmdk, filename) } }),
    children: [...extentFiles(info, filename), { name: 'file', info: fileDocument(filename, info) }],
  }
}

/** With the files of extents. */
const sizeInAll = ({ actualSize = 0n, vmdk }: ImageInfo<bigint>): bigint =>
  (vmdk?.extents ?? []).reduce((sum, { actualSize: more = 0n }) => sum + more, actualSize)

/** The name of an extent's file, behind the folder of the image as that is shown. */
function extentName({ filename, filenameBytes, format }: VmdkExtentInfo<bigint>, image: string): string {
  if (format === undefined) return image
  return `${/^.*\//s.exec(image)?.[0] ?? ''}${basename(exactText(filename ?? '', filenameBytes))}`
}

/** QAPI's document of what only VMDK images have. */
export const vmdkData = (vmdk: VmdkInfo<bigint>, image: string) => ({
  cid: vmdk.cid,
  'parent-cid': vmdk.parentCid,
  'create-type': vmdk.createType,
  extents: vmdk.extents.map(extent => ({
    ...(extent.compressed && { compressed: true }),
    'virtual-size': extent.virtualSize,
    filename: extentName(extent, image),
    'cluster-size': extent.clusterSize,
    format: extent.format ?? '',
  })),
})

/** The files of extents, the last one first. */
const extentFiles = ({ vmdk, protocol }: ImageInfo<bigint>, image: string): InfoDocument['children'] =>
  (vmdk?.extents ?? [])
    .flatMap((extent, number) => {
      const { fileLength, actualSize } = extent
      if (fileLength === undefined || actualSize === undefined) return []
      const file = fileDocument(extentName(extent, image), { fileLength, actualSize, protocol })
      return [{ name: `extents.${number}`, info: file }]
    })
    .reverse()

/** With the protocol `file:`, a name is no other from anywhere; any other is behind the folder of the image, as that is shown. */
function fullName(image: string, stored: string, info: ImageInfo<bigint>): string {
  if (stored.startsWith('file:')) return exactText(stored, info.backingFilenameBytes)
  const full = exactText(info.fullBackingFilename ?? '', info.fullBackingFilenameBytes)
  return image.startsWith('./') && !isAbsolute(full) && !full.startsWith('./') ? `./${full}` : full
}

/** A data file by the name of the file. */
const dataFileName = (stored: string): string => (stored.startsWith('file:') ? shownName(stored) : stored)

/** With what QEMU calls block limits, of the disk and of its file. A disk whose format can only be guessed takes whole sectors then. */
function withLimits(document: InfoDocument, { format, limits }: ImageInfo<bigint>, guessed: boolean): InfoDocument {
  const { disk, file } = limits
  const requestAlignment =
    guessed && !traitsOf(format).probed ? Math.max(512, disk.requestAlignment) : disk.requestAlignment
  return {
    ...document,
    limits: limitsDocument({ ...disk, requestAlignment }),
    children: document.children.map(child => ({ ...child, info: { ...child.info, limits: limitsDocument(file) } })),
  }
}

const limitsDocument = (limits: BlockLimits) => ({
  'request-alignment': limits.requestAlignment,
  'discard-alignment': limits.discardAlignment,
  'write-zeroes-alignment': limits.writeZeroesAlignment,
  'max-hw-transfer': limits.maxHwTransfer,
  'max-iov': limits.maxIov,
  'max-hw-iov': limits.maxHwIov,
  'min-mem-alignment': limits.minMemAlignment,
  'opt-mem-alignment': limits.optMemAlignment,
})

/** QAPI's document of what only qcow2 images have. */
export const specificData = (specific: NonNullable<ImageInfo['formatSpecific']>) => ({
  compat: specific.compat,
  'compression-type': specific.compressionType,
  'lazy-refcounts': specific.lazyRefcounts,
  'refcount-bits': specific.refcountBits,
  corrupt: specific.corrupt,
  'extended-l2': specific.extendedL2,
  'data-file':
    specific.dataFile === undefined ? undefined : dataFileName(exactText(specific.dataFile, specific.dataFileBytes)),
  'data-file-raw': specific.dataFileRaw,
  encrypt: specific.encrypt && encryptDocument(specific.encrypt),
  bitmaps: specific.bitmaps?.map(({ name, nameBytes, granularity, flags }) => ({
    name: exactText(name, nameBytes),
    granularity,
    flags,
  })),
})

/** What version 2 has besides is told as QEMU would name it. */
const luksData = (luks: LuksInfo) => ({
  ...(luks.version !== 1 && { version: luks.version, 'sector-size': luks.sectorSize }),
  'ivgen-alg': luks.ivgenAlg,
  'ivgen-hash-alg': luks.ivgenHashAlg,
  'detached-header': luks.detachedHeader,
  'hash-alg': luks.hashAlg,
  'cipher-alg': luks.cipherAlg,
  uuid: luks.uuid,
  'cipher-mode': luks.cipherMode,
  slots: luks.slots.map(({ active, iters, stripes, keyOffset }) => ({
    active,
    iters,
    stripes,
    'key-offset': keyOffset,
  })),
  'payload-offset': luks.payloadOffset,
  'master-key-iters': luks.masterKeyIters,
})

/** Of a LUKS header that cannot be read, only that there is one. */
const encryptDocument = (encrypt: EncryptInfo): { readonly [key: string]: Json | undefined } => ({
  format: encrypt.format,
  ...(encrypt.slots !== undefined && luksData(encrypt)),
})

const fileDocument = (
  filename: string,
  info: Pick<ImageInfo<bigint>, 'fileLength' | 'actualSize' | 'protocol'>,
): InfoDocument => ({
  children: [],
  filename,
  format: info.protocol,
  // QEMU counts a file in whole sectors.
  'virtual-size': ((info.fileLength + 511n) / 512n) * 512n,
  ...(info.actualSize !== undefined && { 'actual-size': info.actualSize }),
  ...(info.protocol !== 'nbd' && { 'format-specific': { type: 'file', data: {} }, 'dirty-flag': false }),
})
