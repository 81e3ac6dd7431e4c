/** Persistent dirty bitmaps of an open image: what incremental backups are made of. */

import type { InspectOptions } from 'node:util'
import { Qcow2Error } from './errors.js'
import type { BitmapInfo } from './info.js'
import type { Addon } from './native.js'
import {
  ABORTABLE,
  type Abortable,
  bytes,
  flag,
  name as readName,
  readOptions,
  storedName,
  throwIfAborted,
} from './options.js'
import { INSPECT, type Inspect, inspectAs, staysHere } from './support/handle.js'
import type { ImageOwner } from './support/owner.js'
import { request, requestWatched } from './support/requests.js'
import { canBeInexact, exactName, exactText, findName, type Name } from './text.js'
import type { Size } from './units.js'

const STAYS = staysHere('the bitmaps of an open image')

/** Options of {@link Bitmaps.add}. */
export interface AddBitmapOptions extends Abortable {
  /** Bytes that one bit stands for: a power of two from 512 to 2 GiB. Default: the cluster size, from 4 KiB to 64 KiB. */
  granularity?: Size | undefined
  /** Whether it records from now on. Default true. */
  enabled?: boolean | undefined
}

/** A run of dirty guest bytes. */
export interface DirtyRange {
  /** First guest byte. */
  readonly start: number
  /** Bytes. */
  readonly length: number
}

/** What the bitmaps need of the image that has them. */
export interface BitmapOwner extends ImageOwner {
  infos(): Promise<readonly BitmapInfo[]>
}

const ADD = { ...ABORTABLE, granularity: bytes, enabled: flag } as const

/**
 * The persistent bitmaps of an image. An enabled bitmap records every guest change while the image is open for writing, and is
 * current in the file again when the image is closed. After a crash it is `in-use` in the file: inconsistent, good for
 * nothing but {@link Bitmaps.remove}. Changes need `flags: 'r+'`. Spec: "Bitmaps".
 *
 * Names are bytes, seldom such that are not UTF-8. Every method takes them as text or as bytes (a `Uint8Array`). A text that different
 * names are shown as, because of replacement characters, is refused with `ERR_QCOW2_INVALID_ARGUMENT`.
 */
export class Bitmaps {
  readonly #owner: BitmapOwner
  /** The owner of each handle, so that bitmaps of another image can be merged. */
  static readonly #owners = new WeakMap<Bitmaps, BitmapOwner>()

  /** @internal */
  readonly threadBound = STAYS

  /** @internal */
  constructor(owner: BitmapOwner) {
    this.#owner = owner
    Bitmaps.#owners.set(this, owner)
  }

  /** @internal */
  [INSPECT](depth: number, options: InspectOptions, inspect: Inspect): string {
    return inspectAs('Bitmaps', { image: this.#owner.shown()['path'] }, depth, options, inspect)
  }

  /** The bitmaps in the order of the directory. */
  async list(options?: Abortable): Promise<readonly BitmapInfo[]> {
    const { signal } = readOptions(options, 'Bitmaps.list', ABORTABLE)
    throwIfAborted(signal)
    return this.#owner.read(() => this.#owner.infos())
  }

  /**
   * Adds a bitmap with no dirty bytes.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_INVALID_ARGUMENT` for a name that is empty, taken or longer than 1023 bytes and for a bad
   *   granularity; `ERR_QCOW2_UNSUPPORTED_FEATURE` for a raw or version 2 image and a disk of no bytes; `ERR_QCOW2_READ_ONLY`
   *
   * @example
   * ```js
   * await image.bitmaps.add('backup', { granularity: 65536 })
   * ```
   */
  async add(name: Name, options?: AddBitmapOptions): Promise<void> {
    const checked = storedName(name, 'Bitmaps.add: name')
    const { granularity, enabled = true, signal } = readOptions(options, 'Bitmaps.add', ADD)
    if (granularity !== undefined && (granularity < 512 || granularity > 2 ** 31 || !isPowerOfTwo(granularity))) {
      throw new Qcow2Error(
        'ERR_QCOW2_INVALID_ARGUMENT',
        `Bitmaps.add: granularity must be a power of two from 512 to ${2 ** 31}, not ${granularity}`,
        { field: 'granularity' },
      )
    }
    await this.#owner.change('Bitmaps.add', signal, () =>
      request<void>((number, addon) => addon.addBitmap(number, this.#owner.image, checked, granularity ?? 0, enabled)),
    )
  }

  /**
   * Removes a bitmap, also an inconsistent one.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_NO_BITMAP`, `ERR_QCOW2_READ_ONLY`
   */
  async remove(name: Name, options?: Abortable): Promise<void> {
    await this.#one('Bitmaps.remove', name, options, (number, addon, checked) =>
      addon.removeBitmap(number, this.#owner.image, checked),
    )
  }

  /**
   * Removes all bitmaps in one step, also inconsistent ones: a crash leaves all or none. An image without bitmaps, also a raw one, stays as
   * it is.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_READ_ONLY`
   */
  async removeAll(options?: Abortable): Promise<void> {
    const { signal } = readOptions(options, 'Bitmaps.removeAll', ABORTABLE)
    await this.#owner.change('Bitmaps.removeAll', signal, () =>
      request<void>((number, addon) => addon.removeAllBitmaps(number, this.#owner.image)),
    )
  }

  /**
   * Makes all bytes clean.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_NO_BITMAP`; `ERR_QCOW2_CORRUPT` for an inconsistent bitmap; `ERR_QCOW2_READ_ONLY`
   */
  async clear(name: Name, options?: Abortable): Promise<void> {
    await this.#one('Bitmaps.clear', name, options, (number, addon, checked) =>
      addon.clearBitmap(number, this.#owner.image, checked),
    )
  }

  /** Starts recording; otherwise as {@link Bitmaps.clear}. */
  async enable(name: Name, options?: Abortable): Promise<void> {
    await this.#one('Bitmaps.enable', name, options, (number, addon, checked) =>
      addon.enableBitmap(number, this.#owner.image, checked, true),
    )
  }

  /** Stops recording; otherwise as {@link Bitmaps.clear}. */
  async disable(name: Name, options?: Abortable): Promise<void> {
    await this.#one('Bitmaps.disable', name, options, (number, addon, checked) =>
      addon.enableBitmap(number, this.#owner.image, checked, false),
    )
  }

  /**
   * Marks in `target` what is dirty in the sources: names of this image's bitmaps, or bitmaps of another open image of the same
   * size. Otherwise as {@link Bitmaps.clear}.
   */
  async merge(
    target: Name,
    sources: readonly (Name | { readonly bitmaps: Bitmaps; readonly name: Name })[],
    options?: Abortable,
  ): Promise<void> {
    if (!Array.isArray(sources)) {
      throw new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', 'Bitmaps.merge: sources must be an array', {
        field: 'sources',
      })
    }
    const from = sources.map(source => {
      const [owner, name] =
        typeof source === 'string' || source instanceof Uint8Array
          ? [this.#owner, source]
          : [Bitmaps.#owners.get(source?.bitmaps), source?.name]
      if (owner === undefined) {
        const message = 'Bitmaps.merge: a source is a name, or { bitmaps, name } of an open image'
        throw new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', message, { field: 'sources' })
      }
      return { owner, name: readName(name, 'Bitmaps.merge: source') }
    })
    const merge = async () => {
      const named = from.map(async ({ owner, name }) => ({
        image: owner.image,
        name: await owner.read(() => exactly(owner, name)),
      }))
      const all = await Promise.all(named)
      await this.#one('Bitmaps.merge', target, options, (number, addon, checked, watch) =>
        addon.mergeBitmaps(number, this.#owner.image, checked, all, watch),
      )
    }
    // Every image that is read from stays open until it is done.
    const others = from.map(({ owner }) => owner).filter(owner => owner !== this.#owner)
    await others.reduce<() => Promise<void>>((work, owner) => () => owner.read(work), merge)()
  }

  /**
   * Iterates over the dirty ranges as they are now, in order.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_NO_BITMAP`; `ERR_QCOW2_CORRUPT` for an inconsistent bitmap
   *
   * @example
   * ```js
   * await image.bitmaps.add('changed')
   * await image.write(Buffer.alloc(512, 1), { position: 2 ** 20 })
   * for await (const { start, length } of image.bitmaps.extents('changed')) console.log(start, length)
   * ```
   */
  async *extents(name: Name, options?: Abortable): AsyncGenerator<DirtyRange, void, undefined> {
    const wanted = readName(name, 'Bitmaps.extents: name')
    const { signal } = readOptions(options, 'Bitmaps.extents', ABORTABLE)
    throwIfAborted(signal)
    const numbers = await this.#owner.read(async () => {
      const checked = await exactly(this.#owner, wanted)
      return request<Float64Array>((number, addon) => addon.bitmapExtents(number, this.#owner.image, checked))
    })
    for (let i = 0; i + 1 < numbers.length; i += 2) {
      throwIfAborted(signal)
      yield { start: numbers[i] ?? 0, length: numbers[i + 1] ?? 0 }
    }
  }

  async #one(
    what: string,
    name: Name,
    options: Abortable | undefined,
    start: (number: number, addon: Addon, name: string, watch: number | undefined) => void,
  ): Promise<void> {
    const wanted = readName(name, `${what}: name`)
    const { signal } = readOptions(options, what, ABORTABLE)
    await this.#owner.change(what, signal, async () => {
      const checked = await exactly(this.#owner, wanted)
      await requestWatched<void>(signal, (number, addon, watch) => start(number, addon, checked, watch))
    })
  }
}

const isPowerOfTwo = (n: number): boolean => Number.isInteger(Math.log2(n))

/** The one bitmap that a name means. A text that may not have all bytes of it is looked up. */
async function exactly(owner: BitmapOwner, wanted: Name): Promise<string> {
  if (!canBeInexact(wanted)) return exactName(wanted)
  const names = (await owner.infos()).map(({ name, nameBytes }) => exactText(name, nameBytes))
  const ambiguous = (): Error => {
    const message = `several bitmaps are shown as '${wanted}', for their names are not UTF-8: say the bytes of the name (nameBytes)`
    return new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', message, { field: 'name' })
  }
  return names[findName(names, wanted, ambiguous)] ?? wanted
}
