/** The vocabulary of snapshot plans: what the engine can be told to do to an image, step by step. */

/** One snapshot as planning sees it. */
export interface SnapshotRecord {
  readonly id: string
  readonly name: string
}

/** The snapshot table that a plan is made for. */
export interface SnapshotTable {
  /** Changes with every change of the table: the engine refuses a plan that was made for another one. */
  readonly generation: number
  readonly records: readonly SnapshotRecord[]
}

/** What one L1 table refers to: the active disk's as it is before the plan; a number is an index in the table. */
export type Tree = 'active' | number

/** A snapshot to add. It gets the tables that the active disk had before `share` gave it others. */
export interface NewSnapshot {
  readonly id: string
  readonly name: string
  /** Seconds since 1970, and nanoseconds. */
  readonly dateSec: number
  readonly dateNsec: number
}

/** One entry of a new table: an old one with all it has, perhaps renamed, or a new one. */
export type TableEntry = { readonly keep: number; readonly rename?: string } | { readonly create: NewSnapshot }

/**
 * One step. Nothing of the image changes before the switch, which changes everything at once. The engine refuses steps that rely on
 * what no barrier made durable, and those whose counts and tables do not say the same.
 *
 * - `check-references`: refuse, before anything is written, if the tree's references cannot all be counted once more
 * - `fork`: from here on refcounts change beside those in the file
 * - `share`: write new tables for the active disk that share everything with the tree, counted once more
 * - `drop`: count everything that the tree refers to once less
 * - `restore-copied`: write new tables for the active disk where clusters may be written in place again that nothing shares any more
 * - `write-table`: write a new snapshot table
 * - `barrier`: make all of it durable
 * - `switch`: make what was written the image's, in one write; the barrier behind it frees what that replaces
 * - `free`: give the space of what was dropped back
 */
export type Step =
  | { readonly op: 'check-references' | 'share' | 'drop'; readonly tree: Tree }
  | { readonly op: 'write-table'; readonly entries: readonly TableEntry[] }
  | { readonly op: 'fork' | 'restore-copied' | 'barrier' | 'switch' | 'free' }

/** Steps in order, for one generation of the table. */
export interface Plan {
  readonly generation: number
  readonly steps: readonly Step[]
}
