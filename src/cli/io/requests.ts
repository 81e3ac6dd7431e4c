/** Requests on the disk, refused where QEMU refuses them. */

import { isPlain } from '../../formats/table.js'
import type { OpenDisk } from './disk.js'
import type { Range } from './numbers.js'

/** An error by its name in the system. */
const systemError = (code: string, message: string): Error => Object.assign(new Error(message), { code })

/** A range that is on the disk, as numbers. */
function inside({ image }: OpenDisk, { offset, length }: Range): { position: number; length: number } {
  if (offset + length > BigInt(image.virtualSize)) throw systemError('EIO', 'the range reaches beyond the disk')
  return { position: Number(offset), length: Number(length) }
}

export async function readRange(disk: OpenDisk, range: Range): Promise<Uint8Array> {
  const { position, length } = inside(disk, range)
  const { buffer } = await disk.image.read(Buffer.allocUnsafeSlow(length), { position })
  return buffer
}

export async function writeRange(
  disk: OpenDisk,
  range: Range,
  bytes: Uint8Array,
  { compressed, durable }: { compressed: boolean; durable: boolean },
): Promise<void> {
  const { position } = inside(disk, range)
  await disk.image.write(bytes, { position, compressed })
  if (durable) await disk.image.datasync()
}

export async function zeroRange(disk: OpenDisk, range: Range, unmap: boolean, durable: boolean): Promise<void> {
  const { position, length } = inside(disk, range)
  await disk.image.writeZeroes(position, length, { unmap })
  if (durable) await disk.image.datasync()
}

export async function discardRange(disk: OpenDisk, range: Range): Promise<void> {
  const { position, length } = inside(disk, range)
  await disk.image.discard(position, length)
}

const SUBCLUSTERS = 32

/** Whether zeroes cannot be written there without writing data: in parts of clusters that have some. */
export async function needsData(disk: OpenDisk, range: Range): Promise<boolean> {
  const { position, length } = inside(disk, range)
  const { clusterSize, formatSpecific } = disk.info
  if (clusterSize === undefined) return false
  if (formatSpecific?.compat === '0.10') return true
  const unit = formatSpecific?.extendedL2 ? clusterSize / SUBCLUSTERS : clusterSize
  const end = position + length
  const size = disk.image.virtualSize
  const parts = [position, end].filter(at => at % unit !== 0 && at !== size).map(at => at - (at % unit))
  for (const start of parts) {
    for await (const entry of disk.image.map({ start, length: Math.min(unit, size - start) })) {
      if (entry.present && !entry.zero) return true
    }
  }
  return false
}

/** Bytes of the disk that one L2 table maps. */
function tableReach({ info }: OpenDisk): number {
  const { clusterSize = 0, formatSpecific } = info
  return clusterSize * (clusterSize / (formatSpecific?.extendedL2 ? 16 : 8))
}

/** Where the state of a virtual machine begins, in the addresses of the disk: behind it, with an L2 table of its own. */
export function vmStateOffset(disk: OpenDisk): number {
  const reach = tableReach(disk)
  return isPlain(disk.info.format) || reach === 0 ? 0 : Math.ceil(disk.image.virtualSize / reach) * reach
}

const noVmState = (): Error => systemError('ENOTSUP', 'the state of virtual machines is not read or written')

export async function readVmState(_disk: OpenDisk, _range: Range): Promise<Uint8Array> {
  throw noVmState()
}

export async function writeVmState(_disk: OpenDisk, _range: Range, _bytes: Uint8Array): Promise<void> {
  throw noVmState()
}
