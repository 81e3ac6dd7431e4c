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

/** What one L1 table refers to. `former-active` is the active disk before `set-active-l1`; a number is an index in the table. */
export type Tree = 'active' | 'former-active' | number

/** A snapshot to add, with the L1 table that the plan copied. */
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
 * One step. Between two barriers nothing may rely on what was written since the first one; the engine refuses steps that do.
 *
 * - `check-references`: refuse, before anything is written, if the tree's references cannot all be counted once more
 * - `clear-copied`: no cluster of the tree may be written in place any more
 * - `copy-l1`: a new L1 table, copied from a tree's
 * - `add-references`, `drop-references`: count every reference of the tree once more, or once less
 * - `write-table`, `set-table`: write a new snapshot table; make it the image's
 * - `set-active-l1`: make the copied L1 table the active one
 * - `free-l1`, `free-table`: free a tree's L1 table; free the former snapshot table
 * - `restore-copied`: clusters of the active disk that nothing shares may be written in place again
 */
export type Step =
  | {
      readonly op: 'check-references' | 'clear-copied' | 'add-references' | 'drop-references' | 'free-l1'
      readonly tree: Tree
    }
  | { readonly op: 'copy-l1'; readonly from: 'active' | number }
  | { readonly op: 'write-table'; readonly entries: readonly TableEntry[] }
  | { readonly op: 'barrier' | 'set-table' | 'set-active-l1' | 'free-table' | 'restore-copied' }

/** Steps in order, for one generation of the table. */
export interface Plan {
  readonly generation: number
  readonly steps: readonly Step[]
}
