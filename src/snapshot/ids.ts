/** Ids and names of snapshots, by QEMU's rules. */

import { invalidArgument, Qcow2Error } from '../errors.js'
import { storedName } from '../options.js'
import { encodeText, exactName, findName, type Name } from '../text.js'
import { describe } from '../units.js'
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
 * @throws {@link Qcow2Error} `ERR_QCOW2_NO_SNAPSHOT`; `ERR_QCOW2_INVALID_ARGUMENT` for a text by which snapshots with different names
 *   are shown
 */
export function findSnapshot(records: readonly SnapshotRecord[], wanted: Name): number {
  if (typeof wanted !== 'string' && !((wanted as unknown) instanceof Uint8Array)) {
    throw invalidArgument('idOrName', `idOrName must be a string or a Uint8Array, not ${describe(wanted)}`)
  }
  const ambiguous = (): Error => {
    const message = `several snapshots are shown as '${wanted}', for their names are not UTF-8: say the id, or the bytes of the name (nameBytes)`
    return invalidArgument('idOrName', message)
  }
  const byId = findName(
    records.map(({ id }) => id),
    wanted,
    ambiguous,
  )
  if (byId >= 0) return byId
  const byName = findName(
    records.map(({ name }) => name),
    wanted,
    ambiguous,
  )
  if (byName >= 0) return byName
  throw new Qcow2Error('ERR_QCOW2_NO_SNAPSHOT', `no snapshot has the id or name '${exactName(wanted)}'`)
}

/** The name, if a snapshot can have it. */
export function checkName(given: unknown, what: string): string {
  const name = storedName(given, what)
  const { length } = encodeText(name)
  if (length > MAX_NAME_BYTES) throw invalidArgument(what, `${what} has ${length} bytes, more than ${MAX_NAME_BYTES}`)
  return name
}
