/** Bodies of answers: as many bytes as were asked for, and no more. */

import type { Qcow2Error } from '../errors.js'
import { failed, passing, type RequestPlace } from './failures.js'
import type { Attempt } from './retry.js'

export const wrongAnswer = (what: string, place: RequestPlace): Qcow2Error =>
  failed('ERR_QCOW2_IO', `the server answered with ${what}`, place)

/** Where a body goes. */
export interface BodyTarget {
  readonly buffer: Uint8Array
  /** What is in the buffer already. */
  readonly start: number
  readonly attempt: Attempt
  readonly place: RequestPlace
  /** Told how many bytes have come. */
  readonly came?: (count: number) => void
}

/** Fills the buffer from `start` on. What ends early can be asked for again. */
export async function readBody(
  body: AsyncIterable<Uint8Array> | readonly Uint8Array[],
  { buffer, start, attempt, place, came }: BodyTarget,
): Promise<void> {
  attempt.answered()
  const wanted = buffer.length - start
  let at = start
  for await (const chunk of body) {
    if (chunk.length > buffer.length - at) throw wrongAnswer(`more bytes than the ${wanted} that it announced`, place)
    buffer.set(chunk, at)
    at += chunk.length
    came?.(chunk.length)
    attempt.heard(chunk.length)
  }
  if (at < buffer.length) {
    throw passing('ERR_QCOW2_IO', `the answer ended after ${at - start} of ${wanted} bytes`, place)
  }
}
