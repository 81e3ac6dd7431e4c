/** Requests on the disk, refused where QEMU refuses them. */

import type { Size } from '../../index.js'
import { toBytes } from '../../units.js'
import { readVmState as readState, writeVmState as writeState } from '../../vm-state.js'
import { toSize } from '../size.js'
import type { OpenDisk } from './disk.js'
import type { Range } from './numbers.js'

/** An error by its name in the system. */
const systemError = (code: string, message: string): Error => Object.assign(new Error(message), { code })

/** A range that is on the disk, as the library takes it. */
function inside({ image }: OpenDisk, { offset, length }: Range): { position: Size; length: number } {
  if (offset + length > image.virtualSizeBigInt) throw systemError('EIO', 'the range reaches beyond the disk')
  return { position: toSize(offset), length: Number(length) }
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
  inside(disk, range)
  const { clusterSize, formatSpecific } = disk.info
  if (clusterSize === undefined) return false
  if (formatSpecific?.compat === '0.10') return true
  const unit = BigInt(formatSpecific?.extendedL2 ? clusterSize / SUBCLUSTERS : clusterSize)
  const size = disk.image.virtualSizeBigInt
  const parts = [range.offset, range.offset + range.length].filter(at => at % unit !== 0n && at !== size)
  for (const start of parts.map(at => at - (at % unit))) {
    const length = start + unit < size ? unit : size - start
    for await (const entry of disk.image.map({ start: toSize(start), length: toSize(length), bigint: true })) {
      if (entry.present && !entry.zero) return true
    }
  }
  return false
}

/** Bytes of the disk that one L2 table maps. */
function tableReach({ info }: OpenDisk): bigint {
  const { clusterSize = 0, formatSpecific } = info
  return BigInt(clusterSize) * BigInt(clusterSize / (formatSpecific?.extendedL2 ? 16 : 8))
}

/** Where the state of a virtual machine begins, in the addresses of the disk: behind it, with an L2 table of its own. */
export function vmStateOffset(disk: OpenDisk): bigint {
  if (disk.info.formatSpecific === undefined) return 0n
  const reach = tableReach(disk)
  return ((disk.image.virtualSizeBigInt + reach - 1n) / reach) * reach
}

/** Other formats have none. */
function checkVmState({ info }: OpenDisk): void {
  if (info.formatSpecific === undefined) throw systemError('ENOTSUP', 'this format holds no state of virtual machines')
}

export async function readVmState(disk: OpenDisk, { offset, length }: Range): Promise<Uint8Array> {
  checkVmState(disk)
  const buffer = Buffer.allocUnsafeSlow(Number(length))
  await readState(disk.image, buffer, toBytes(toSize(offset), 'offset'))
  return buffer
}

export async function writeVmState(disk: OpenDisk, { offset }: Range, bytes: Uint8Array): Promise<void> {
  checkVmState(disk)
  await writeState(disk.image, bytes, toBytes(toSize(offset), 'offset'))
}
