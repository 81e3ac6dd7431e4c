/** The disk in an appliance: an archive with one image is opened as that image, in place. */

import { Qcow2Error } from '../errors.js'
import { members } from '../formats/ova.js'
import { describeKnown, detectFormat } from '../formats/probe.js'
import type { FileBytes } from '../formats/sizes.js'
import { type FormatName, isFormat } from '../formats/table.js'
import type { FileLocated, Located } from '../source.js'
import { partOf, withFileBytes } from './file-bytes.js'

/** An image in an archive. */
export interface ApplianceDisk {
  /** The member's name. */
  readonly name: string
  /** Bytes of the archive in front of it. */
  readonly offset: number
  /** Its length in bytes. */
  readonly length: number
  readonly format: FormatName
  /** Bytes of its disk, where its first bytes say that and its format is not opened. */
  readonly virtualSize?: number
}

/** The images among the members: those with the magic of a format. */
export async function disksIn(file: FileBytes): Promise<readonly ApplianceDisk[]> {
  const disks: ApplianceDisk[] = []
  for (const { name, offset, length } of await members(file)) {
    const bytes = partOf(file, { offset, length })
    const format = detectFormat(await bytes.at(0, 1024))
    if (format === undefined) continue
    const virtualSize = isFormat(format) ? undefined : (await describeKnown(bytes))?.virtualSize
    disks.push({ name, offset, length, format, ...(virtualSize !== undefined && { virtualSize }) })
  }
  return disks
}

/** The only disk of an appliance, as a part of its file. */
export async function onlyDiskOf(
  located: Located,
  path: string | undefined,
): Promise<FileLocated & { readonly format: FormatName }> {
  const name = path ?? 'the appliance'
  if ('nbd' in located) throw refusal(path, `${name} is an appliance: its disks are read from a file only`)
  const disks = await withFileBytes(located, disksIn).catch((error: unknown) => {
    if (error instanceof RangeError) throw refusal(path, `${name}: ${error.message}`)
    throw error
  })
  const [disk, ...others] = disks
  if (disk === undefined) throw refusal(path, `${name}: the appliance has no disk image that is known`)
  if (others.length > 0) {
    const list = disks.map(each => `${each.name} (offset ${each.offset}, length ${each.length})`).join(', ')
    const how = 'say which by its offset and length'
    throw refusal(path, `${name}: the appliance has ${disks.length} disks, ${list}: ${how}`)
  }
  // The appliance can be a part of a file itself.
  const offset = (located.part?.offset ?? 0) + disk.offset
  return { ...located, part: { offset, length: disk.length }, format: disk.format }
}

const refusal = (path: string | undefined, message: string): Qcow2Error =>
  new Qcow2Error('ERR_QCOW2_FORMAT_UNKNOWN', message, { path })
