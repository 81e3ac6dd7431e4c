/** Persistent dirty bitmaps of an open image: what incremental backups are made of. */

import { Qcow2Error } from './errors.js'
import type { BitmapInfo } from './info.js'
import type { Addon } from './native.js'
import { ABORTABLE, type Abortable, bytes, flag, readOptions, throwIfAborted } from './options.js'
import type { ImageOwner } from './support/owner.js'
import { request, requestWatched } from './support/requests.js'
import type { Size } from './units.js'

/** Options of {@link Bitmaps.add}. */
export interface AddBitmapOptions extends Abortable {
  /** Bytes that one bit stands for: a power of two from 512 to 2 GiB. Default: the cluster size, from 4 KiB to 64 KiB. */
  granularity?: Size | undefined
  /** Whether it records from now on. Default true. */
  enabled?: boolean | undefined
}

/** A run of dirty guest bytes. */
export interface DirtyRange {
  readonly start: number
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
 */
export class Bitmaps {
  readonly #owner: BitmapOwner
  /** The owner of each handle, so that bitmaps of another image can be merged. */
  static readonly #owners = new WeakMap<Bitmaps, BitmapOwner>()

  /** @internal */
  constructor(owner: BitmapOwner) {
    this.#owner = owner
    Bitmaps.#owners.set(this, owner)
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
   */
  async add(name: string, options?: AddBitmapOptions): Promise<void> {
    const checked = checkName(name, 'Bitmaps.add: name')
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
  async remove(name: string, options?: Abortable): Promise<void> {
    await this.#one('Bitmaps.remove', name, options, (number, addon, checked) =>
      addon.removeBitmap(number, this.#owner.image, checked),
    )
  }

  /**
   * Makes all bytes clean.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_NO_BITMAP`; `ERR_QCOW2_CORRUPT` for an inconsistent bitmap; `ERR_QCOW2_READ_ONLY`
   */
  async clear(name: string, options?: Abortable): Promise<void> {
    await this.#one('Bitmaps.clear', name, options, (number, addon, checked) =>
      addon.clearBitmap(number, this.#owner.image, checked),
    )
  }

  /** Starts recording; otherwise as {@link Bitmaps.clear}. */
  async enable(name: string, options?: Abortable): Promise<void> {
    await this.#one('Bitmaps.enable', name, options, (number, addon, checked) =>
      addon.enableBitmap(number, this.#owner.image, checked, true),
    )
  }

  /** Stops recording; otherwise as {@link Bitmaps.clear}. */
  async disable(name: string, options?: Abortable): Promise<void> {
    await this.#one('Bitmaps.disable', name, options, (number, addon, checked) =>
      addon.enableBitmap(number, this.#owner.image, checked, false),
    )
  }

  /**
   * Marks in `target` what is dirty in the sources: names of this image's bitmaps, or bitmaps of another open image of the same
   * size. Otherwise as {@link Bitmaps.clear}.
   */
  async merge(
    target: string,
    sources: readonly (string | { readonly bitmaps: Bitmaps; readonly name: string })[],
    options?: Abortable,
  ): Promise<void> {
    if (!Array.isArray(sources)) {
      throw new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', 'Bitmaps.merge: sources must be an array', {
        field: 'sources',
      })
    }
    const from = sources.map(source => {
      const [owner, name] =
        typeof source === 'string' ? [this.#owner, source] : [Bitmaps.#owners.get(source?.bitmaps), source?.name]
      if (owner === undefined) {
        const message = 'Bitmaps.merge: a source is a name, or { bitmaps, name } of an open image'
        throw new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', message, { field: 'sources' })
      }
      return { owner, name: checkName(name, 'Bitmaps.merge: source') }
    })
    const named = from.map(({ owner, name }) => ({ image: owner.image, name }))
    const merge = () =>
      this.#one('Bitmaps.merge', target, options, (number, addon, checked, watch) =>
        addon.mergeBitmaps(number, this.#owner.image, checked, named, watch),
      )
    // Every image that is read from stays open until it is done.
    const others = from.map(({ owner }) => owner).filter(owner => owner !== this.#owner)
    await others.reduce<() => Promise<void>>((work, owner) => () => owner.read(work), merge)()
  }

  /**
   * Iterates over the dirty ranges as they are now, in order.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_NO_BITMAP`; `ERR_QCOW2_CORRUPT` for an inconsistent bitmap
   */
  async *extents(name: string, options?: Abortable): AsyncGenerator<DirtyRange, void, undefined> {
    const checked = checkName(name, 'Bitmaps.extents: name')
    const { signal } = readOptions(options, 'Bitmaps.extents', ABORTABLE)
    throwIfAborted(signal)
    const numbers = await this.#owner.read(() =>
      request<Float64Array>((number, addon) => addon.bitmapExtents(number, this.#owner.image, checked)),
    )
    for (let i = 0; i + 1 < numbers.length; i += 2) {
      throwIfAborted(signal)
      yield { start: numbers[i] ?? 0, length: numbers[i + 1] ?? 0 }
    }
  }

  async #one(
    what: string,
    name: string,
    options: Abortable | undefined,
    start: (number: number, addon: Addon, name: string, watch: number | undefined) => void,
  ): Promise<void> {
    const checked = checkName(name, `${what}: name`)
    const { signal } = readOptions(options, what, ABORTABLE)
    await this.#owner.change(what, signal, () =>
      requestWatched<void>(signal, (number, addon, watch) => start(number, addon, checked, watch)),
    )
  }
}

const isPowerOfTwo = (n: number): boolean => Number.isInteger(Math.log2(n))

function checkName(name: unknown, what: string): string {
  if (typeof name === 'string' && name !== '' && !name.includes('\0')) return name
  throw new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', `${what} must be a non-empty string without null bytes`, {
    field: what,
  })
}
