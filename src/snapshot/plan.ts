/**
 * Plans of snapshot operations: pure functions from the table and a request to the steps that the engine executes. The order
 * is what makes them safe: a plan that stops anywhere leaves the old image or the new one, and leaked clusters at worst.
 * References are counted before anything refers; what refers is gone, durably, before a count drops; COPIED flags, which only
 * save work, are cleared before sharing begins and set again after it has ended.
 */

import { findSnapshot, nextId } from './ids.js'
import type { NewSnapshot, Plan, SnapshotTable, Step, TableEntry } from './types.js'

const barrier: Step = { op: 'barrier' }

const kept = (table: SnapshotTable): TableEntry[] => table.records.map((_, keep) => ({ keep }))

/** Swaps the snapshot table. The former one is free afterwards. */
const swapTable = (entries: readonly TableEntry[]): Step[] => [
  { op: 'write-table', entries },
  barrier,
  { op: 'set-table' },
  barrier,
]

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
    { op: 'clear-copied', tree: 'active' },
    barrier,
    { op: 'copy-l1', from: 'active' },
    { op: 'add-references', tree: 'active' },
    ...swapTable([...kept(table), { create: created }]),
    { op: 'free-table' },
    barrier,
  ]
  return { generation: table.generation, steps, created }
}

/** The active disk becomes what the snapshot holds; the snapshot stays. */
export function planApply(table: SnapshotTable, idOrName: string): Plan {
  const tree = findSnapshot(table.records, idOrName)
  const steps: Step[] = [
    { op: 'check-references', tree },
    { op: 'clear-copied', tree },
    { op: 'copy-l1', from: tree },
    { op: 'add-references', tree },
    barrier,
    { op: 'set-active-l1' },
    barrier,
    { op: 'drop-references', tree: 'former-active' },
    { op: 'free-l1', tree: 'former-active' },
    barrier,
    { op: 'restore-copied' },
    barrier,
  ]
  return { generation: table.generation, steps }
}

/** The snapshot goes; what only it referred to is freed. */
export function planDelete(table: SnapshotTable, idOrName: string): Plan {
  const tree = findSnapshot(table.records, idOrName)
  const steps: Step[] = [
    ...swapTable(kept(table).filter((_, index) => index !== tree)),
    { op: 'drop-references', tree },
    { op: 'free-l1', tree },
    { op: 'free-table' },
    barrier,
    { op: 'restore-copied' },
    barrier,
  ]
  return { generation: table.generation, steps }
}

/** The snapshot gets another name. */
export function planRename(table: SnapshotTable, idOrName: string, name: string): Plan {
  const index = findSnapshot(table.records, idOrName)
  const entries = kept(table).map((entry, i) => (i === index ? { keep: i, rename: name } : entry))
  return { generation: table.generation, steps: [...swapTable(entries), { op: 'free-table' }, barrier] }
}
