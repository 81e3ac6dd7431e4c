/** Exports of NBD servers, as what can be opened. */

import type { ConnectionOptions } from 'node:tls'
import { invalidArgument, Qcow2Error } from './errors.js'
import { type Addon, type NativeListedExport, type NativeNbdConnect, native } from './native.js'
import { clientEncryption, clientTls, Encrypting, type NbdClientTls, withHost } from './nbd-tls.js'
import { ABORTABLE, type Abortable, integer, readOptions, throwIfAborted } from './options.js'
import { type Held, runHeld } from './support/jobs.js'
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

/** Options of {@link nbdSource}. */
export interface NbdSourceOptions extends NbdTimes {
  /**
   * Milliseconds for which a connection that was lost is made again, for each request that waits meanwhile: those that were not answered are
   * made once more on the new one. Default 0: what is open on it fails from then on. An export that has another size then, or can do other
   * things, is an error. Requests that wait hold worker threads of the process, as those of a slow disk do. What the server had answered to and not yet made durable is the server's to keep: one that a power cut
   * took may have lost it.
   */
  reconnect?: number | undefined
  /** Encrypt the connection, with a server that begins with TLS. Not on Windows. */
  tls?: NbdClientTls | undefined
}

const MILLISECONDS = integer(1, 2 ** 31 - 1)

const SOURCE = {
  connectTimeout: MILLISECONDS,
  silenceTimeout: MILLISECONDS,
  reconnect: integer(0, 2 ** 31 - 1),
  tls: clientTls,
} as const

const LIST = { ...ABORTABLE, connectTimeout: MILLISECONDS, tls: clientTls } as const

/** An export of an NBD server. Made by {@link nbdSource} alone: no name becomes one by itself. */
export class NbdSource {
  /** The URI of the export: equal ones are the same. */
  readonly uri: string
  readonly #place: NbdPlace

  /** @internal */
  constructor(name: unknown, options: NbdSourceOptions | undefined, owner: string) {
    if (typeof name !== 'string') throw invalidArgument('uri', `${owner}: uri must be a string, not ${describe(name)}`)
    const { connectTimeout, silenceTimeout, reconnect, tls } = readOptions(options, owner, SOURCE)
    const uri = uriOf(name)
    this.uri = uri
    const connect = { connectTime: connectTimeout, silenceTime: silenceTimeout, reconnectTime: reconnect }
    this.#place = { uri, connect, tls: tls && withHost(tls, hostOf(uri), `${owner}: tls`) }
    Object.freeze(this)
  }

  /** @internal What the addon is told of it; undefined for everything else. */
  static read(source: unknown): NbdPlace | undefined {
    return typeof source === 'object' && source !== null && #place in source ? source.#place : undefined
  }
}

function uriOf(name: string): string {
  const uri = native.nbdLocation(userText(name))
  if (typeof uri !== 'string') throw toError(uri)
  return uri
}

/** An export, and how it is reached. */
export interface NbdPlace {
  readonly uri: string
  readonly connect: NativeNbdConnect
  readonly tls: ConnectionOptions | undefined
}

/** Hands a job that connects to the addon. */
type Connecting = (request: number, job: number, addon: Addon, options: NativeNbdConnect) => void

/** The host of a URI as the addon writes it; a unix socket has none. */
const hostOf = (uri: string): string | undefined => {
  const host = /^nbd:\/\/(?:\[(.*?)\]|([^:/]*))/.exec(uri)
  return host?.[1] ?? (host?.[2] === undefined ? undefined : decodeURIComponent(host[2]))
}

/** Connects, over TLS where that is wanted, and runs what needs the connection; what is held ends it. */
export async function reach<T>(place: NbdPlace, signal: AbortSignal | undefined, start: Connecting): Promise<Held<T>> {
  const { uri, connect, tls } = place
  if (tls === undefined) return runHeld<T>(signal, (request, job, addon) => start(request, job, addon, connect))
  throwIfAborted(signal)
  const encrypting = new Encrypting(clientEncryption(tls))
  try {
    const held = await runHeld<T>(signal, (request, job, addon) =>
      start(request, job, addon, { ...connect, tls: encrypting.number }),
    )
    const end = (): void => {
      held.end()
      // Where the process ends, so does this.
      encrypting.end().catch(() => undefined)
    }
    return { value: held.value, detach: held.detach, end }
  } catch (error) {
    await encrypting.end()
    const { failure } = encrypting
    if (failure === undefined || signal?.aborted) throw error
    const message = `${uri}: TLS with the server failed: ${failure.message}`
    throw new Qcow2Error('ERR_QCOW2_IO', message, { path: uri, syscall: 'NBD_OPT_STARTTLS', cause: failure })
  }
}

/**
 * An export of an NBD server, for `open`, `convert` (as the source, and as a target that exists), `info`, `inspect`, `map`, `measure`,
 * `compare`, `check`: as a raw disk, and as whatever image lies in it. `uri` is an NBD URI (`nbd://HOST[:PORT]/EXPORT`,
 * `nbd+unix:///EXPORT?socket=PATH`) or one of QEMU's older names (`nbd:HOST:PORT[:exportname=EXPORT]`,
 * `nbd:unix:PATH[:exportname=EXPORT]`). Nothing is connected yet.
 *
 * An export is a device: it neither grows nor shrinks. A connection that fails does not come back without `reconnect`: what is open on it
 * fails from then on.
 *
 * @example
 * ```ts
 * const source = nbdSource('nbd://storage.example/disk', {
 *   tls: { ca: await readFile('ca-cert.pem'), cert: await readFile('client-cert.pem'), key: await readFile('client-key.pem') },
 *   reconnect: 60_000,
 * })
 * await convert(source, 'disk.qcow2', { from: 'raw', to: 'qcow2' })
 * ```
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_INVALID_ARGUMENT` for a name that is none, and for certificates and keys that cannot be used;
 *   `ERR_QCOW2_UNSUPPORTED_FEATURE` for other transports, and for `nbds://`: name it `nbd://`, and say how with `tls`
 */
export function nbdSource(uri: string, options?: NbdSourceOptions): NbdSource {
  return new NbdSource(uri, options, 'nbdSource')
}

/** Options of {@link listNbd}. */
export interface NbdListOptions extends Pick<NbdSourceOptions, 'connectTimeout' | 'tls'>, Abortable {}

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
  readonly blockSizes?: {
    /** Multiple that offsets and lengths must be of. */
    readonly minimum: number
    /** What is quick. */
    readonly preferred: number
    /** Most bytes of one request. */
    readonly maximum: number
  }
  /** What block statuses it tells of, as `base:allocation`. */
  readonly contexts: readonly string[]
  /** Its requests can be of 2^32 bytes and more. */
  readonly extendedHeaders: boolean
}

/**
 * The exports of an NBD server, whichever of them `uri` names.
 *
 * @throws {@link Qcow2Error} as `nbdSource`; the system's code (`ECONNREFUSED`, `ETIMEDOUT`); `ERR_QCOW2_IO` for a server that tells of no
 *   exports, or does not keep to the protocol
 */
export async function listNbd(uri: string, options?: NbdListOptions): Promise<readonly NbdExport[]> {
  const { signal, connectTimeout: connectTime, tls } = readOptions(options, 'listNbd', LIST)
  const source = new NbdSource(uri, undefined, 'listNbd')
  throwIfAborted(signal)
  const place = {
    uri: source.uri,
    connect: { connectTime },
    tls: tls && withHost(tls, hostOf(source.uri), 'listNbd: tls'),
  }
  const held = await reach<NativeListedExport[]>(place, signal, (request, job, addon, connect) =>
    addon.listNbd(request, job, source.uri, connect),
  )
  held.end()
  return held.value.map(toExport)
}

function toExport(listed: NativeListedExport): NbdExport {
  const { name, description, size, flags, blockSizes, contexts, extendedHeaders } = listed
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
    extendedHeaders,
  }
}
