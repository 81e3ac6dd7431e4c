/** Ids and names of snapshots, by QEMU's rules. */

import { invalidArgument, Qcow2Error } from '../errors.js'
import type { SnapshotRecord } from './types.js'

/** Longest name in bytes: the table has 16 bits for it. */
const MAX_NAME_BYTES = 65535

/** The id of the next snapshot: one more than the largest number among the ids. */
export function nextId(records: readonly SnapshotRecord[]): string {
  let largest = 0n
  for (const { id } of records) {
    const number = BigInt(/^\d+/.exec(id)?.[0] ?? 0)
    if (number > largest) largest = number
  }
  return String(largest + 1n)
}

/**
 * The index of the snapshot with this id, else with this name (the first of several), as qemu-img looks.
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_NO_SNAPSHOT`
 */
export function findSnapshot(records: readonly SnapshotRecord[], idOrName: string): number {
  const byId = records.findIndex(({ id }) => id === idOrName)
  const found = byId >= 0 ? byId : records.findIndex(({ name }) => name === idOrName)
  if (found < 0) throw new Qcow2Error('ERR_QCOW2_NO_SNAPSHOT', `no snapshot has the id or name '${idOrName}'`)
  return found
}

/** The name, if a snapshot can have it. */
export function checkName(name: unknown, what: string): string {
  if (typeof name !== 'string') throw invalidArgument(what, `${what} must be a string`)
  if (name === '') throw invalidArgument(what, `${what} must not be empty`)
  if (name.includes('\0')) throw invalidArgument(what, `${what} must not contain a null byte`)
  const length = Buffer.byteLength(name)
  if (length > MAX_NAME_BYTES) throw invalidArgument(what, `${what} has ${length} bytes, more than ${MAX_NAME_BYTES}`)
  return name
}
