/** Raw disks in compressed files: a convert reads them, front to back. */

import { type Access, lockFor } from '../access.js'
import { Qcow2Error } from '../errors.js'
import { isTar } from '../formats/ova.js'
import { detectFormat } from '../formats/probe.js'
import { isStream, type StreamFormat } from '../formats/table.js'
import type { NativeFile, NativeLayer, NativeStream } from '../native.js'
import type { LongRunning, ReadLimits } from '../options.js'
import { release } from '../source.js'
import { runJob } from '../support/jobs.js'

/** How a compressed file is opened, where one is taken at all. */
export interface StreamReading extends Pick<LongRunning, 'onProgress' | 'progressInterval' | 'signal'> {
  /** Bytes of the disk, where the caller knows. */
  readonly size?: number | undefined
  /** Throws where what is done with the disk cannot be done front to back. */
  judge(format: StreamFormat): void
  /** How the caller says that what is in the file is a raw disk, whatever that begins with. */
  say(format: StreamFormat): string
}

/** How a file is compressed: as the caller says, else by its magic. */
export function streamOf(given: string | undefined, { head }: NativeFile): StreamFormat | undefined {
  const format = given ?? detectFormat(head)
  return isStream(format) ? format : undefined
}

/**
 * Opens the disk in a compressed file. Where the caller did not say how it is compressed, and so that there is a raw disk in it, one
 * that begins as an image or an archive is refused: its bytes are not those of the disk.
 */
export async function openStream(
  { file, path }: NativeFile,
  format: StreamFormat,
  { named, limits, access, streams }: OpenStreamOptions,
): Promise<NativeLayer> {
  streams.judge(format)
  const lock = lockFor(access)
  const options = { lock, size: streams.size, ...(limits !== undefined && { limits }) }
  const { layer, virtualSize, head } = await runJob<NativeStream>('convert', streams, (number, job, addon) =>
    addon.openStream(number, job, file, format, options),
  )
  const inside = named ? undefined : contentsOf(head)
  if (inside === undefined) return { layer, virtualSize, extents: [] }
  await release(layer)
  const message =
    `${path === undefined ? '' : `${path}: `}the ${format} data holds ${inside}, and no raw disk: decompress it first ` +
    `(${streams.say(format)} takes its bytes for those of a disk)`
  throw new Qcow2Error('ERR_QCOW2_FORMAT_UNKNOWN', message, { path, field: 'magic' })
}

interface OpenStreamOptions {
  /** The caller said how it is compressed. */
  readonly named: boolean
  readonly limits: ReadLimits | undefined
  readonly access: Access
  readonly streams: StreamReading
}

/** What bytes are that are not a disk's. */
function contentsOf(head: Buffer): string | undefined {
  const format = detectFormat(head)
  if (isStream(format)) return `${format} data`
  if (format !== undefined) return `a ${format} image`
  return isTar(head) ? 'a tar archive' : undefined
}

/** What a compressed file is refused with by everything but a convert. */
export const streamRefusal = (format: StreamFormat): string =>
  `compressed with ${format}, which only a convert reads: convert it first, or decompress it`
