/** Internal snapshots of an open image. */

import type { InspectOptions } from 'node:util'
import { type SnapshotInfo, snapshotIn } from '../info.js'
import { ABORTABLE, type Abortable, flag, readOptions, throwIfAborted } from '../options.js'
import { INSPECT, type Inspect, inspectAs, staysHere } from '../support/handle.js'
import type { ImageOwner } from '../support/owner.js'
import { request, requestWatched } from '../support/requests.js'
import { exactText, type Name, shown } from '../text.js'
import type { BigIntResults } from '../units.js'
import { checkName, findSnapshot } from './ids.js'
import { planApply, planCreate, planDelete, planRename } from './plan.js'
import type { Plan, SnapshotTable } from './types.js'

const STAYS = staysHere('the snapshots of an open image')

const LIST = { ...ABORTABLE, bigint: flag } as const

/** What the snapshots need of the image that has them. */
export interface SnapshotOwner extends ImageOwner {
  /** The snapshots as `info` tells them. */
  infos(): Promise<readonly SnapshotInfo<number | bigint>[]>
  /** The disk may have another size now. */
  resized(virtualSize: number): void
}

/**
 * The internal snapshots of an image. Changes need an image that is open for writing (`flags: 'r+'`); they wait for writes in
 * flight and hold up later ones. A change that is interrupted, by a crash or a power cut, leaves the old
 * image or the new one.
 *
 * Names are bytes, seldom such that are not UTF-8. Every method takes them as text or as bytes (a `Uint8Array`). A text that different
 * names are shown as, because of replacement characters, is refused: their ids and bytes are not.
 */
export class Snapshots {
  readonly #owner: SnapshotOwner

  /** @internal */
  readonly threadBound = STAYS

  /** @internal */
  constructor(owner: SnapshotOwner) {
    this.#owner = owner
  }

  /** @internal */
  [INSPECT](depth: number, options: InspectOptions, inspect: Inspect): string {
    return inspectAs('Snapshots', { image: this.#owner.shown()['path'] }, depth, options, inspect)
  }

  /**
   * The snapshots in the order of the table.
   *
   * @example
   * ```js
   * for (const { id, name, dateSec } of await image.snapshots.list()) {
   *   console.log(id, name, new Date(1000 * dateSec).toISOString())
   * }
   * ```
   */
  list(options: Abortable & { bigint: true }): Promise<readonly SnapshotInfo<bigint>[]>
  list(options?: Abortable & BigIntResults): Promise<readonly SnapshotInfo[]>
  async list(options?: Abortable & BigIntResults): Promise<readonly SnapshotInfo<number | bigint>[]> {
    const { signal, bigint } = readOptions(options, 'Snapshots.list', LIST)
    throwIfAborted(signal)
    const infos = await this.#owner.read(() => this.#owner.infos())
    return infos.map(info => snapshotIn(info, bigint))
  }

  /**
   * Makes a snapshot of the disk as it is now. Its id is the next number. Names need not be unique; ids are.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_INVALID_ARGUMENT` for a bad name; `ERR_QCOW2_LIMIT` if a refcount of the image is too
   *   narrow to count one more reference, or the table is full; `ERR_QCOW2_READ_ONLY`; `ERR_QCOW2_UNSUPPORTED_FEATURE` for a raw
   *   image and for one with an external data file
   *
   * @example
   * ```js
   * const { id } = await image.snapshots.create('before the upgrade')
   * await image.snapshots.apply(id)
   * ```
   */
  async create(name: Name, options?: Abortable): Promise<SnapshotInfo> {
    const checked = checkName(name, 'Snapshots.create: name')
    const { signal } = readOptions(options, 'Snapshots.create', ABORTABLE)
    return this.#owner.change('Snapshots.create', signal, async () => {
      const { created, ...plan } = planCreate(await this.#table(), { name: checked, date: new Date() })
      await this.#execute(plan, signal)
      return { ...created, ...shown('name', created.name), vmStateSize: 0, vmClockSec: 0, vmClockNsec: 0 }
    })
  }

  /**
   * Makes the disk what the snapshot holds, its size included. What the disk held before is lost unless another snapshot has it.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_NO_SNAPSHOT`; `ERR_QCOW2_INVALID_ARGUMENT` for a text that is shown for several names; and as
   *   {@link Snapshots.create}
   */
  async apply(idOrName: Name, options?: Abortable): Promise<void> {
    await this.#change('Snapshots.apply', options, table => planApply(table, idOrName))
  }

  /**
   * Deletes the snapshot and frees what only it refers to.
   *
   * @throws {@link Qcow2Error} as {@link Snapshots.apply}
   */
  async delete(idOrName: Name, options?: Abortable): Promise<void> {
    await this.#change('Snapshots.delete', options, table => planDelete(table, idOrName))
  }

  /**
   * Gives the snapshot another name.
   *
   * @throws {@link Qcow2Error} as {@link Snapshots.apply}
   */
  async rename(idOrName: Name, name: Name, options?: Abortable): Promise<void> {
    const checked = checkName(name, 'Snapshots.rename: name')
    await this.#change('Snapshots.rename', options, table => planRename(table, idOrName, checked))
  }

  /**
   * The snapshot with this id, else with this name.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_NO_SNAPSHOT`
   */
  async find(idOrName: Name): Promise<SnapshotInfo | undefined> {
    const infos = await this.list()
    const records = infos.map(({ id, idBytes, name, nameBytes }) => ({
      id: exactText(id, idBytes),
      name: exactText(name, nameBytes),
    }))
    return infos[findSnapshot(records, idOrName)]
  }

  async #change(what: string, options: Abortable | undefined, plan: (table: SnapshotTable) => Plan): Promise<void> {
    const { signal } = readOptions(options, what, ABORTABLE)
    await this.#owner.change(what, signal, async () => this.#execute(plan(await this.#table()), signal))
  }

  #table(): Promise<SnapshotTable> {
    return request<SnapshotTable>((number, addon) => addon.snapshotTable(number, this.#owner.image))
  }

  async #execute(plan: Plan, signal: AbortSignal | undefined): Promise<void> {
    const virtualSize = await requestWatched<number>(signal, (number, addon, watch) =>
      addon.executePlan(number, this.#owner.image, plan, watch),
    )
    this.#owner.resized(virtualSize)
  }
}
