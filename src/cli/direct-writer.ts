/** Writing to the process's own output without opening a stream for it, which takes a tenth of a short command's time. */

import { constants, fstatSync, openSync, writeSync } from 'node:fs'

/** Writes what the system takes at once, without waiting for a reader: how many of the bytes. Throws what the system says. */
export type DirectWriter = (bytes: Buffer) => number

/** Nothing, where only a stream knows how to write there: a terminal, a socket, another system than Linux. */
export function directWriter(descriptor: number): DirectWriter | undefined {
  if (process.platform !== 'linux') return undefined
  try {
    const stat = fstatSync(descriptor)
    if (stat.isFile()) return bytes => writeAll(descriptor, bytes)
    if (!stat.isFIFO()) return undefined
    // The pipe once more, by a description of our own: whoever shares the other one keeps it as it is.
    const flags = constants.O_WRONLY | constants.O_NONBLOCK
    const own = openSync(`/proc/self/fd/${descriptor}`, flags)
    return bytes => writeAll(own, bytes)
  } catch {
    return undefined
  }
}

function writeAll(descriptor: number, bytes: Buffer): number {
  let done = 0
  try {
    while (done < bytes.length) done += writeSync(descriptor, bytes, done)
  } catch (error) {
    // A pipe that is full: the rest waits in a stream.
    if ((error as NodeJS.ErrnoException).code !== 'EAGAIN') throw error
  }
  return done
}
