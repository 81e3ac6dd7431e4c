/** `--object tls-creds-x509,…` and `tls-creds-psk,…`: folders with certificates and keys, as QEMU lays them out. */

import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { NbdClientTls, NbdServerTls, SecretBytes } from '../index.js'
import { toName } from '../text.js'
import { describeError, strerror } from './errors.js'
import { CommandFailure, unsupported } from './failure.js'
import { parseValue } from './options.js'

/** What TLS begins with. */
export type TlsCredentials =
  | { readonly endpoint: 'server'; readonly tls: NbdServerTls }
  | { readonly endpoint: 'client'; readonly tls: NbdClientTls }

/** The same, for a server whose certificate is for another name. */
export const namedTls = (tls: NbdClientTls, hostname: string | undefined): NbdClientTls =>
  hostname === undefined || 'psk' in tls ? tls : { ...tls, hostname }

/** What is kept in the folder of an object. */
const FILES = {
  ca: 'ca-cert.pem',
  crl: 'ca-crl.pem',
  server: { cert: 'server-cert.pem', key: 'server-key.pem' },
  client: { cert: 'client-cert.pem', key: 'client-key.pem' },
  keys: 'keys.psk',
} as const

/** By what name QEMU's clients say who they are, where nothing else is said. */
const DEFAULT_USER = 'qemu'

/** The properties of each kind of object. */
const PROPERTIES: Readonly<Record<string, readonly string[]>> = {
  'tls-creds-x509': ['id', 'dir', 'endpoint', 'verify-peer', 'sanity-check', 'passwordid', 'priority'],
  'tls-creds-psk': ['id', 'dir', 'endpoint', 'verify-peer', 'username', 'priority'],
}

/** Whether an object is of these; `tls-creds-anon` is not: nobody would know who the other side is. */
export const isTlsObject = (kind: string): boolean => Object.hasOwn(PROPERTIES, kind)

/** Reads an object; `secretOf` finds what its key is encrypted with. */
export function readTlsObject(
  kind: string,
  values: ReadonlyMap<string, string>,
  secretOf: (id: string) => SecretBytes,
): TlsCredentials {
  const other = [...values.keys()].find(name => !PROPERTIES[kind]?.includes(name))
  if (other !== undefined) throw new CommandFailure(`Parameter '${other}' is unexpected`)
  if (values.has('priority')) throw unsupported("Parameter 'priority'", 'ciphers are those of Node')
  const folder = values.get('dir')
  if (folder === undefined) throw new CommandFailure("Missing 'dir' property value")
  const endpoint = values.get('endpoint') ?? 'client'
  if (endpoint !== 'server' && endpoint !== 'client') {
    throw new CommandFailure(`Parameter 'endpoint' does not accept value '${endpoint}'`)
  }
  const verify = parseBool(values, 'verify-peer')
  if (kind === 'tls-creds-psk') return readKeys(folder, endpoint, values.get('username'))
  parseBool(values, 'sanity-check')
  const id = values.get('passwordid')
  const ca = wanted(folder, FILES.ca)
  const crl = found(folder, FILES.crl)
  const own = FILES[endpoint]
  const password = id === undefined ? {} : { passphrase: toText(secretOf(id)) }
  const authority = { ca, ...(crl !== undefined && { crl }) }
  if (endpoint === 'server') {
    const [cert, key] = [wanted(folder, own.cert), wanted(folder, own.key)]
    return { endpoint, tls: { cert, key, ...password, ...(verify && authority) } }
  }
  const [cert, key] = [found(folder, own.cert), found(folder, own.key)]
  const certificate = cert !== undefined && key !== undefined ? { cert, key, ...password } : {}
  return { endpoint, tls: { ...authority, ...certificate } }
}

/** OpenSSL takes a passphrase as text. */
const toText = (secret: SecretBytes): string =>
  secret instanceof Uint8Array ? Buffer.from(secret).toString() : String(secret)

const parseBool = (values: ReadonlyMap<string, string>, name: string): boolean =>
  parseValue({ name, type: 'bool' }, values.get(name) ?? 'on') === true

function readKeys(folder: string, endpoint: 'server' | 'client', username: string | undefined): TlsCredentials {
  if (endpoint === 'server' && username !== undefined) {
    throw new CommandFailure('username should not be set when endpoint=server')
  }
  const path = join(folder, FILES.keys)
  const keys = new Map(toKeys(wanted(folder, FILES.keys).toString(), path))
  if (endpoint === 'server') return { endpoint, tls: { psk: Object.fromEntries(keys) } }
  const user = username ?? DEFAULT_USER
  const key = keys.get(user)
  if (key === undefined) throw new CommandFailure(`Username ${user} not found in PSK file ${path}`)
  return { endpoint, tls: { psk: { user, key } } }
}

/** Lines of a user and a key in hexadecimal digits. */
const toKeys = (text: string, path: string): [string, Buffer][] =>
  text
    .split(/\r?\n/)
    .filter(line => line !== '')
    .map(line => {
      const [, user, key] = /^([^:]+):((?:[0-9a-f]{2})+)$/i.exec(line) ?? []
      if (user !== undefined && key !== undefined) return [user, Buffer.from(key, 'hex')]
      // The line may have a key in it: it is nothing for a message.
      throw new CommandFailure(`A line of PSK file ${path} is not USER:KEY, a key in hexadecimal digits`)
    })

function wanted(folder: string, name: string): Buffer {
  const path = join(folder, name)
  try {
    return readFileSync(toName(path))
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? String(error.code) : ''
    const reason = strerror(code) ?? describeError(error)
    throw new CommandFailure(`Unable to access credentials ${path}: ${reason}`, { cause: error })
  }
}

function found(folder: string, name: string): Buffer | undefined {
  try {
    return wanted(folder, name)
  } catch (error) {
    const { cause } = error as CommandFailure
    if (cause instanceof Error && 'code' in cause && cause.code === 'ENOENT') return undefined
    throw error
  }
}
