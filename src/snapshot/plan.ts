/**
 * Plans of snapshot operations: pure functions from the table and a request to the steps that the engine executes. Refcounts and
 * tables are written beside those that the image has, made durable, and become the image's with one write: the switch. A plan that
 * stops before it leaves the old image, behind it the new one, and leaked clusters at worst.
 */

import type { Name } from '../text.js'
import { findSnapshot, nextId } from './ids.js'
import type { NewSnapshot, Plan, SnapshotTable, Step, TableEntry } from './types.js'

const barrier: Step = { op: 'barrier' }

const kept = (table: SnapshotTable): TableEntry[] => table.records.map((_, keep) => ({ keep }))

/** Makes what was written the image's, and frees what it replaces. */
const swap: readonly Step[] = [barrier, { op: 'switch' }, barrier]

/** A snapshot of the active disk. */
export function planCreate(
  table: SnapshotTable,
  request: { readonly name: string; readonly date: Date },
): Plan & { readonly created: NewSnapshot } {
  const milliseconds = request.date.getTime()
  const created = {
    id: nextId(table.records),
    name: request.name,
    dateSec: Math.floor(milliseconds / 1000),
    dateNsec: (milliseconds % 1000) * 1_000_000,
  }
  const steps: Step[] = [
    { op: 'check-references', tree: 'active' },
    { op: 'fork' },
    // First, so that it takes the lowest place: QEMU has it there.
    { op: 'write-table', entries: [...kept(table), { create: created }] },
    { op: 'share', tree: 'active' },
    ...swap,
  ]
  return { generation: table.generation, steps, created }
}

/** The active disk becomes what the snapshot holds; the snapshot stays. */
export function planApply(table: SnapshotTable, idOrName: Name): Plan {
  const tree = findSnapshot(table.records, idOrName)
  const steps: Step[] = [
    { op: 'check-references', tree },
    { op: 'fork' },
    { op: 'share', tree },
    { op: 'drop', tree: 'active' },
    ...swap,
    { op: 'free' },
  ]
  return { generation: table.generation, steps }
}

/** The snapshot goes; what only it referred to is freed. */
export function planDelete(table: SnapshotTable, idOrName: Name): Plan {
  const tree = findSnapshot(table.records, idOrName)
  const steps: Step[] = [
    { op: 'fork' },
    { op: 'write-table', entries: kept(table).filter((_, index) => index !== tree) },
    { op: 'drop', tree },
    { op: 'restore-copied' },
    ...swap,
    { op: 'free' },
  ]
  return { generation: table.generation, steps }
}

/** The snapshot gets another name. */
export function planRename(table: SnapshotTable, idOrName: Name, name: string): Plan {
  const index = findSnapshot(table.records, idOrName)
  const entries = kept(table).map((entry, i) => (i === index ? { keep: i, rename: name } : entry))
  return { generation: table.generation, steps: [{ op: 'write-table', entries }, ...swap] }
}
