/**
 * Callers' buffers. The contract is Node's own: do not touch or transfer a buffer until the promise settles. A worker fills the
 * memory directly, so the memory must stay where it is:
 *
 * - a detached buffer is refused, not read as empty
 * - a resizable `ArrayBuffer` is refused: shrinking it would take the memory away
 * - a `SharedArrayBuffer` is accepted, a growable one too: it never shrinks, and other threads that watch it see the bytes
 *   come in no particular order
 */

import { invalidArgument } from '../errors.js'
import { describe } from '../units.js'

/** The bytes of a view. `name` is the argument's, for the message. */
export function toBytesView(buffer: unknown, name: string): Uint8Array {
  if (!ArrayBuffer.isView(buffer)) {
    throw invalidArgument(name, `${name} must be a Buffer, TypedArray or DataView, not ${describe(buffer)}`)
  }
  const memory = buffer.buffer
  if ('resizable' in memory && memory.resizable === true) {
    throw invalidArgument(
      name,
      `${name} is a view of a resizable ArrayBuffer, whose memory can go away during a request`,
    )
  }
  if (buffer.byteLength === 0 && isDetached(memory)) {
    throw invalidArgument(name, `${name} is detached: its memory was transferred elsewhere`)
  }
  return buffer instanceof Uint8Array ? buffer : new Uint8Array(memory, buffer.byteOffset, buffer.byteLength)
}

function isDetached(memory: ArrayBufferLike): boolean {
  try {
    // The one thing that tells in every supported version of Node.
    new Uint8Array(memory)
    return false
  } catch {
    return true
  }
}
