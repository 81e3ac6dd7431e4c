/**
 * The state of a virtual machine that a qcow2 image keeps behind its disk: for the command line, which is asked for it. What it is to
 * mean is between its writer and its reader.
 */

import { type Addon, native } from './native.js'
import { ownerOf } from './support/owner.js'
import { submit, toError } from './support/requests.js'

/** Fills the buffer with the state from its byte `position` on; what was never written is zero. */
export async function readVmState(image: object, buffer: Uint8Array, position: number): Promise<void> {
  const owner = ownerOf(image)
  await owner?.read(() => run(buffer, (number, addon) => addon.readVmState(number, owner.image, buffer, position)))
}

/** Writes the buffer to the state, from its byte `position` on. */
export async function writeVmState(image: object, buffer: Uint8Array, position: number): Promise<void> {
  const owner = ownerOf(image)
  await owner?.change('writeVmState', undefined, () =>
    run(buffer, (number, addon) => addon.writeVmState(number, owner.image, buffer, position)),
  )
}

/** A request that uses the buffer, which is kept until it is delivered. */
async function run(buffer: Uint8Array, start: (request: number, addon: Addon) => void): Promise<void> {
  try {
    await submit<void>(number => start(number, native), buffer)
  } catch (failure) {
    throw toError(failure)
  }
}
