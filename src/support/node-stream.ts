import type { Stream } from 'node:stream'
import { AbortError } from '../errors.js'
import { onAbort } from './signals.js'

/** Node's streams, loaded when the first one is made: few callers need them, and they take longer to load than the library. */
export const nodeStream = (): typeof import('node:stream') => require('node:stream') as typeof import('node:stream')

/** Destroys the stream when the signal comes. Node's own option adds a listener for each stream, and takes more than ten for a leak. */
export function endedBy<T extends Stream & { destroy(error: Error): unknown }>(
  stream: T,
  signal: AbortSignal | undefined,
): T {
  const forget = onAbort(signal, () => stream.destroy(new AbortError(signal?.reason)))
  stream.once('close', forget)
  return stream
}
