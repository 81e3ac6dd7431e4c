/** Images that the command line names: their format, and opening them as qemu-img does. */

import { streamRefusal } from '../backing/streams.js'
import {
  can,
  formatOfWord,
  isFormat,
  isStream,
  listed,
  PLAIN_FORMAT,
  SOURCE_FORMATS,
  type StreamFormat,
} from '../formats/table.js'
import { type Format, type Image, type ImageInfo, type OpenOptions, open, probe, Qcow2Error } from '../index.js'
import { exactText, toName } from '../text.js'
import { describeError, openFailure, pathOf } from './errors.js'
import { CommandFailure } from './failure.js'
import { refusedTable } from './qemu-words.js'
import type { Session } from './session.js'
import { imageSource, placeOf, sourceOf } from './sources.js'

const FORMATS = listed(SOURCE_FORMATS, 'and')

/** The format given with `-f`, by name. */
export function namedFormat(filename: string, name: string): Format {
  const format = formatOfWord(name)
  if (format !== undefined) return format
  throw new CommandFailure(`Could not open '${filename}': Unknown driver '${name}'`, {
    hint: `The formats are ${FORMATS}.`,
  })
}

/** What a convert reads a file as: {@link formatOf}, or how it is compressed. */
export async function sourceFormatOf(
  filename: string,
  requested: string | undefined,
  session: Session,
): Promise<Format | StreamFormat> {
  return isStream(requested) ? requested : known(filename, requested, session)
}

/**
 * The format to open a file in: what `-f` says, else what its first bytes say. A file that looks like none of the known
 * formats is raw; one that looks like a format that is not read here is refused, not taken as raw.
 */
export async function formatOf(filename: string, requested: string | undefined, session: Session): Promise<Format> {
  const format = await known(filename, requested, session)
  if (isFormat(format)) return format
  throw new CommandFailure(
    `Could not open '${filename}': ${streamRefusal(format)} (-f ${PLAIN_FORMAT} takes it as the plain bytes of a disk)`,
  )
}

async function known(
  filename: string,
  requested: string | undefined,
  session: Session,
): Promise<Format | StreamFormat> {
  if (filename === '') throw new CommandFailure("Could not open '': The 'file' block driver requires a file name")
  const named = requested ?? session.objects.formatOf(filename)
  if (named !== undefined) return namedFormat(filename, named)
  const format = await probe(await imageSource(filename, session), { signal: session.signal, references: 'allow' })
  if (isFormat(format) || isStream(format)) return format
  throw new CommandFailure(
    `Could not open '${filename}': Image is in ${format} format, which is not supported ` +
      `(formats are ${FORMATS}; -f ${PLAIN_FORMAT} takes it as the plain bytes of a disk)`,
  )
}

/**
 * Says what of an image is not shown because its tables, or its LUKS header, are damaged. Under qemu-img's name nothing is shown of an
 * image that qemu-img does not open.
 */
export function warnOfDamage(
  filename: string,
  { damaged = [], formatSpecific }: Pick<ImageInfo, 'damaged' | 'formatSpecific'>,
  session: Session,
): void {
  const warn = (error: Error): string => `${session.program}: warning: ${filename}: ${describeError(error)}`
  for (const error of damaged) {
    const refused = refusedTable(describeError(error), session.program)
    if (refused !== undefined) {
      const { message, ...how } = refused
      throw new CommandFailure(`Could not open '${filename}': ${message}`, { ...how, cause: error })
    }
    session.stderr.write(`${warn(error)}: '${session.program} check -r all' keeps what is left of it\n`)
  }
  const header = formatSpecific?.encrypt?.damaged
  if (header !== undefined) session.stderr.write(`${warn(header)}: no secret opens the image\n`)
}

export interface Request
  extends Pick<OpenOptions, 'snapshot' | 'references' | 'forceShare' | 'flags' | 'cache' | 'discard' | 'detectZeroes'> {
  readonly filename: string
  readonly format: string | undefined
  /** Of a failure to open. Default 1. */
  readonly exitCode?: number
  /** The option that `format` was given with. Default `-f`. */
  readonly formatOption?: string
  /** What is said of a format that is not written, where that is not about opening it. */
  readonly unwritable?: string
  /** Guest data is not touched: it stays closed where it is encrypted, and no key is derived. */
  readonly closed?: boolean
}

/** How an image is shared: as the command line says, or its description. Writing is shared with nobody. */
const sharingOf = (
  filename: string,
  { flags, forceShare }: Pick<OpenOptions, 'flags' | 'forceShare'>,
  { objects }: Session,
): Pick<OpenOptions, 'forceShare' | 'locking'> => {
  const { locking, forceShare: described } = objects.sharingOf(filename)
  const shared = flags === 'r+' ? undefined : (forceShare ?? described)
  return { ...(locking !== undefined && { locking }), ...(shared !== undefined && { forceShare: shared }) }
}

/** How a job that writes locks its image, where its description says that. */
export const lockingOf = (filename: string, { objects }: Session): Pick<OpenOptions, 'locking'> => {
  const { locking } = objects.sharingOf(filename)
  return locking === undefined ? {} : { locking }
}

/** Opens an image and everything below it, runs `work` on it, and closes it whatever happens. */
export async function withImage<T>(
  { filename, format, exitCode, formatOption, unwritable, closed = false, references, ...how }: Request,
  session: Session,
  work: (image: Image) => Promise<T>,
): Promise<T> {
  const { objects } = session
  const secret = closed ? undefined : objects.secretsOf(filename)
  const described = { ...sharingOf(filename, how, session), cache: how.cache ?? objects.cacheOf(filename) }
  const options = { ...how, ...described, references: references ?? objects.references, secret }
  const image = await openImage(filename, format, options, session, unwritable).catch(error => {
    throw session.signal.aborted ? error : openFailure(filename, error, exitCode, formatOption)
  })
  try {
    return await work(image)
  } finally {
    await image.close()
  }
}

/** Opens an image and everything below it. What went wrong is not yet said in the words of {@link openFailure}. */
export async function openImage(
  filename: string,
  requested: string | undefined,
  options: Omit<OpenOptions, 'format' | 'signal'>,
  session: Session,
  unwritable?: string,
  opener = open,
): Promise<Image> {
  const format = await formatOf(filename, requested, session)
  const opening = { ...options, format, signal: session.signal }
  if (options.flags !== 'r+' || can(format, 'write')) return opener(await sourceOf(filename, session), opening)
  // What is wrong with the file itself comes first.
  const image = await open(await sourceOf(filename, session), { ...opening, flags: 'r' })
  await image.close()
  const why = `writing ${format} images is not supported (ERR_QCOW2_UNSUPPORTED_FEATURE)`
  throw new CommandFailure(unwritable ?? `Could not open '${filename}': ${why}`)
}

/** What opening the data of an encrypted image can fail with, when its header was read already. */
const UNLOCKING: ReadonlySet<string> = new Set([
  'ERR_QCOW2_BAD_SECRET',
  'ERR_QCOW2_INVALID_HEADER',
  'ERR_QCOW2_UNSUPPORTED_FEATURE',
  'ERR_QCOW2_LIMIT',
])

/**
 * The words for a failure of work on images that were looked at before (`closed`), where it is that the secret of one of them does not
 * open it: then it is of opening that. Undefined for every other, and for a secret that is missing, which the work found.
 */
export function unlockFailure(
  filenames: readonly string[],
  error: unknown,
  { objects }: Session,
  exitCode?: number,
): CommandFailure | undefined {
  if (!(error instanceof Qcow2Error) || !UNLOCKING.has(error.code) || error.field === 'secret') return undefined
  const secret = filenames.filter(filename => objects.secretsOf(filename) !== undefined)
  const filename = secret.find(each => placeOf(each) === pathOf(error))
  return filename === undefined ? undefined : openFailure(filename, error, exitCode)
}

/**
 * The id of the snapshot that `-l` means: an id or a name, or `snapshot.id=ID,snapshot.name=NAME` with either or both,
 * which must then match.
 */
export async function snapshotOf(
  filename: string,
  format: Format,
  parameter: string | undefined,
  forceShare: boolean | undefined,
  session: Session,
): Promise<string | Buffer | undefined> {
  if (parameter === undefined) return undefined
  if (!can(format, 'snapshots')) {
    throw new CommandFailure(`Failed to load snapshot: '${filename}' is ${format}, and has no snapshots`)
  }
  if (!parameter.startsWith('snapshot.')) return toName(parameter)
  const wanted = new Map(parameter.split(',').map(part => part.split(/=(.*)/s, 2) as [string, string | undefined]))
  const id = wanted.get('snapshot.id')
  const name = wanted.get('snapshot.name')
  if ([...wanted.keys()].some(key => key !== 'snapshot.id' && key !== 'snapshot.name') || (!id && !name)) {
    throw new CommandFailure(`Failed in parsing snapshot param '${parameter}'`)
  }
  const looking = { filename, format, references: 'layer', forceShare, closed: true } as const
  const found = await withImage(looking, session, async image => {
    const { snapshots } = await image.info({ bigint: true })
    return snapshots.find(
      each =>
        (id === undefined || exactText(each.id, each.idBytes) === id) &&
        (name === undefined || exactText(each.name, each.nameBytes) === name),
    )
  })
  if (!found) throw new CommandFailure(`Failed to load snapshot: Can't find snapshot '${id ?? name}'`)
  return found.idBytes ?? found.id
}
