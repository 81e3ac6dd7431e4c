/** The image that commands work on: how it is opened, and opened anew. */

import { rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { PLAIN_FORMAT } from '../../formats/table.js'
import { type CacheMode, create, type Image, type ImageInfo, type OpenOptions } from '../../index.js'
import { openFirstFit } from '../../open.js'
import { encodeText } from '../../text.js'
import { describeError, openHint } from '../errors.js'
import { CommandFailure } from '../failure.js'
import { localPath } from '../filename.js'
import { formatOf, openImage } from '../images.js'
import { NBD_DRIVER } from '../nbd-description.js'
import { settings } from '../options.js'
import type { Session } from '../session.js'
import { toSize } from '../size.js'
import { checkDriverOptions, type DriverOptions, l2CacheSize, readDriverOptions, type Shape } from './driver-options.js'

/** How an image is opened. */
export interface Opening {
  readonly filename: string
  readonly format: string | undefined
  readonly readOnly: boolean
  /** Writes go to an overlay that nobody keeps. */
  readonly snapshot: boolean
  readonly forceShare: boolean
  readonly cache: CacheMode
  readonly discard: 'ignore' | 'unmap'
  readonly options: DriverOptions
}

/** An open image. */
export interface OpenDisk {
  readonly how: Opening
  readonly image: Image
  /** The top as it was when it was opened. */
  readonly info: ImageInfo<bigint>
}

/** Opens an image. Failures say what is wrong, in QEMU's words, without the name of the program or of the image. */
export async function openDisk(how: Opening, session: Session): Promise<OpenDisk> {
  try {
    if (how.forceShare && !how.readOnly) {
      throw new CommandFailure('force-share=on can only be used with read-only images')
    }
    return await (how.snapshot ? openSnapshot(how, session) : openItself(how, session))
  } catch (error) {
    if (session.signal.aborted) throw error
    throw plainFailure(how.filename, error)
  }
}

/** What went wrong with a file of its own is said as it is; only the system's errors name the file again. */
export function plainFailure(filename: string, error: unknown): CommandFailure {
  if (error instanceof CommandFailure) {
    const prefix = /^Could not open '[^']*': /
    return new CommandFailure(error.message.replace(prefix, ''), {
      cause: error,
      ...(error.hint !== undefined && { hint: error.hint }),
    })
  }
  const hint = openHint(filename, error)
  return new CommandFailure(describeError(error), { cause: error, ...(hint !== undefined && { hint }) })
}

type Access = Omit<OpenOptions, 'format' | 'signal'>

async function openItself(how: Opening, session: Session): Promise<OpenDisk> {
  const cacheSize = l2CacheSize(how.options)
  const access: Access = {
    references: session.objects.references,
    secret: session.objects.secretsOf(how.filename),
    cache: how.cache,
    forceShare: how.forceShare,
    ...(cacheSize !== undefined && { l2CacheSize: toSize(cacheSize) }),
    ...(how.readOnly ? { flags: 'r' } : { flags: 'r+', discard: how.discard }),
  }
  const openAs = (as: Access) => openImage(how.filename, how.format, as, session, undefined, openFirstFit)
  const image = await openAs(access)
  const disk = await described(how, image)
  const { lazyRefcounts = false } = disk.info.formatSpecific ?? {}
  if (how.readOnly || !(how.options.get('lazy-refcounts') ?? lazyRefcounts)) return disk
  // As the image says, which is known only now.
  await image.close()
  return described(how, await openAs({ ...access, lazyRefcounts: true }))
}

/** Looks at an image that was opened, and checks options that depend on it. It is closed if they do not fit. */
async function described(how: Opening, image: Image): Promise<OpenDisk> {
  try {
    const info = await image.info({ bigint: true })
    const disk = { how, image, info }
    checkFor(disk, how.options)
    return disk
  } catch (error) {
    await image.close()
    throw error
  }
}

/** Opens a new overlay that has no name. */
async function openSnapshot(how: Opening, session: Session): Promise<OpenDisk> {
  const format = await formatOf(how.filename, how.format, session)
  const secret = session.objects.secretsOf(how.filename)
  const path = join(tmpdir(), `qcow2-io-${process.pid}-${process.hrtime.bigint()}.qcow2`)
  const backing = resolve(localPath(how.filename))
  // The command line may say what lies below the image: the overlay is what names the image now.
  session.objects.alsoAt(how.filename, backing)
  const image = await create(path, {
    backingFile: encodeText(backing),
    backingFormat: format,
    references: session.objects.references,
    ...(typeof secret === 'function' && {
      secret: layer => secret({ ...layer, depth: layer.depth - 1 }),
    }),
    signal: session.signal,
  })
  rmSync(path)
  return described({ ...how, options: new Map() }, image)
}

/** Refuses options that do not fit an image. */
export function checkFor({ info }: Pick<OpenDisk, 'info'>, options: DriverOptions): void {
  if (info.formatSpecific === undefined || options.size === 0) return
  const { clusterSize = 65536, virtualSize, formatSpecific } = info
  const shape: Shape = { clusterSize, virtualSize, version: formatSpecific.compat === '0.10' ? 2 : 3 }
  checkDriverOptions(options, shape)
}

/** Whether two ways to open an image differ in anything that is not only QEMU's. */
function differ(a: Opening, b: Opening): boolean {
  const lazy = ({ options }: Opening) => options.get('lazy-refcounts')
  return a.readOnly !== b.readOnly || a.cache !== b.cache || a.discard !== b.discard || lazy(a) !== lazy(b)
}

/** Opens an image in another way. It stays as it was if that fails. */
export async function reopenDisk(disk: OpenDisk, how: Opening, session: Session): Promise<OpenDisk> {
  checkFor(disk, how.options)
  // An overlay that has no name cannot be opened again; what it is written to is gone with the process anyway.
  if (how.snapshot || !differ(disk.how, how)) return { ...disk, how }
  await disk.image.close()
  try {
    return await openDisk(how, session)
  } catch (error) {
    const before = await openDisk(disk.how, session)
    throw new ReopenFailure(before, error)
  }
}

/** Reopening failed; the image is open as before, in another handle. */
export class ReopenFailure extends Error {
  readonly disk: OpenDisk

  constructor(disk: OpenDisk, cause: unknown) {
    super('the image could not be opened in another way', { cause })
    this.disk = disk
  }
}

/** Reads a list that describes an image, or adds to one that is named. */
export function describedBy(
  list: string,
  filename: string | undefined,
  session: Session,
): Pick<Opening, 'filename' | 'format' | 'options'> {
  const { values, others } = readDriverOptions(list)
  const exported = [others.get('driver'), others.get('file.driver')].includes(NBD_DRIVER)
  for (const name of exported ? [] : others.keys()) {
    if (/^(?:backing\.)*(?:encrypt\.[a-z-]+|key-secret|driver|(?:file\.)?filename|file\.driver)$/.test(name)) continue
    throw new CommandFailure(`Block format '${others.get('driver') ?? 'qcow2'}' does not support the option '${name}'`)
  }
  if (filename !== undefined) others.set('file.filename', filename)
  if (!exported && !others.has('file.filename') && !others.has('filename')) {
    throw new CommandFailure(
      settings(list).length === 0
        ? 'Must specify either driver or file'
        : 'A block device must be specified for "file"',
    )
  }
  const doubled = (value: string): string => value.replaceAll(',', ',,')
  const name = session.objects.describe([...others].map(([key, value]) => `${key}=${doubled(value)}`).join(','))
  const driver = others.get('driver')
  return { filename: name, format: driver === NBD_DRIVER ? PLAIN_FORMAT : driver, options: values }
}
