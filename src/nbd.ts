/** Serving an open image over NBD, the network block device protocol. */

import { invalidArgument, Qcow2Error } from './errors.js'
import type { Image } from './image.js'
import { type NativeNbdOrder, type NativeNbdStarted, native } from './native.js'
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
import { type ImageOwner, ownerOf } from './support/owner.js'
import { request } from './support/requests.js'
import { onAbort } from './support/signals.js'
import { encodeText, exactName, type Name, shownText } from './text.js'
import { describe, type Size } from './units.js'

/** Options of {@link serveNbd}. Either `path` or `port` says where. */
export interface NbdOptions extends Abortable {
  /** Path of a unix socket, which is made, and removed at the end. One that a server left behind which is no more is taken over. */
  path?: PathLike | undefined
  /** TCP port, 0 for any that is free. NBD without TLS: nothing is encrypted, and every client is let in. */
  port?: number | undefined
  /** Name or address to listen on. Default `'127.0.0.1'`. `'::'` is all of the machine, of both kinds where the system has it so. */
  host?: string | undefined
  /** Name that clients ask for. Default `''`, which those mean who give none. */
  exportName?: Name | undefined
  /** What it is, for a person. */
  description?: string | undefined
  /** First byte of the disk that is served: what lies before is neither read nor written. Default 0. */
  offset?: Size | undefined
  /** Refuse writes. Default: as the image was opened. */
  readOnly?: boolean | undefined
  /** Go on when the last client has gone. Default true; false ends the server then. */
  persistent?: boolean | undefined
  /** Clients at once, 1 to 1024; others wait until one has gone. Default 100. */
  maxConnections?: number | undefined
  /** Tell how deep in the backing chain data is, as `qemu:allocation-depth`. Default false. */
  allocationDepth?: boolean | undefined
  /** Persistent bitmaps to tell of, as `qemu:dirty-bitmap:NAME`: as they are when a client asks. */
  bitmaps?: readonly Name[] | undefined
  /** Milliseconds that a client may take to begin. Default 10000. */
  handshakeTimeout?: number | undefined
  /** Ends the server, as {@link NbdServer.close} does; one that is aborted already rejects the call. */
  signal?: AbortSignal | undefined
}

/** Where a server listens. */
export type NbdAddress =
  | {
      readonly path: string
      /** The bytes of a path that is no text. */
      readonly pathBytes?: Buffer
    }
  | { readonly host: string; readonly port: number }

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

const SERVE = {
  ...ABORTABLE,
  path: (value: unknown, name: string) => toPath(value, name),
  port: integer(0, 65535),
  host: text,
  exportName,
  description,
  offset: bytes,
  readOnly: flag,
  persistent: flag,
  maxConnections: integer(1, 1024),
  allocationDepth: flag,
  bitmaps: names,
  handshakeTimeout: integer(1, 2 ** 31 - 1),
} as const

/**
 * A server that runs. It keeps the process alive, as `net.Server` does, unless {@link NbdServer.unref} says otherwise. It ends with
 * `close()`, with its image, with the environment, and, if it is not persistent, with its last client.
 */
export class NbdServer implements AsyncDisposable {
  readonly #server: number
  readonly #closed: Promise<void>
  #ended = false
  #referenced = true

  /** @internal Servers are made by `serveNbd`. */
  constructor(started: NativeNbdStarted, signal: AbortSignal | undefined) {
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
 * Serves the disk of an open image over NBD, for `qemu-img`, `nbdcopy`, a hypervisor or the kernel. The image stays usable meanwhile:
 * requests of clients and of this process see each other's writes. Closing the image ends the server first. A client that breaks the
 * protocol, goes away or wants too much loses its connection, nothing else. There is no TLS and no password: on a unix socket the file system says who may connect.
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_CLOSED`; `ERR_QCOW2_READ_ONLY` for `readOnly: false` of an image that is open for reading;
 *   `ERR_QCOW2_NO_BITMAP`; `ERR_QCOW2_CORRUPT` for an inconsistent bitmap; `ERR_QCOW2_INVALID_ARGUMENT`; the system's code (`EADDRINUSE`, `EACCES`)
 */
export async function serveNbd(image: Image, options: NbdOptions): Promise<NbdServer> {
  const owner = ownerOf(image)
  if (owner === undefined) throw invalidArgument('image', `image must be an Image, not ${describe(image)}`)
  const read = readOptions(options, 'serveNbd', SERVE)
  const order = toOrder(read, image)
  throwIfAborted(read.signal)
  return new Promise<NbdServer>((resolve, reject) => {
    owner.read(() => serve(owner, order, read.signal, resolve)).catch(reject)
  })
}

/** Until the server has ended: the image is kept open meanwhile. */
async function serve(
  owner: ImageOwner,
  order: NativeNbdOrder,
  signal: AbortSignal | undefined,
  tell: (server: NbdServer) => void,
): Promise<void> {
  let closing = false
  let server: NbdServer | undefined
  const forget = owner.onClose(() => {
    closing = true
    void server?.close()
  })
  try {
    const started = await request<NativeNbdStarted>((number, addon) => addon.startNbd(number, owner.image, order))
    server = new NbdServer(started, signal)
    // What came meanwhile.
    if (closing || signal?.aborted) void server.close()
    tell(server)
    await server.closed
  } finally {
    forget()
  }
}

function toOrder(read: Read<typeof SERVE>, image: Image): NativeNbdOrder {
  const { path, port, host, readOnly = image.readOnly } = read
  if ((path === undefined) === (port === undefined)) {
    throw invalidArgument('path', 'serveNbd: either path or port says where to listen')
  }
  if (host !== undefined && path !== undefined) {
    throw invalidArgument('host', 'serveNbd: host goes with port, not with path')
  }
  if (!readOnly && image.readOnly) {
    const message = "serveNbd: readOnly: false needs an image that is open for writing: open it with flags: 'r+'"
    throw new Qcow2Error('ERR_QCOW2_READ_ONLY', message, { field: 'readOnly' })
  }
  return {
    path,
    host: host ?? '127.0.0.1',
    port: port ?? 0,
    exportName: exactName(read.exportName ?? ''),
    description: read.description ?? '',
    offset: read.offset ?? 0,
    readOnly,
    persistent: read.persistent ?? true,
    maxConnections: read.maxConnections ?? 100,
    allocationDepth: read.allocationDepth ?? false,
    bitmaps: read.bitmaps ?? [],
    handshakeTime: read.handshakeTimeout,
  }
}
