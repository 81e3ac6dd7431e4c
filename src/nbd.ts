/** Serving open images over NBD, the network block device protocol. */

import type { InspectOptions } from 'node:util'
import { invalidArgument, Qcow2Error } from './errors.js'
import type { Image } from './image.js'
import { type NativeNbdExportOrder, type NativeNbdOrder, type NativeNbdStarted, native } from './native.js'
import { Encrypting, type Encryption, type NbdServerTls, serverTls } from './nbd-tls.js'
import {
  ABORTABLE,
  type Abortable,
  bytes,
  flag,
  integer,
  type Read,
  type Reader,
  readOptions,
  storedName,
  text,
  throwIfAborted,
} from './options.js'
import { type PathLike, release, toPath } from './source.js'
import { INSPECT, type Inspect, inspectAs, staysHere } from './support/handle.js'
import { type ImageOwner, ownerOf } from './support/owner.js'
import { request } from './support/requests.js'
import { onAbort } from './support/signals.js'
import { encodeText, exactName, type Name, shownText } from './text.js'
import { describe, type Size } from './units.js'

/** How one image is served. */
export interface NbdServing {
  /** What it is, for a person. */
  description?: string | undefined
  /** First byte of the disk that is served: what lies before is neither read nor written. Default 0. */
  offset?: Size | undefined
  /** Refuse writes. Default: as the image was opened. */
  readOnly?: boolean | undefined
  /** Tell how deep in the backing chain data is, as `qemu:allocation-depth`. Default false. */
  allocationDepth?: boolean | undefined
  /** Persistent bitmaps to tell of, as `qemu:dirty-bitmap:NAME`: as they are when a client asks. */
  bitmaps?: readonly Name[] | undefined
}

/** One of several images that a server has. */
export interface NbdServed extends NbdServing {
  /** An open image. */
  image: Image
  /** Name that clients ask for; each has another one. Default `''`, which those mean who give none. */
  name?: Name | undefined
}

/** How a server listens and goes on. Either `path` or `port` says where. */
export interface NbdServerOptions extends Abortable {
  /** Path of a unix socket, which is made, and removed at the end. One that a server left behind which is no more is taken over. */
  path?: PathLike | undefined
  /** TCP port, 0 for any that is free. Without `tls` nothing is encrypted, and every client is let in. */
  port?: number | undefined
  /** Name or address to listen on. Default `'127.0.0.1'`. `'::'` is all of the machine, of both kinds where the system has it so. */
  host?: string | undefined
  /** Go on when the last client has gone. Default true; false ends the server then. */
  persistent?: boolean | undefined
  /** Clients at once, 1 to 1024; others wait until one has gone. Default 100. */
  maxConnections?: number | undefined
  /** Milliseconds that a client may take to begin, with TLS too. Default 10000. */
  handshakeTimeout?: number | undefined
  /**
   * Clients begin with TLS, and are told nothing before it. Default: nothing is encrypted. Node encrypts, on this thread: what keeps its event loop
   * busy keeps clients waiting. Not on Windows.
   */
  tls?: NbdServerTls | undefined
  /** Ends the server, as {@link NbdServer.close} does; one that is aborted already rejects the call. */
  signal?: AbortSignal | undefined
}

/** Options of {@link serveNbd} for one image. */
export interface NbdOptions extends NbdServerOptions, NbdServing {
  /** Name that clients ask for. Default `''`, which those mean who give none. */
  exportName?: Name | undefined
}

/** Where a server listens. */
export type NbdAddress =
  | {
      /** The socket's file. */
      readonly path: string
      /** The bytes of a path that is no text. */
      readonly pathBytes?: Buffer
    }
  | {
      /** The address of this machine. */
      readonly host: string
      /** The port that it got. */
      readonly port: number
    }

/** Images of one server: what clients of this library list at most, and more than anybody has. */
const MAX_EXPORTS = 1024

/** Longest names and descriptions of the protocol, in bytes. */
const MAX_NAME = 4096

/** What a string of the protocol can be; an empty one is a name, too. */
const wireText =
  <T>(read: (value: unknown, name: string) => T, length: (value: T) => number): Reader<T> =>
  (value, name) => {
    const given = read(value, name)
    if (length(given) <= MAX_NAME) return given
    throw invalidArgument(name, `${name} must not be longer than ${MAX_NAME} bytes`)
  }

const exportName = wireText(
  (value, name) => (value === '' ? '' : storedName(value, name)),
  given => encodeText(given).length,
)

const description = wireText(
  (value, name) => (value === '' ? '' : text(value, name)),
  given => Buffer.byteLength(given),
)

/** Longest name of a bitmap in the protocol: with what stands before it, it is a name. */
const MAX_BITMAPS = 1024

const names: Reader<readonly string[]> = (value, name) => {
  if (!Array.isArray(value)) throw invalidArgument(name, `${name} must be a list of names, not ${describe(value)}`)
  if (value.length > MAX_BITMAPS) throw invalidArgument(name, `${name} must be ${MAX_BITMAPS} names at most`)
  return value.map((entry: unknown, index) => storedName(entry, `${name}[${index}]`))
}

const STAYS = staysHere('an NBD server')

const SERVER = {
  ...ABORTABLE,
  path: (value: unknown, name: string) => toPath(value, name),
  port: integer(0, 65535),
  host: text,
  persistent: flag,
  maxConnections: integer(1, 1024),
  handshakeTimeout: integer(1, 2 ** 31 - 1),
  tls: serverTls,
} as const

const SERVING = { description, offset: bytes, readOnly: flag, allocationDepth: flag, bitmaps: names } as const

const ONE = { ...SERVER, ...SERVING, exportName } as const

const anImage: Reader<Image> = (value, name) => {
  if (typeof value === 'object' && value !== null && ownerOf(value) !== undefined) return value as Image
  throw invalidArgument(name, `${name} must be an Image, not ${describe(value)}`)
}

const SERVED = { ...SERVING, name: exportName, image: anImage } as const

/**
 * A server that runs. It keeps the process alive, as `net.Server` does, unless {@link NbdServer.unref} says otherwise. It ends with
 * `close()`, with its image, with the environment, and, if it is not persistent, with its last client.
 */
export class NbdServer implements AsyncDisposable {
  /** @internal */
  readonly threadBound = STAYS
  readonly #server: number
  readonly #closed: Promise<void>
  #ended = false
  #referenced = true

  /** @internal Servers are made by `serveNbd`. */
  constructor(started: NativeNbdStarted, signal: AbortSignal | undefined, encrypting?: Encrypting) {
    if (typeof started !== 'object' || started === null || !('server' in started)) {
      throw invalidArgument('NbdServer', 'an NbdServer is made by serveNbd(), not by its constructor')
    }
    this.#server = started.server
    this.address = toAddress(started)
    const forget = onAbort(signal, () => this.#end())
    this.#closed = request<void>((number, addon) => addon.awaitNbd(number, started.server)).finally(async () => {
      this.#ended = true
      this.ref()
      forget()
      await release(started.server)
      await encrypting?.end()
    })
  }

  /** Where it listens, with the port that it got. */
  readonly address: NbdAddress

  /** Clients that are connected. */
  get connections(): number {
    return this.#ended ? 0 : native.nbdConnections(this.#server)
  }

  /** Resolves when it has ended, whatever ended it. */
  get closed(): Promise<void> {
    return this.#closed
  }

  /** Takes no more clients and no more requests, answers those that are under way, and resolves when all connections are closed. */
  close(): Promise<void> {
    this.#end()
    return this.#closed
  }

  /** Keeps the process alive. */
  ref(): this {
    this.#reference(true)
    return this
  }

  /** Does not keep the process alive by itself: an end of the process ends it. */
  unref(): this {
    if (!this.#ended) this.#reference(false)
    return this
  }

  /** As {@link NbdServer.close}, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  /** @internal */
  [INSPECT](depth: number, options: InspectOptions, inspect: Inspect): string {
    const { address, connections } = this
    return inspectAs(
      'NbdServer',
      { address, connections, state: this.#ended ? 'closed' : 'open' },
      depth,
      options,
      inspect,
    )
  }

  #end(): void {
    if (!this.#ended) native.endNbd(this.#server)
  }

  #reference(holds: boolean): void {
    if (holds === this.#referenced) return
    this.#referenced = holds
    native.referenceRequest(holds)
  }
}

function toAddress({ path, host, port }: NativeNbdStarted): NbdAddress {
  if (path === undefined) return { host: host ?? '', port: port ?? 0 }
  const shown = shownText(path)
  return shown === path ? { path } : { path: shown, pathBytes: encodeText(path) }
}

/**
 * Serves the disk of an open image over NBD, for `qemu-img`, `nbdcopy`, a hypervisor or the kernel; or those of several, by name. The images
 * stay usable meanwhile: requests of clients and of this process see each other's writes. Closing one of them ends the server first. A client
 * that breaks the protocol, goes away or wants too much loses its connection, nothing else. Who may connect says the file system, on a unix
 * socket, or `tls`; without both everybody may.
 *
 * @example
 * ```ts
 * await using server = await serveNbd([{ name: 'a', image: a }, { name: 'b', image: b, readOnly: true }], {
 *   port: 10809,
 *   host: '0.0.0.0',
 *   tls: { cert: await readFile('server-cert.pem'), key: await readFile('server-key.pem'), ca: await readFile('ca-cert.pem') },
 * })
 * ```
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_CLOSED`; `ERR_QCOW2_READ_ONLY` for `readOnly: false` of an image that is open for reading;
 *   `ERR_QCOW2_NO_BITMAP`; `ERR_QCOW2_CORRUPT` for an inconsistent bitmap; `ERR_QCOW2_INVALID_ARGUMENT`, for certificates and keys that
 *   cannot be used, too; the system's code (`EADDRINUSE`, `EACCES`)
 */
export function serveNbd(image: Image, options: NbdOptions): Promise<NbdServer>
export function serveNbd(exports: readonly NbdServed[], options: NbdServerOptions): Promise<NbdServer>
export async function serveNbd(served: Image | readonly NbdServed[], options: NbdOptions): Promise<NbdServer> {
  const { server, tls, exports, signal } = Array.isArray(served)
    ? readSeveral(served, options)
    : readOne(served as Image, options)
  throwIfAborted(signal)
  return new Promise<NbdServer>((resolve, reject) => {
    const holders = exports.map(({ owner }) => owner)
    holding(holders, () =>
      serve(holders, { ...server, exports: exports.map(each => each.order) }, tls, signal, resolve),
    ).catch(reject)
  })
}

/** What a call asks for. */
interface Wanted {
  readonly server: Omit<NativeNbdOrder, 'exports' | 'tls'>
  readonly tls: Encryption | undefined
  readonly exports: readonly { readonly owner: ImageOwner; readonly order: NativeNbdExportOrder }[]
  readonly signal: AbortSignal | undefined
}

function readOne(image: Image, options: NbdOptions): Wanted {
  const owner = ownerOf(image)
  if (owner === undefined) {
    throw invalidArgument('image', `image must be an Image, or a list of what is served, not ${describe(image)}`)
  }
  const read = readOptions(options, 'serveNbd', ONE)
  const order = toExportOrder(owner, image, read.exportName, read, 'serveNbd')
  return { server: toServerOrder(read), tls: read.tls, signal: read.signal, exports: [{ owner, order }] }
}

function readSeveral(served: readonly NbdServed[], options: NbdServerOptions): Wanted {
  const read = readOptions(options, 'serveNbd', SERVER)
  if (served.length === 0 || served.length > MAX_EXPORTS) {
    throw invalidArgument('exports', `serveNbd: 1 to ${MAX_EXPORTS} images are served, not ${served.length}`)
  }
  const exports = served.map((each, index) => {
    const who = `serveNbd: exports[${index}]`
    const { image, name, ...how } = readOptions(each, who, SERVED)
    const owner = image && ownerOf(image)
    if (image === undefined || owner === undefined) throw invalidArgument('image', `${who} has no image`)
    return { owner, order: toExportOrder(owner, image, name, how, who) }
  })
  const taken = new Set<string>()
  for (const { order } of exports) {
    const { exportName: name } = order
    if (taken.has(name)) throw invalidArgument('name', `serveNbd: two exports have the name '${shownText(name)}'`)
    taken.add(name)
  }
  return { server: toServerOrder(read), tls: read.tls, signal: read.signal, exports }
}

/** Runs work while all the images are kept open. */
const holding = (owners: readonly ImageOwner[], work: () => Promise<void>): Promise<void> =>
  owners.reduceRight<() => Promise<void>>((inner, owner) => () => owner.read(inner), work)()

/** Until the server has ended: the images are kept open meanwhile. */
async function serve(
  owners: readonly ImageOwner[],
  order: NativeNbdOrder,
  tls: Encryption | undefined,
  signal: AbortSignal | undefined,
  tell: (server: NbdServer) => void,
): Promise<void> {
  let closing = false
  let server: NbdServer | undefined
  const close = (): void => {
    closing = true
    void server?.close()
  }
  const forget = owners.map(owner => owner.onClose(close))
  try {
    const encrypting = tls && new Encrypting(tls)
    const started = await request<NativeNbdStarted>((number, addon) =>
      addon.startNbd(number, { ...order, tls: encrypting?.number }),
    ).catch(async (error: unknown) => {
      await encrypting?.end()
      throw error
    })
    server = new NbdServer(started, signal, encrypting)
    // What came meanwhile.
    if (closing || signal?.aborted) void server.close()
    tell(server)
    await server.closed
  } finally {
    for (const each of forget) each()
  }
}

function toServerOrder(read: Read<typeof SERVER>): Wanted['server'] {
  const { path, port, host } = read
  if ((path === undefined) === (port === undefined)) {
    throw invalidArgument('path', 'serveNbd: either path or port says where to listen')
  }
  if (host !== undefined && path !== undefined) {
    throw invalidArgument('host', 'serveNbd: host goes with port, not with path')
  }
  return {
    path,
    host: host ?? '127.0.0.1',
    port: port ?? 0,
    persistent: read.persistent ?? true,
    maxConnections: read.maxConnections ?? 100,
    handshakeTime: read.handshakeTimeout,
  }
}

function toExportOrder(
  owner: ImageOwner,
  image: Image,
  name: string | undefined,
  read: Read<typeof SERVING>,
  who: string,
): NativeNbdExportOrder {
  const { readOnly = image.readOnly } = read
  if (!readOnly && image.readOnly) {
    const message = `${who}: readOnly: false needs an image that is open for writing: open it with flags: 'r+'`
    throw new Qcow2Error('ERR_QCOW2_READ_ONLY', message, { field: 'readOnly' })
  }
  return {
    image: owner.image,
    exportName: exactName(name ?? ''),
    description: read.description ?? '',
    offset: read.offset ?? 0,
    readOnly,
    allocationDepth: read.allocationDepth ?? false,
    bitmaps: read.bitmaps ?? [],
  }
}
