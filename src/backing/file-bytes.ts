/** Reads of a file by Node itself, for what is no image of this library's. */

import { fstat, read } from 'node:fs'
import { open } from 'node:fs/promises'
import { promisify } from 'node:util'
import type { FileBytes } from '../formats/sizes.js'
import type { Located } from '../source.js'

const readAt = promisify(read)
const statOf = promisify(fstat)

/** Runs `work` on the bytes of a file, which is closed behind it; a descriptor stays the caller's. */
export async function withFileBytes<T>(located: Located, work: (bytes: FileBytes) => Promise<T>): Promise<T> {
  if ('descriptor' in located) return work(await bytesOf(located.descriptor))
  const file = await open(located.path, 'r')
  try {
    return await work(await bytesOf(file.fd))
  } finally {
    await file.close()
  }
}

async function bytesOf(descriptor: number): Promise<FileBytes> {
  const { size } = await statOf(descriptor)
  return {
    length: size,
    async at(position, length) {
      const buffer = Buffer.alloc(length)
      let done = 0
      while (done < length) {
        const { bytesRead } = await readAt(descriptor, buffer, done, length - done, position + done)
        if (bytesRead === 0) break
        done += bytesRead
      }
      return buffer.subarray(0, done)
    },
  }
}

/** The bytes that there are, of a file that is not known further. */
export const prefixBytes = (bytes: Buffer): FileBytes => ({
  length: undefined,
  at: (position, length) => Promise.resolve(bytes.subarray(position, position + length)),
})
