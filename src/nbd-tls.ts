/** NBD over TLS. The engine knows when TLS begins; Node, which has it, encrypts. Node's `net` and `tls` are loaded only where it is asked for. */

import type { Socket } from 'node:net'
// Not the global ones, which test runners replace by fakes that never fire by themselves.
import { clearTimeout, setTimeout } from 'node:timers'
import type { ConnectionOptions, TlsOptions } from 'node:tls'
import { invalidArgument, Qcow2Error } from './errors.js'
import { type NativeTlsConnection, native } from './native.js'
import { type Reader, readOptions, text } from './options.js'
import { request } from './support/requests.js'
import { describe } from './units.js'

/** Certificates, or a key, in PEM: the text, or the bytes of such a file. */
export type Pem = string | Uint8Array

/** A server that is known by its certificate. */
export interface NbdServerX509 {
  /** The server's certificate, and those between it and its authority. */
  cert: Pem
  /** The key of `cert`. */
  key: Pem
  /** What `key` is encrypted with. */
  passphrase?: string | undefined
  /** The authorities of clients: each client must have a certificate of one of them. Default: every client is let in. */
  ca?: Pem | undefined
  /** Certificates of `ca` that have been revoked. */
  crl?: Pem | undefined
}

/** A server that shares a key with each of its clients. */
export interface NbdServerPsk {
  /** The key of each client, by the client's name. */
  psk: Readonly<Record<string, Uint8Array>>
}

/** How clients of a server begin: with TLS, or not at all. */
export type NbdServerTls = NbdServerX509 | NbdServerPsk

/** A server that must have a certificate. */
export interface NbdClientX509 {
  /** The authorities of servers. Default: those that Node trusts. */
  ca?: Pem | undefined
  /** Certificates of `ca` that have been revoked. */
  crl?: Pem | undefined
  /** The client's own certificate, where the server wants one. */
  cert?: Pem | undefined
  /** The key of `cert`. */
  key?: Pem | undefined
  /** What `key` is encrypted with. */
  passphrase?: string | undefined
  /** The name or address that the server's certificate must be for. Default: that of the URI, which has none for a unix socket. */
  hostname?: string | undefined
}

/** A server with which a key is shared. */
export interface NbdClientPsk {
  /** By what name the server knows the key. */
  psk: {
    /** The name of the key. */
    readonly user: string
    /** The key itself. */
    readonly key: Uint8Array
  }
}

/** How the connection to a server is encrypted. */
export type NbdClientTls = NbdClientX509 | NbdClientPsk

/** How long the other side may take to end a connection on which all is said, in milliseconds. */
const FAREWELL = 2000

/**
 * Keys that are shared: TLS 1.2 alone, whose ciphers say that a key proves who the other side is. In a handshake of TLS 1.3 a certificate
 * might do instead. Each has a secret of its own for every connection.
 */
const PSK = {
  maxVersion: 'TLSv1.2',
  ciphers: 'ECDHE-PSK-CHACHA20-POLY1305:ECDHE-PSK-AES256-CBC-SHA384:ECDHE-PSK-AES128-CBC-SHA256:!RSAPSK',
} as const

/** OpenSSL's limits, in bytes. */
const MAX_KEY = 256
const MAX_USER = 128

const pem: Reader<string | Buffer> = (value, name) => {
  if (typeof value === 'string') return text(value, name)
  if (value instanceof Uint8Array && value.length > 0) return Buffer.from(value)
  throw invalidArgument(name, `${name} must be PEM, a string or bytes, not ${describe(value)}`)
}

const sharedKey: Reader<Buffer> = (value, name) => {
  if (value instanceof Uint8Array && value.length > 0 && value.length <= MAX_KEY) return Buffer.from(value)
  throw invalidArgument(name, `${name} must be 1 to ${MAX_KEY} bytes, not ${describe(value)}`)
}

const user: Reader<string> = (value, name) => {
  const given = text(value, name)
  if (Buffer.byteLength(given) <= MAX_USER) return given
  throw invalidArgument(name, `${name} must not be longer than ${MAX_USER} bytes`)
}

const keys: Reader<ReadonlyMap<string, Buffer>> = (value, name) => {
  if (typeof value !== 'object' || value === null) {
    throw invalidArgument(name, `${name} must be an object with the key of each client, not ${describe(value)}`)
  }
  const all = Object.entries(value).map(([who, key]) => [user(who, name), sharedKey(key, `${name}.${who}`)] as const)
  if (all.length === 0) throw invalidArgument(name, `${name} must have a key: nobody could connect`)
  return new Map(all)
}

const SERVER_X509 = { cert: pem, key: pem, passphrase: text, ca: pem, crl: pem } as const
const CLIENT_X509 = { ...SERVER_X509, hostname: text } as const
const SERVER_PSK = { psk: keys } as const
const CLIENT_PSK = {
  psk: (value: unknown, name: string) => {
    const { user: who, key } = readOptions(value, name, { user, key: sharedKey })
    if (who !== undefined && key !== undefined) return { user: who, key }
    throw invalidArgument(name, `${name} must have a user and a key`)
  },
} as const

const isPsk = (value: unknown): boolean => typeof value === 'object' && value !== null && 'psk' in value

/** What a reader of `tls` returns: how a plain connection is encrypted. */
export type Encryption = (plain: Socket, secured: (secure: Socket) => void, failed: (error: Error) => void) => void

/** What belongs together is given together, and makes a context of OpenSSL's. */
function checked<T extends TlsOptions | ConnectionOptions>(options: T, name: string): T {
  if (process.platform === 'win32') {
    throw new Qcow2Error('ERR_QCOW2_UNSUPPORTED_FEATURE', `${name}: NBD over TLS is not supported on Windows`)
  }
  for (const [one, other] of [
    ['cert', 'key'],
    ['key', 'cert'],
    ['passphrase', 'key'],
    ['crl', 'ca'],
  ] as const) {
    if (options[one] === undefined || options[other] !== undefined) continue
    throw invalidArgument('tls', `${name}: ${one} goes with ${other}, which is missing`)
  }
  try {
    process.getBuiltinModule('node:tls').createSecureContext(options)
    // OpenSSL ignores what is no certificate here, and trusts nobody then.
    const { ca } = options
    if (typeof ca === 'string' || Buffer.isBuffer(ca)) new (process.getBuiltinModule('node:crypto').X509Certificate)(ca)
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error)
    throw invalidArgument('tls', `${name}: these make no TLS: ${reason}`)
  }
  return options
}

/** Reads a {@link NbdServerTls}. */
export const serverTls: Reader<Encryption> = (value, name) => {
  const { psk } = isPsk(value) ? readOptions(value, name, SERVER_PSK) : {}
  const x509 = psk === undefined ? readOptions(value, name, SERVER_X509) : {}
  if (psk === undefined && !('cert' in x509 && x509.cert !== undefined)) {
    throw invalidArgument('tls', `${name}: a server has a cert and its key, or keys that it shares (psk)`)
  }
  const client = 'ca' in x509 && x509.ca !== undefined
  const shared = psk && { ...PSK, pskCallback: (_: unknown, who: string): Buffer | null => psk.get(who) ?? null }
  const options = checked<TlsOptions>({ ...x509, requestCert: client, rejectUnauthorized: client, ...shared }, name)
  return (plain, secured, failed) => {
    // Of one connection alone: which one is secured then needs no telling.
    const { createServer } = process.getBuiltinModule('node:tls')
    const server = createServer(options, secured)
    server.on('tlsClientError', failed).emit('connection', plain)
  }
}

/** Reads a {@link NbdClientTls}, for a server of any host: {@link withHost} says of which one. */
export const clientTls: Reader<ConnectionOptions> = (value, name) => {
  const options = isPsk(value) ? readPsk(value, name) : readX509(value, name)
  return checked<ConnectionOptions>(options, name)
}

function readPsk(value: unknown, name: string): ConnectionOptions {
  const { psk } = readOptions(value, name, CLIENT_PSK)
  if (psk === undefined) throw invalidArgument('psk', `${name}: psk must have a user and a key`)
  return { ...PSK, pskCallback: () => ({ identity: psk.user, psk: psk.key }), checkServerIdentity: () => undefined }
}

function readX509(value: unknown, name: string): ConnectionOptions {
  const { hostname: host, ...options } = readOptions(value, name, CLIENT_X509)
  return { ...options, ...(host !== undefined && { host }) }
}

/** The host of a URI, as what certificates must be for, where nothing else is said. A key that is shared names nobody. */
export function withHost(options: ConnectionOptions, uriHost: string | undefined, name: string): ConnectionOptions {
  const { host = uriHost } = options
  if (host !== undefined || options.pskCallback !== undefined)
    return { ...options, ...(host !== undefined && { host }) }
  throw invalidArgument(
    'hostname',
    `${name}: hostname is needed for a unix socket: whom the certificate there must be for`,
  )
}

/** How connections to a server are encrypted. */
export function clientEncryption(options: ConnectionOptions): Encryption {
  const { isIP } = process.getBuiltinModule('node:net')
  const { host } = options
  // An address is no name to ask for.
  const named = host !== undefined && isIP(host) === 0 ? { servername: host } : {}
  return (plain, secured, failed) => {
    const { connect } = process.getBuiltinModule('node:tls')
    const secure = connect({ ...options, ...named, socket: plain })
    secure.on('error', failed).once('secureConnect', () => secured(secure))
  }
}

/** Connections of the engine's that are encrypted, until {@link Encrypting.end}. */
export class Encrypting {
  /** The addon's number of what they come by. */
  readonly number: number
  /** Why the last one that failed did. */
  failure: Error | undefined
  readonly #encryption: Encryption
  readonly #bridges = new Set<Bridge>()
  readonly #taken: Promise<void>

  constructor(encryption: Encryption) {
    this.#encryption = encryption
    this.number = native.startTls()
    this.#taken = this.#take()
  }

  /** Takes no more, and resolves when those that there are have ended: what the engine has said is still sent. */
  async end(): Promise<void> {
    await request<void>((id, addon) => addon.release(id, this.number))
    await this.#taken
    await Promise.all([...this.#bridges].map(bridge => bridge.end()))
  }

  async #take(): Promise<void> {
    for (;;) {
      const coming = request<NativeTlsConnection | undefined>((id, addon) => addon.nextTls(id, this.number))
      // Whoever waits for the connection keeps the process alive, where that is wanted.
      native.referenceRequest(false)
      const connection = await coming.catch(() => undefined)
      native.referenceRequest(true)
      if (connection === undefined) return
      this.#begin(connection)
    }
  }

  #begin(connection: NativeTlsConnection): void {
    const bridge = new Bridge(connection, this.#encryption, error => {
      this.failure = error
    })
    this.#bridges.add(bridge)
    void bridge.closed.then(() => this.#bridges.delete(bridge))
  }
}

/** One connection: bytes pass between the other side, where they are encrypted, and the engine. Pipes hold no more than their buffers. */
class Bridge {
  /** Resolves when nothing of it is open. */
  readonly closed: Promise<unknown>
  readonly #sockets: Socket[]
  #secured = false

  constructor(connection: NativeTlsConnection, encryption: Encryption, failed: (error: Error) => void) {
    const { Socket } = process.getBuiltinModule('node:net')
    // They keep no process alive: requests do.
    const adopt = (fd: number, readable: boolean, writable: boolean): Socket =>
      new Socket({ fd, readable, writable }).unref()
    const plain = adopt(connection.outer, true, true)
    const input = adopt(connection.input, false, true)
    const output = adopt(connection.output, true, false)
    this.#sockets = [plain, input, output]
    this.closed = Promise.all(this.#sockets.map(each => new Promise(resolve => each.once('close', resolve))))
    const destroy = (): void => this.#destroy()
    plain.on('error', destroy).once('close', destroy)
    // The engine takes no more; what it answers is still sent.
    input.on('error', () => {})
    // The engine ends it: it has its limits, also on how long a handshake may take.
    output.on('error', destroy).once('end', () => {
      if (this.#secured) setTimeout(destroy, FAREWELL).unref()
      else destroy()
    })
    // Read from the beginning, so that its end is seen: it says one option before it waits for an answer.
    const early: Buffer[] = []
    const keep = (bytes: Buffer): void => {
      early.push(bytes)
    }
    output.on('data', keep)
    const secured = (secure: Socket): void => {
      this.#secured = true
      this.#sockets.push(secure)
      secure.on('error', destroy).once('close', destroy)
      output.off('data', keep)
      for (const bytes of early) secure.write(bytes)
      output.pipe(secure)
      secure.pipe(input)
      // Nobody wants it any more, but its end is to be seen.
      input.once('close', () => secure.resume())
    }
    const end = (error: Error): void => {
      if (!this.#secured) failed(error)
      destroy()
    }
    try {
      encryption(plain, secured, end)
    } catch (error) {
      end(error instanceof Error ? error : new Error(String(error)))
    }
  }

  /** Resolves when it has closed, soon: the engine has ended it. Until then the process is kept. */
  async end(): Promise<void> {
    for (const socket of this.#sockets) socket.ref()
    const late = setTimeout(() => this.#destroy(), FAREWELL)
    await this.closed
    clearTimeout(late)
  }

  #destroy(): void {
    for (const socket of this.#sockets) socket.destroy()
  }
}
