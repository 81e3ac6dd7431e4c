/** Exports of NBD servers, as what can be opened. */

import { invalidArgument } from './errors.js'
import { type NativeListedExport, type NativeNbdConnect, native } from './native.js'
import { ABORTABLE, type Abortable, integer, readOptions, throwIfAborted } from './options.js'
import { runHeld } from './support/jobs.js'
import { toError } from './support/requests.js'
import { type Shown, shown, userText } from './text.js'
import { describe } from './units.js'

/** How long a server may take. Options of {@link nbdSource}. */
export interface NbdTimes {
  /** Milliseconds to be reached, and to begin. Default 30 seconds. */
  connectTimeout?: number | undefined
  /** Milliseconds that it may say nothing while requests wait for it: then the connection has failed. Default one minute. */
  silenceTimeout?: number | undefined
}

const TIMES = { connectTimeout: integer(1, 2 ** 31 - 1), silenceTimeout: integer(1, 2 ** 31 - 1) } as const

const LIST = { ...ABORTABLE, connectTimeout: TIMES.connectTimeout } as const

/** An export of an NBD server. Made by {@link nbdSource} alone: no name becomes one by itself. */
export class NbdSource {
  /** The URI of the export: equal ones are the same. */
  readonly uri: string
  readonly #times: NativeNbdConnect

  /** @internal */
  constructor(name: unknown, times: NbdTimes | undefined, owner: string) {
    if (typeof name !== 'string') throw invalidArgument('uri', `${owner}: uri must be a string, not ${describe(name)}`)
    const { connectTimeout, silenceTimeout } = readOptions(times, owner, TIMES)
    const uri = native.nbdLocation(userText(name))
    if (typeof uri !== 'string') throw toError(uri)
    this.uri = uri
    this.#times = { connectTime: connectTimeout, silenceTime: silenceTimeout }
    Object.freeze(this)
  }

  /** @internal What the addon is told of it; undefined for everything else. */
  static read(source: unknown): NbdPlace | undefined {
    if (typeof source !== 'object' || source === null || !(#times in source)) return undefined
    return { uri: source.uri, times: source.#times }
  }
}

/** An export, and how it is reached. */
export interface NbdPlace {
  readonly uri: string
  readonly times: NativeNbdConnect
}

/**
 * An export of an NBD server, for `open`, `convert` (as the source, and as a target that exists), `info`, `inspect`, `map`, `measure`,
 * `compare`, `check`: as a raw disk, and as whatever image lies in it. `uri` is an NBD URI (`nbd://HOST[:PORT]/EXPORT`,
 * `nbd+unix:///EXPORT?socket=PATH`) or one of QEMU's older names (`nbd:HOST:PORT[:exportname=EXPORT]`,
 * `nbd:unix:PATH[:exportname=EXPORT]`). Nothing is connected yet. There is no TLS.
 *
 * An export is a device: it neither grows nor shrinks. A connection that fails does not come back: what is open on it fails from then on.
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_INVALID_ARGUMENT` for a name that is none; `ERR_QCOW2_UNSUPPORTED_FEATURE` for what needs TLS
 *   (`nbds://`) or another transport
 */
export function nbdSource(uri: string, options?: NbdTimes): NbdSource {
  return new NbdSource(uri, options, 'nbdSource')
}

/** Options of {@link listNbd}. */
export interface NbdListOptions extends Pick<NbdTimes, 'connectTimeout'>, Abortable {}

/** An export that a server tells of. */
export interface NbdExport {
  /** Empty for the default one. */
  readonly name: string
  /** The bytes of `name`, where they are not UTF-8. */
  readonly nameBytes?: Buffer
  /** What it is, for a person. */
  readonly description: string
  /** The bytes of `description`, where they are not UTF-8. */
  readonly descriptionBytes?: Buffer
  /** Bytes. This and what follows is absent where the server does not tell. */
  readonly size?: number
  /** The transmission flags of the protocol. */
  readonly flags?: number
  /** Sizes of requests in bytes. */
  readonly blockSizes?: { readonly minimum: number; readonly preferred: number; readonly maximum: number }
  /** What block statuses it tells of, as `base:allocation`. */
  readonly contexts: readonly string[]
}

/**
 * The exports of an NBD server, whichever of them `uri` names.
 *
 * @throws {@link Qcow2Error} as `nbdSource`; the system's code (`ECONNREFUSED`, `ETIMEDOUT`); `ERR_QCOW2_IO` for a server that tells of no
 *   exports, or does not keep to the protocol
 */
export async function listNbd(uri: string, options?: NbdListOptions): Promise<readonly NbdExport[]> {
  const { signal, connectTimeout: connectTime } = readOptions(options, 'listNbd', LIST)
  const source = new NbdSource(uri, undefined, 'listNbd')
  throwIfAborted(signal)
  const held = await runHeld<NativeListedExport[]>(signal, (request, job, addon) =>
    addon.listNbd(request, job, source.uri, { connectTime }),
  )
  held.end()
  return held.value.map(toExport)
}

function toExport({ name, description, size, flags, blockSizes, contexts }: NativeListedExport): NbdExport {
  const [minimum, preferred, maximum] = blockSizes ?? []
  const sizes =
    minimum === undefined || preferred === undefined || maximum === undefined
      ? undefined
      : { minimum, preferred, maximum }
  const named: Shown<'name'> & Shown<'description'> = { ...shown('name', name), ...shown('description', description) }
  return {
    ...named,
    ...(size !== undefined && { size }),
    ...(flags !== undefined && { flags }),
    ...(sizes !== undefined && { blockSizes: sizes }),
    contexts: contexts.map(context => shown('context', context).context),
  }
}
