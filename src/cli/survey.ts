/** The extents of an image for what draws them, and where a drawing may be written. */

import type { Image } from '../index.js'
import { exactStat } from '../support/files.js'
import { exactText, toName } from '../text.js'
import { CommandFailure } from './failure.js'
import type { Allocation, DiskCaption } from './format/allocation.js'
import type { MapExtent } from './format/map.js'
import type { Session } from './session.js'

/** Guest bytes. */
export interface Range {
  readonly start: number
  readonly length: number
}

/** The extents of a range, with bigints where numbers would not be exact. */
export function extentsOf(image: Image, range: Range, { signal }: Session): AsyncIterable<MapExtent<number | bigint>> {
  const [start, length] = [BigInt(range.start), BigInt(range.length)]
  const asked = { start, length, signal }
  return Number.isSafeInteger(range.start + range.length) ? image.map(asked) : image.map({ ...asked, bigint: true })
}

/** What extents are summed up in. */
export type Sink = Pick<Allocation, 'add'>

/** Shows every extent of a range to all sinks. */
export async function survey(image: Image, range: Range, sinks: readonly Sink[], session: Session): Promise<void> {
  if (range.length === 0) return
  for await (const extent of extentsOf(image, range, session)) {
    const { start, length, offset } = extent
    const drawn = {
      ...extent,
      start: Number(start),
      length: Number(length),
      offset: offset === undefined ? undefined : Number(offset),
    }
    for (const sink of sinks) sink.add(drawn)
  }
}

/** What the pictures say about the disk as a whole. */
export async function captionOf(filename: string, image: Image): Promise<DiskCaption> {
  const [top, ...below] = await image.chain({ bigint: true })
  if (top === undefined) throw new CommandFailure(`Could not open '${filename}': no layers`)
  return {
    filename,
    format: top.format,
    virtualSize: Number(top.virtualSize),
    clusterSize: top.clusterSize,
    fileSize: top.actualSize === undefined ? undefined : Number(top.actualSize),
    chain: [filename, ...below.map(layer => exactText(layer.filename, layer.filenameBytes))],
  }
}

/** What is drawn is not written over what it is of. */
export async function refuseFilesOf(image: Image, path: string, what: string): Promise<void> {
  const identity = async (name: string | Buffer): Promise<string | undefined> => {
    const found = await exactStat(name).catch(() => undefined)
    return found && `${found.dev}:${found.ino}`
  }
  const written = await identity(toName(path))
  if (written === undefined) return
  const files = (await image.chain({ bigint: true })).flatMap(({ filename, filenameBytes, formatSpecific }) => [
    filenameBytes ?? filename,
    formatSpecific?.dataFileBytes ?? formatSpecific?.dataFile ?? '',
  ])
  for (const name of files) {
    if ((await identity(name)) === written) {
      throw new CommandFailure(`'${path}' is a file of the image: the ${what} is not written over it`)
    }
  }
}
