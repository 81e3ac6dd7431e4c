/** Reads of a file by Node itself, for what is no image of this library's. */

import type { FileBytes } from '../formats/sizes.js'
import type { ArrivingLocated, FileLocated, Part } from '../source.js'
import { closeDescriptor, descriptorStat, openDescriptor, readDescriptor } from '../support/files.js'
import { toName } from '../text.js'

/** Runs `work` on the bytes of a file, which is closed behind it; a descriptor stays the caller's. */
export async function withFileBytes<T>(
  located: FileLocated | ArrivingLocated,
  work: (bytes: FileBytes) => Promise<T>,
): Promise<T> {
  const { part } = located
  const read = (bytes: FileBytes): Promise<T> => work(part === undefined ? bytes : partOf(bytes, part))
  if ('arriving' in located) return read(located.arriving.bytes)
  if ('descriptor' in located) return read(await bytesOf(located.descriptor))
  const descriptor = await openDescriptor(toName(located.path), 'r')
  try {
    return await read(await bytesOf(descriptor))
  } finally {
    await closeDescriptor(descriptor)
  }
}

async function bytesOf(descriptor: number): Promise<FileBytes> {
  const { size } = await descriptorStat(descriptor)
  return {
    length: size,
    async at(position, length) {
      const buffer = Buffer.alloc(length)
      let done = 0
      while (done < length) {
        const { bytesRead } = await readDescriptor(descriptor, buffer, done, length - done, position + done)
        if (bytesRead === 0) break
        done += bytesRead
      }
      return buffer.subarray(0, done)
    },
  }
}

/** The bytes of a part of a file. */
export const partOf = (file: FileBytes, { offset, length }: Part): FileBytes => ({
  length: file.length === undefined ? length : Math.max(0, Math.min(length, file.length - offset)),
  at: (position, wanted) => file.at(offset + position, Math.max(0, Math.min(wanted, length - position))),
})

/** The bytes that there are, of a file that is not known further. */
export const prefixBytes = (bytes: Buffer): FileBytes => ({
  length: undefined,
  at: (position, length) => Promise.resolve(bytes.subarray(position, position + length)),
})
