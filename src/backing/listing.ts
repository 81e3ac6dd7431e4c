/** What an appliance, or a descriptor by itself, has in all: for who is to choose. */

import { Qcow2Error } from '../errors.js'
import { manifestBeside } from '../formats/manifest.js'
import { isOva, isOvf } from '../formats/ova.js'
import { detectFormat } from '../formats/probe.js'
import type { FileBytes } from '../formats/sizes.js'
import { type FormatName, PLAIN_FORMAT } from '../formats/table.js'
import type { FileLocated } from '../source.js'
import { fileStat } from '../support/files.js'
import { toName } from '../text.js'
import { type Appliance, applianceIn, fileOf, isOf, type OvfDisk, readDescriptor } from './appliance.js'
import { withFileBytes } from './file-bytes.js'
import { readExtentName } from './filename.js'

/** A disk of an appliance. */
export interface ListedDisk {
  /** What the descriptor says of it, where it does. */
  readonly listed?: OvfDisk<number | bigint>
  /** The name of its file; absent of a disk that is empty. */
  readonly file?: string
  /** The file, where it is there. */
  readonly found?: FoundFile
}

/** A file of a disk. */
export interface FoundFile {
  /** Bytes. */
  readonly length: number
  /** What it looks like. */
  readonly format: FormatName
  /** Where it lies, unless that is in the archive. */
  readonly path?: string
}

/** What an appliance has. */
export interface Listing {
  readonly kind: 'ova' | 'ovf'
  /** In the descriptor's order; then the images that it does not list. */
  readonly disks: readonly ListedDisk[]
  /** The name of its manifest, where there is one. */
  readonly manifest?: string
  /** Why nothing is known of the descriptor. */
  readonly damage?: Qcow2Error
}

/** Lists the disks of a file, if it is an appliance or a descriptor. Of a descriptor, the files that it names are looked at: a caller typed it. */
export async function listAppliance(located: FileLocated): Promise<Listing | undefined> {
  return await withFileBytes(located, async bytes => {
    const head = await bytes.at(0, 1024)
    if (isOva(head)) return listArchive(await applianceIn(bytes))
    if (!isOvf(head)) return undefined
    return await listBeside(bytes, 'path' in located ? located.path : undefined)
  })
}

function listArchive({ disks, descriptor, manifest, damage }: Appliance): Listing {
  const images = disks.map(({ name, length, format }) => ({ name, found: { length, format } }))
  const listed = descriptor.map(each => {
    const image = images.find(one => isOf(each, one))
    const file = image?.name ?? fileOf(each)
    return { listed: each, ...(file !== undefined && { file }), ...(image && { found: image.found }) }
  })
  const rest = images.filter(({ name }) => !listed.some(({ file }) => file === name))
  const others = rest.map(({ name, found }) => ({ file: name, found }))
  const has = manifest === undefined ? {} : { manifest }
  return { kind: 'ova', disks: [...listed, ...others], ...has, ...(damage && { damage }) }
}

async function listBeside(bytes: FileBytes, path: string | undefined): Promise<Listing> {
  const manifest = manifestBeside(path)
  const has = (await lookBeside(manifest, path)) === undefined ? {} : { manifest }
  try {
    const disks: ListedDisk[] = []
    for (const listed of await readDescriptor(bytes)) {
      const file = fileOf(listed)
      const found = file === undefined ? undefined : await lookBeside(file, path)
      disks.push({ listed, ...(file !== undefined && { file }), ...(found && { found }) })
    }
    return { kind: 'ovf', disks, ...has }
  } catch (error) {
    if (!(error instanceof Qcow2Error)) throw error
    return { kind: 'ovf', disks: [], ...has, damage: error }
  }
}

/** A file in the descriptor's folder; undefined where there is none that may be looked at. */
async function lookBeside(file: string, from: string | undefined): Promise<FoundFile | undefined> {
  const name = readExtentName(file, from)
  if ('refused' in name) return undefined
  const { path } = name
  const stat = await fileStat(toName(path)).catch(() => undefined)
  if (!stat?.isFile()) return undefined
  const head = await withFileBytes({ path }, bytes => bytes.at(0, 1024)).catch(() => undefined)
  return head && { length: stat.size, format: detectFormat(head) ?? PLAIN_FORMAT, path }
}
