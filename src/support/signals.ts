/** Waiting for an `AbortSignal`, and for what a caller's function returns. */

import { AbortError } from '../errors.js'

/**
 * What waits for a signal. A signal has one listener of this library's at most, however many calls it was given to: Node takes more
 * than ten for a leak, and warns.
 */
const waiting = new WeakMap<AbortSignal, { readonly acts: Set<() => void>; readonly listener: () => void }>()

/** Calls `act`, which throws nothing, when the signal is aborted; now, if it is. What is returned takes that back. */
export function onAbort(signal: AbortSignal | undefined, act: () => void): () => void {
  if (signal === undefined) return () => {}
  if (signal.aborted) {
    act()
    return () => {}
  }
  // Two calls may give the same function.
  const own = (): void => act()
  const { acts } = waiting.get(signal) ?? listen(signal)
  acts.add(own)
  return () => {
    acts.delete(own)
    if (acts.size === 0) forget(signal)
  }
}

function listen(signal: AbortSignal) {
  const acts = new Set<() => void>()
  const listener = (): void => {
    waiting.delete(signal)
    for (const act of acts) act()
  }
  const entry = { acts, listener }
  waiting.set(signal, entry)
  signal.addEventListener('abort', listener, { once: true })
  return entry
}

function forget(signal: AbortSignal): void {
  const entry = waiting.get(signal)
  if (entry === undefined || entry.acts.size > 0) return
  waiting.delete(signal)
  signal.removeEventListener('abort', entry.listener)
}

/**
 * What the caller's function says, which can take as long as it likes, unless the signal comes first: what becomes of it then is
 * nobody's concern.
 */
export async function answer<T>(ask: () => T | PromiseLike<T>, signal: AbortSignal | undefined): Promise<T> {
  const asked = (async () => ask())()
  if (signal === undefined) return asked
  let stop = (): void => {}
  const aborted = new Promise<never>((_, reject) => {
    stop = onAbort(signal, () => reject(new AbortError(signal.reason)))
  })
  try {
    return await Promise.race([aborted, asked])
  } finally {
    stop()
  }
}
