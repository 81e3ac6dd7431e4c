/** `amend -o encrypt.state=…`, of a LUKS file `-o state=…`: qemu-img's options for key slots, and what is done for them. */

import { type Image, Qcow2Error, type Secret } from '../index.js'
import { toIterTime } from './create-options.js'
import { CommandFailure } from './failure.js'
import type { OptionSpec, OptionValues } from './options.js'
import type { Objects } from './secrets.js'

const OPTIONS: readonly OptionSpec[] = [
  { name: 'state', type: 'string', help: 'Select new state of affected keyslots (active/inactive)' },
  { name: 'new-secret', type: 'string', help: 'New secret to set in the matching keyslots. Empty string to erase' },
  { name: 'old-secret', type: 'string', help: 'Select all keyslots that match this password' },
  { name: 'keyslot', type: 'number', help: 'Select a single keyslot to modify explicitly' },
  { name: 'iter-time', type: 'number', help: 'Time to spend in PBKDF in milliseconds' },
]

/** What stands in front of the options' names: nothing where encryption is all that the format is. */
export type KeyPrefix = 'encrypt.' | ''

/** The options by the names that they have in a format. */
export const keyOptions = (prefix: KeyPrefix): readonly OptionSpec[] =>
  OPTIONS.map(option => ({ ...option, name: `${prefix}${option.name}` }))

/** One change of the key slots. */
export type KeyChange = (image: Image, signal: AbortSignal | undefined) => Promise<unknown>

/** What a list asks for; undefined where it says nothing of keys. `secret` opens the image. */
export function toKeyChange(
  all: OptionValues,
  prefix: KeyPrefix,
  objects: Objects,
  secret: Secret | undefined,
  force: boolean,
): KeyChange | undefined {
  const values = new Map(
    OPTIONS.flatMap(({ name }) => {
      const value = all.get(`${prefix}${name}`)
      return value === undefined ? [] : [[name, value] as const]
    }),
  )
  if (values.size === 0) return undefined
  const state = values.get('state')
  if (state === undefined) throw new CommandFailure("Parameter 'state' is missing")
  const given: Given = {
    force,
    slot: slotOf(values),
    newSecret: secretOf(values, 'new-secret', objects),
    oldSecret: secretOf(values, 'old-secret', objects),
    iterTime: iterTimeOf(values),
  }
  if (state === 'active') return adding(given, secret, `${prefix}key-secret`)
  if (state === 'inactive') return removing(given)
  throw new CommandFailure(`Parameter 'state' does not accept value '${state}'`)
}

interface Given {
  readonly force: boolean
  readonly slot: number | undefined
  readonly newSecret: Secret | undefined
  readonly oldSecret: Secret | undefined
  readonly iterTime: number | undefined
}

function slotOf(values: OptionValues): number | undefined {
  const slot = values.get('keyslot')
  if (typeof slot !== 'bigint') return undefined
  if (slot < 8n) return Number(slot)
  // As QEMU shows a number below zero.
  const shown = BigInt.asIntN(64, slot) < 0n ? BigInt.asUintN(32, slot) : slot
  throw new CommandFailure(`Invalid keyslot ${shown} specified, must be between 0 and 7`)
}

function secretOf(values: OptionValues, name: string, objects: Objects): Secret | undefined {
  const id = values.get(name)
  return typeof id === 'string' ? objects.secret(id) : undefined
}

function iterTimeOf(values: OptionValues): number | undefined {
  const time = values.get('iter-time')
  // As little as possible.
  return typeof time === 'bigint' ? toIterTime(time === 0n ? 1n : time) : undefined
}

function adding(
  { slot, newSecret, oldSecret, iterTime, force }: Given,
  secret: Secret | undefined,
  secretOption: string,
): KeyChange {
  if (newSecret === undefined) throw new CommandFailure("'new-secret' is required to activate a keyslot")
  if (oldSecret !== undefined) throw new CommandFailure("'old-secret' must not be given when activating keyslots")
  return async (image, signal) => {
    if (secret === undefined) throw new CommandFailure(`Parameter '${secretOption}' is required for cipher`)
    await image.keys.add({ secret, newSecret, slot, iterTime, force, signal }).catch(error => {
      if (isOf(error, 'ERR_QCOW2_INVALID_ARGUMENT', 'slot')) {
        throw new CommandFailure(`Refusing to overwrite active keyslot ${slot} - please erase it first`, {
          cause: error,
        })
      }
      if (isOf(error, 'ERR_QCOW2_LIMIT', 'slot')) {
        throw new CommandFailure("Can't add a keyslot - all keyslots are in use", { cause: error })
      }
      throw error
    })
  }
}

function removing({ slot, newSecret, oldSecret, iterTime, force }: Given): KeyChange {
  if (newSecret !== undefined) throw new CommandFailure("'new-secret' must not be given when erasing keyslots")
  if (iterTime !== undefined) throw new CommandFailure("'iter-time' must not be given when erasing keyslots")
  if (slot === undefined && oldSecret === undefined) {
    throw new CommandFailure(
      'To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given',
    )
  }
  return (image, signal) =>
    image.keys.remove({ slot, secret: oldSecret, force, signal }).catch(error => {
      const message = refusal(error, slot)
      throw message === undefined ? error : new CommandFailure(message, { cause: error })
    })
}

/** QEMU's words for a slot that stays. */
function refusal(error: unknown, slot: number | undefined): string | undefined {
  const lost = 'erase all the data in the image irreversibly - refusing operation'
  if (isOf(error, 'ERR_QCOW2_BAD_SECRET')) {
    return slot === undefined
      ? 'No keyslots match given (old) password for erase operation'
      : `Given keyslot ${slot} doesn't contain the given old password for erase operation`
  }
  if (isOf(error, 'ERR_QCOW2_INVALID_ARGUMENT', 'slot')) return `Given keyslot ${slot} is already erased (inactive) `
  if (!isOf(error, 'ERR_QCOW2_DATA_LOSS')) return undefined
  return slot === undefined
    ? `All the active keyslots match the (old) password that was given and erasing them will ${lost}`
    : `Attempt to erase the only active keyslot ${slot} which will ${lost}`
}

const isOf = (error: unknown, code: string, field?: string): error is Qcow2Error =>
  error instanceof Qcow2Error && error.code === code && (field === undefined || error.field === field)
