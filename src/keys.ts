/** Key slots of an encrypted image: which secrets open it. */

import type { InspectOptions } from 'node:util'
import { invalidArgument, Qcow2Error } from './errors.js'
import type { AnyImageInfo, LuksSlotInfo } from './info.js'
import type { NativeKeyOrder } from './native.js'
import { ABORTABLE, type Abortable, flag, integer, type Read, readOptions, throwIfAborted } from './options.js'
import { forgetting, ITER_TIME, type Secret, secret } from './secret.js'
import { INSPECT, type Inspect, inspectAs, staysHere } from './support/handle.js'
import { runJob } from './support/jobs.js'
import type { ImageOwner } from './support/owner.js'

const STAYS = staysHere('the key slots of an open image')

/** Options of {@link Keys.change}. */
export interface ChangeKeyOptions extends Abortable {
  /** What opens the image now. */
  secret: Secret
  /** What is to open it. */
  newSecret: Secret
  /** How long a guess of the new secret takes on this machine, in milliseconds: 1 to 60000. Default 2000. */
  iterTime?: number | undefined
}

/** Options of {@link Keys.add}. */
export interface AddKeyOptions extends ChangeKeyOptions {
  /** The key slot: 0 to 7. Default: the first free one. */
  slot?: number | undefined
  /** Take the slot also where it is in use: what opened it opens nothing any more. Default false. */
  force?: boolean | undefined
}

/** Options of {@link Keys.remove}: a slot, a secret, or both. */
export interface RemoveKeyOptions extends Abortable {
  /** The key slot: 0 to 7. */
  slot?: number | undefined
  /** Every slot that it opens goes; with `slot` that one, if the secret opens it. */
  secret?: Secret | undefined
  /** Also the last slot that opens the image, whose data is lost then, and what is left in a free slot. Default false. */
  force?: boolean | undefined
}

/** What the keys need of the image that has them. */
export interface KeyOwner extends ImageOwner {
  top(): Promise<AnyImageInfo | undefined>
}

const SLOT = integer(0, 7)
const CHANGE = { ...ABORTABLE, secret, newSecret: secret, iterTime: ITER_TIME } as const
const ADD = { ...CHANGE, slot: SLOT, force: flag } as const
const REMOVE = { ...ABORTABLE, slot: SLOT, secret, force: flag } as const

/**
 * The key slots of an image that is encrypted with LUKS. Each holds the key of the data, encrypted with a secret: any of the secrets opens
 * the image, and the data is the same for all. Changes need `flags: 'r+'`, and are durable when they are done; requests go on while keys are
 * derived. Interrupted by a power cut, the slots are the old ones or the new ones, and one of the secrets opens the image.
 *
 * A secret that is removed opens this file no more. Who has a copy of the file from before, and the secret, has the data: what must be
 * safe from them is converted to a new image, which has a new key.
 */
export class Keys {
  readonly #owner: KeyOwner

  /** @internal */
  readonly threadBound = STAYS

  /** @internal */
  constructor(owner: KeyOwner) {
    this.#owner = owner
  }

  /** @internal */
  [INSPECT](depth: number, options: InspectOptions, inspect: Inspect): string {
    return inspectAs('Keys', { image: this.#owner.shown()['path'] }, depth, options, inspect)
  }

  /**
   * All key slots. Needs no secret.
   *
   * @throws {@link Qcow2Error} `ERR_QCOW2_UNSUPPORTED_FEATURE` for an image that is not encrypted with LUKS; as `open` for a LUKS header that
   *   cannot be read
   */
  async list(options?: Abortable): Promise<readonly LuksSlotInfo[]> {
    const { signal } = readOptions(options, 'Keys.list', ABORTABLE)
    throwIfAborted(signal)
    const top = await this.#owner.read(() => this.#owner.top())
    const encrypt = top?.luks ?? top?.formatSpecific?.encrypt
    if (encrypt?.slots !== undefined) return encrypt.slots
    if (encrypt !== undefined && 'damaged' in encrypt) throw encrypt.damaged
    const message = 'Keys.list: only images that are encrypted with LUKS have key slots'
    throw new Qcow2Error('ERR_QCOW2_UNSUPPORTED_FEATURE', message, { path: top?.filename, field: 'crypt_method' })
  }

  /**
   * Adds a secret beside those there are; tells its key slot.
   *
   * @throws {@link Qcow2Error} with nothing changed: `ERR_QCOW2_BAD_SECRET` where `secret` does not open the image;
   *   `ERR_QCOW2_INVALID_ARGUMENT` for a slot in use without `force`; `ERR_QCOW2_LIMIT` where all slots are in use;
   *   `ERR_QCOW2_UNSUPPORTED_FEATURE` for an image that is not encrypted with LUKS; `ERR_QCOW2_CORRUPT`; `ERR_QCOW2_READ_ONLY`. Else the
   *   system's code: `secret` still opens the image
   */
  async add(options: AddKeyOptions): Promise<number> {
    return await forgetting(async () => this.#put('Keys.add', readOptions(options, 'Keys.add', ADD), false))
  }

  /**
   * Puts a new secret in the place of one, which opens nothing afterwards; tells the new one's key slot, which is another: a free one is
   * needed.
   *
   * @throws {@link Qcow2Error} as {@link Keys.add}. After the system's code one of the two secrets opens the image, or both
   */
  async change(options: ChangeKeyOptions): Promise<number> {
    return await forgetting(async () => this.#put('Keys.change', readOptions(options, 'Keys.change', CHANGE), true))
  }

  /**
   * Overwrites key slots and frees them; tells which. A slot by its number needs no secret.
   *
   * @throws {@link Qcow2Error} with nothing changed: `ERR_QCOW2_DATA_LOSS` for the last slots that open the image, without `force`;
   *   `ERR_QCOW2_INVALID_ARGUMENT` for a slot that is not in use; else as {@link Keys.add}
   */
  async remove(options: RemoveKeyOptions): Promise<readonly number[]> {
    return await forgetting(() => this.#remove(options))
  }

  async #remove(options: RemoveKeyOptions): Promise<readonly number[]> {
    const { signal, ...order } = readOptions(options, 'Keys.remove', REMOVE)
    if (order.slot === undefined && order.secret === undefined) {
      throw invalidArgument('slot', 'Keys.remove: say which key is to go: by its slot, or by its secret')
    }
    return this.#owner.change('Keys.remove', signal, () =>
      runJob<number[]>('keys', { signal }, (request, job, addon) =>
        addon.removeKeys(request, job, this.#owner.image, order),
      ),
    )
  }

  async #put(
    what: string,
    { signal, ...given }: Read<typeof CHANGE> & Partial<Read<typeof ADD>>,
    replaces: boolean,
  ): Promise<number> {
    const order: NativeKeyOrder = {
      ...given,
      secret: needed(what, 'secret', given.secret),
      newSecret: needed(what, 'newSecret', given.newSecret),
      replaces,
    }
    return this.#owner.change(what, signal, () =>
      runJob<number>('keys', { signal }, (request, job, addon) => addon.addKey(request, job, this.#owner.image, order)),
    )
  }
}

function needed<T>(what: string, name: string, value: T | undefined): T {
  if (value === undefined) throw invalidArgument(name, `${what}: the option ${name} is needed`)
  return value
}
