/** The disk in an appliance: an archive with one image is opened as that image, in place; of a bare descriptor, the file beside it. */

import { Qcow2Error } from '../errors.js'
import { manifestIn } from '../formats/manifest.js'
import { ArchiveLimit, eachMember, members } from '../formats/ova.js'
import { describeKnown, detectFormat } from '../formats/probe.js'
import type { FileBytes } from '../formats/sizes.js'
import { type FormatName, isFormat } from '../formats/table.js'
import type { NativeOvfDisk } from '../native.js'
import { type ArrivingLocated, type FileLocated, isRemote, type Located } from '../source.js'
import { request } from '../support/requests.js'
import { partOf, withFileBytes } from './file-bytes.js'
import { decide, type ReferencePolicy } from './policy.js'

/** An image in an archive. */
export interface ApplianceDisk {
  /** The member's name. */
  readonly name: string
  /** Bytes of the archive in front of it. */
  readonly offset: number
  /** Its length in bytes. */
  readonly length: number
  /** By its first bytes. */
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
  /** The name of its manifest, if it has one. */
  readonly manifest?: string
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
  const all = await members(file)
  for (const { name, offset, length } of all) {
    const bytes = partOf(file, { offset, length })
    if (text === undefined && /\.ovf$/i.test(name)) text = bytes
    const format = detectFormat(await bytes.at(0, 1024))
    if (format === undefined) continue
    const virtualSize = isFormat(format) ? undefined : (await describeKnown(bytes))?.virtualSize
    disks.push({ name, offset, length, format, ...(virtualSize !== undefined && { virtualSize }) })
  }
  const manifest = manifestIn(all.map(({ name }) => name))
  const has = manifest === undefined ? {} : { manifest }
  if (text === undefined) return { disks, descriptor: [], ...has }
  try {
    const descriptor = await readDescriptor(text)
    const place = (disk: ApplianceDisk): number => {
      const index = descriptor.findIndex(listed => isOf(listed, disk))
      return index < 0 ? descriptor.length : index
    }
    return { disks: [...disks].sort((a, b) => place(a) - place(b)), descriptor, ...has }
  } catch (error) {
    if (!(error instanceof Qcow2Error)) throw error
    return { disks, descriptor: [], ...has, damage: error }
  }
}

/**
 * The disk that is meant of an appliance that is still coming, as soon as its descriptor and the header of its member came: what lies behind is not waited
 * for. Undefined where the descriptor, which comes first, does not say which one that is.
 */
async function diskAsItComes(file: FileBytes, wanted: string | undefined): Promise<ApplianceDisk | undefined> {
  let listed: OvfDisk<number | bigint> | undefined
  for await (const { name, offset, length } of eachMember(file)) {
    const bytes = partOf(file, { offset, length })
    if (listed === undefined) {
      if (!/\.ovf$/i.test(name)) return undefined
      const disks = await readDescriptor(bytes).catch(() => [])
      const files = disks.filter(disk => disk.href !== undefined)
      const hasId = ({ diskId }: OvfDisk<number | bigint>): boolean => diskId === wanted
      const found = wanted === undefined ? files : meant(files, disk => fileOf(disk) === wanted, hasId)
      if (found.length !== 1 || found[0] === undefined) return undefined
      listed = found[0]
    } else if (isOf(listed, { name })) {
      const format = detectFormat(await bytes.at(0, 1024))
      return format === undefined ? undefined : { name, offset, length, format }
    }
  }
  return undefined
}

/** The file of a listed disk: what its URI, which is relative to the descriptor, says. */
export function fileOf({ href }: Pick<OvfDisk<number | bigint>, 'href'>): string | undefined {
  try {
    return href === undefined ? undefined : decodeURIComponent(href)
  } catch {
    return href
  }
}

/** Whether a member is the file of a disk that the descriptor lists. */
export const isOf = (listed: OvfDisk<number | bigint>, { name }: Pick<ApplianceDisk, 'name'>): boolean =>
  listed.href !== undefined && (listed.href === name || fileOf(listed) === name)

/** The disks that a caller means by a word: those whose file has that name, else those with that id. */
export function meant<T>(
  disks: readonly T[],
  isNamed: (disk: T) => boolean,
  hasId: (disk: T) => boolean,
): readonly T[] {
  const named = disks.filter(isNamed)
  return named.length > 0 ? named : disks.filter(hasId)
}

/** The images that can be meant: those with the name or the id that the caller says; else those that the descriptor lists; else all. */
function candidates(
  disks: readonly ApplianceDisk[],
  descriptor: Appliance['descriptor'],
  member: string | undefined,
): readonly ApplianceDisk[] {
  if (member !== undefined) {
    const hasId = (disk: ApplianceDisk): boolean => descriptor.some(each => each.diskId === member && isOf(each, disk))
    return meant(disks, ({ name }) => name === member, hasId)
  }
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
): Promise<(FileLocated | ArrivingLocated) & { readonly format: FormatName }> {
  const name = path ?? 'the appliance'
  if (isRemote(located)) throw refusal(path, `${name} is an appliance: its disks are read from a file only`)
  if ('arriving' in located) {
    const early = await diskAsItComes(located.arriving.bytes, located.member).catch(() => undefined)
    if (early !== undefined) {
      const { offset, length, format } = early
      return { arriving: located.arriving, part: { offset, length }, format }
    }
  }
  const { disks, descriptor } = await withFileBytes(located, applianceIn).catch((error: unknown) => {
    if (error instanceof RangeError) throw archiveError(error, path)
    throw error
  })
  const { member, ...whole } = located
  const places = disks.map(each => `${each.name} (offset ${each.offset}, length ${each.length})`).join(', ')
  const how = 'say which by its name (member), or by its offset and length'
  const names = disks.map(each => each.name)
  const disk = onlyOne(candidates(disks, descriptor, member), { name, path, member, names, places, how })
  // The appliance can be a part of a file itself.
  const offset = (located.part?.offset ?? 0) + disk.offset
  return { ...whole, part: { offset, length: disk.length }, format: disk.format }
}

/** What an appliance has, for who chose none of it. */
interface Choice {
  readonly name: string
  readonly path: string | undefined
  readonly member: string | undefined
  /** Of its disks. */
  readonly names: readonly string[]
  /** The same, and where they are. */
  readonly places: string
  readonly how: string
}

function onlyOne<T>(found: readonly T[], { name, path, member, names, places, how }: Choice): T {
  const [disk, ...others] = found
  if (disk === undefined && member !== undefined && names.length > 0) {
    throw refusal(path, `${name}: the appliance has no disk '${member}': there is ${names.join(', ')}`, 'member')
  }
  if (disk === undefined) throw refusal(path, `${name}: the appliance has no disk image that is known`)
  if (others.length > 0) {
    throw refusal(path, `${name}: the appliance has ${names.length} disks, ${places}: ${how}`, 'member')
  }
  return disk
}

/** Who decides whether the files of a bare descriptor are opened. */
export interface Beside {
  readonly policy: ReferencePolicy
  readonly signal: AbortSignal | undefined
}

/**
 * The disk of a descriptor that is a file by itself: a file in its folder, as a part of a disk is, and as the policy allows it. `'layer'` does
 * not: the descriptor holds nothing of a disk.
 */
export async function diskBeside(
  located: Located,
  path: string | undefined,
  { policy, signal }: Beside,
): Promise<{ readonly located: Located; readonly filename: string }> {
  const name = path ?? 'the descriptor'
  if (isRemote(located)) throw refusal(path, `${name} is an OVF descriptor: its disks are read from files only`)
  const descriptor = await withFileBytes(located, readDescriptor)
  const filename = chosenFile(descriptor, name, path, located.member)
  const next = await decide(policy, 'extent', { filename }, path, 'path' in located ? path : undefined, signal)
  if (next !== undefined) return { located: next, filename }
  const message = `${name}: references is 'layer', and of the disk '${filename}' the descriptor holds nothing`
  throw new Qcow2Error('ERR_QCOW2_REFERENCE_DENIED', message, { path, field: 'references' })
}

/** The file of the disk that is meant: the one that the caller names, else the only one with a file. */
function chosenFile(
  descriptor: Appliance['descriptor'],
  name: string,
  path: string | undefined,
  member: string | undefined,
): string {
  const files = descriptor.flatMap(disk => {
    const file = fileOf(disk)
    return file === undefined ? [] : [{ file, diskId: disk.diskId }]
  })
  const isNamed = ({ file }: (typeof files)[number]): boolean => member === undefined || file === member
  const found = meant(files, isNamed, ({ diskId }) => diskId === member)
  const names = files.map(({ file }) => file)
  const how = 'say which by its name (member)'
  return onlyOne(found, { name, path, member, names, places: names.join(', '), how }).file
}

/** An archive that cannot be read, as an error of its file. */
export function archiveError(error: RangeError, path: string | undefined): Qcow2Error {
  const code = error instanceof ArchiveLimit ? 'ERR_QCOW2_LIMIT' : 'ERR_QCOW2_FORMAT_UNKNOWN'
  return new Qcow2Error(code, `${path ?? 'the appliance'}: ${error.message}`, { path })
}

const refusal = (path: string | undefined, message: string, field?: string): Qcow2Error =>
  new Qcow2Error('ERR_QCOW2_FORMAT_UNKNOWN', message, { path, ...(field !== undefined && { field }) })
