/** The disk in an appliance: an archive with one image is opened as that image, in place. */

import { Qcow2Error } from '../errors.js'
import { members } from '../formats/ova.js'
import { describeKnown, detectFormat } from '../formats/probe.js'
import type { FileBytes } from '../formats/sizes.js'
import { type FormatName, isFormat } from '../formats/table.js'
import type { NativeOvfDisk } from '../native.js'
import type { FileLocated, Located } from '../source.js'
import { request } from '../support/requests.js'
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

/** A disk that an OVF descriptor lists, in its words. Sizes are bytes; what is absent is not said. */
export interface OvfDisk<N extends number | bigint = number> {
  /** What the machine's devices call it. */
  readonly diskId: string
  /** The file of its contents; absent of an empty disk. Nothing of that name is opened. */
  readonly href?: string
  /** Bytes of that file. */
  readonly fileSize?: N
  /** How that file is compressed besides, as `gzip`. */
  readonly compression?: string
  /** Bytes of the disk. Absent also where whoever deploys the appliance is to choose. */
  readonly capacity?: N
  /** The URI of its format. */
  readonly format?: string
  /** Bytes that are in use. */
  readonly populatedSize?: N
  /** The disk that it is made on, by its `diskId`. */
  readonly parent?: string
}

/** What an appliance holds. */
export interface Appliance {
  /** Its images: those that the descriptor names first, in that order. */
  readonly disks: readonly ApplianceDisk[]
  readonly descriptor: readonly OvfDisk<number | bigint>[]
  /** Why nothing is known of the descriptor. */
  readonly damage?: Qcow2Error
}

/** Longest descriptor, in bytes, that is read. */
const MAX_DESCRIPTOR = 4 << 20

/** The disks that a descriptor lists, in its order. Throws `ERR_QCOW2_INVALID_HEADER` and `ERR_QCOW2_LIMIT`. */
export async function readDescriptor(bytes: FileBytes): Promise<readonly OvfDisk<number | bigint>[]> {
  const text = await bytes.at(0, MAX_DESCRIPTOR + 1)
  const disks = await request<NativeOvfDisk[]>((number, addon) => addon.readOvf(number, text))
  return disks.map(({ id, ...disk }) => ({ diskId: id, ...disk }))
}

/** The images among the members, and what the descriptor says. */
export async function applianceIn(file: FileBytes): Promise<Appliance> {
  const disks: ApplianceDisk[] = []
  let text: FileBytes | undefined
  for (const { name, offset, length } of await members(file)) {
    const bytes = partOf(file, { offset, length })
    if (text === undefined && /\.ovf$/i.test(name)) text = bytes
    const format = detectFormat(await bytes.at(0, 1024))
    if (format === undefined) continue
    const virtualSize = isFormat(format) ? undefined : (await describeKnown(bytes))?.virtualSize
    disks.push({ name, offset, length, format, ...(virtualSize !== undefined && { virtualSize }) })
  }
  if (text === undefined) return { disks, descriptor: [] }
  try {
    const descriptor = await readDescriptor(text)
    const place = (disk: ApplianceDisk): number => {
      const index = descriptor.findIndex(listed => isOf(listed, disk))
      return index < 0 ? descriptor.length : index
    }
    return { disks: [...disks].sort((a, b) => place(a) - place(b)), descriptor }
  } catch (error) {
    if (!(error instanceof Qcow2Error)) throw error
    return { disks, descriptor: [], damage: error }
  }
}

/** Whether a member is the file of a disk that the descriptor lists, by a URI relative to the descriptor. */
function isOf({ href }: OvfDisk<number | bigint>, { name }: ApplianceDisk): boolean {
  if (href === undefined || href === name) return href !== undefined
  try {
    return decodeURIComponent(href) === name
  } catch {
    return false
  }
}

function candidates(
  disks: readonly ApplianceDisk[],
  descriptor: Appliance['descriptor'],
  member: string | undefined,
): readonly ApplianceDisk[] {
  if (member !== undefined) return disks.filter(({ name }) => name === member)
  const listed = disks.filter(disk => descriptor.some(each => isOf(each, disk)))
  return listed.length > 0 ? listed : disks
}

/**
 * The disk of an appliance, as a part of its file: the one that the caller names; else the only one that the descriptor names, or that there
 * is where it names none. Of several, nobody but the caller can say which.
 */
export async function diskOf(
  located: Located,
  path: string | undefined,
): Promise<FileLocated & { readonly format: FormatName }> {
  const name = path ?? 'the appliance'
  if ('nbd' in located) throw refusal(path, `${name} is an appliance: its disks are read from a file only`)
  const { disks, descriptor } = await withFileBytes(located, applianceIn).catch((error: unknown) => {
    if (error instanceof RangeError) throw refusal(path, `${name}: ${error.message}`)
    throw error
  })
  const { member, ...whole } = located
  const [disk, ...others] = candidates(disks, descriptor, member)
  if (disk === undefined && member !== undefined && disks.length > 0) {
    throw refusal(
      path,
      `${name}: the appliance has no disk '${member}': there is ${disks.map(each => each.name).join(', ')}`,
    )
  }
  if (disk === undefined) throw refusal(path, `${name}: the appliance has no disk image that is known`)
  if (others.length > 0) {
    const list = disks.map(each => `${each.name} (offset ${each.offset}, length ${each.length})`).join(', ')
    const how = 'say which by its name (member), or by its offset and length'
    throw refusal(path, `${name}: the appliance has ${disks.length} disks, ${list}: ${how}`)
  }
  // The appliance can be a part of a file itself.
  const offset = (located.part?.offset ?? 0) + disk.offset
  return { ...whole, part: { offset, length: disk.length }, format: disk.format }
}

const refusal = (path: string | undefined, message: string): Qcow2Error =>
  new Qcow2Error('ERR_QCOW2_FORMAT_UNKNOWN', message, { path })
