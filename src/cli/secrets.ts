/** `--object secret,…` and `--image-opts`: what opens encrypted images, and which of them. */

import { readFileSync } from 'node:fs'
import { isAbsolute } from 'node:path'
import { allowBut, type Below } from '../backing/policy.js'
import type {
  CacheMode,
  EncryptedLayer,
  Format,
  NbdClientTls,
  NbdServerTls,
  NbdSourceOptions,
  ReferencePolicy,
  Secret,
  SecretBytes,
  Secrets,
  SharingOptions,
} from '../index.js'
import { toName } from '../text.js'
import { type BelowImage, type Description, plainDescription, readDescription } from './descriptions.js'
import { CommandFailure, unsupported } from './failure.js'
import { argumentOf, isExport, isRemote, localPath } from './filename.js'
import { settings } from './options.js'
import { isTlsObject, namedTls, readTlsObject, type TlsCredentials } from './tls-objects.js'

/** The objects of a command line. */
export class Objects {
  readonly #secrets = new Map<string, SecretBytes>()
  readonly #tls = new Map<string, TlsCredentials>()
  /** What lies below images, by the paths of these. */
  readonly #below = new Map<string, Below>()
  readonly #images = new Map<string, Description & { readonly typed: string }>()

  /**
   * Takes an object as qemu-img does: `secret,id=ID` with `data=TEXT` or `file=NAME`, and `format=base64`; `tls-creds-x509,id=ID,dir=FOLDER` and
   * `tls-creds-psk,id=ID,dir=FOLDER`, with `endpoint=client` or `server`.
   */
  add(definition: string): void {
    const [type, ...rest] = settings(definition)
    if (type === undefined || (type.value !== undefined && type.name !== 'qom-type')) {
      throw new CommandFailure("Parameter 'qom-type' is missing")
    }
    const kind = type.value ?? type.name
    const isTls = isTlsObject(kind)
    if (kind !== 'secret' && !isTls)
      throw unsupported(`Object '${kind}'`, 'this version has secrets and credentials of TLS')
    const values = new Map(rest.map(({ name, value }) => [name, value ?? 'on']))
    const id = values.get('id')
    if (id === undefined || id === '') throw new CommandFailure("Parameter 'id' is missing")
    if (this.#secrets.has(id) || this.#tls.has(id)) {
      throw new CommandFailure(`attempt to add duplicate property '${id}' to object`)
    }
    if (isTls)
      this.#tls.set(
        id,
        readTlsObject(kind, values, secret => this.secret(secret)),
      )
    else this.#secrets.set(id, toSecret(values))
  }

  /** The secret with an id. */
  secret(id: string): SecretBytes {
    const found = this.#secrets.get(id)
    if (found === undefined) throw new CommandFailure(`No secret with id '${id}'`)
    return found
  }

  /** What TLS begins with for clients of ours, by the id of an object. */
  serverTls(id: string): NbdServerTls {
    const found = this.#credentials(id)
    if (found.endpoint === 'server') return found.tls
    throw new CommandFailure('Expected TLS credentials for a server endpoint')
  }

  /** What TLS with a server begins with, by the id of an object. */
  clientTls(id: string): NbdClientTls {
    const found = this.#credentials(id)
    if (found.endpoint === 'client') return found.tls
    throw new CommandFailure('Expected TLS credentials for a client endpoint')
  }

  #credentials(id: string): TlsCredentials {
    const found = this.#tls.get(id)
    if (found !== undefined) return found
    const other = this.#secrets.has(id)
    throw new CommandFailure(
      other ? `Object with id '${id}' is not TLS credentials` : `No TLS credentials with id '${id}'`,
    )
  }

  /** How the export is reached that a name describes. */
  connectionOf(filename: string): NbdSourceOptions {
    const { tlsCreds, tlsHostname, reconnectDelay = 0 } = this.#images.get(filename)?.connection ?? {}
    const tls = tlsCreds === undefined ? undefined : this.clientTls(tlsCreds)
    return {
      ...(reconnectDelay > 0 && { reconnect: reconnectDelay * 1000 }),
      ...(tls !== undefined && { tls: namedTls(tls, tlsHostname) }),
    }
  }

  /** Takes an image that is described; returns its name. */
  describe(typed: string): string {
    const description = readDescription(typed)
    for (const id of description.secrets) if (id !== undefined) this.secret(id)
    const { tlsCreds } = description.connection
    if (tlsCreds !== undefined) saying(`Could not open '${typed}'`, () => this.clientTls(tlsCreds))
    const { filename, isFile } = description
    return this.#know(isFile ? argumentOf(filename) : filename, { ...description, typed })
  }

  /** Takes the disk of an appliance that is meant by an image that was described. */
  chooseOf(described: string, member: string): void {
    const known = this.#images.get(described)
    if (known === undefined || known.member !== undefined) {
      throw new CommandFailure(
        `Could not open '${described}': its description and --member both say which disk is meant`,
      )
    }
    this.#images.set(described, { ...known, member })
  }

  /** Takes the disk of an appliance that is meant by a plain name, which others of all arguments can have, too; returns its own name. */
  choose(filename: string, member: string, all: readonly string[]): string {
    if (isRemote(filename)) {
      throw new CommandFailure(`Could not open '${filename}': --member is for an appliance, which is a file`)
    }
    const shared = all.filter(each => each === filename).length > 1
    return this.#know(filename, { ...plainDescription(filename), member, typed: filename }, shared)
  }

  #know(wanted: string, image: Description & { readonly typed: string }, shared = false): string {
    const other = (name: string): string => (isAbsolute(name) ? `/.${name}` : `./${name}`)
    let name = shared ? other(wanted) : wanted
    // One file may be described twice, as what it is and as its plain bytes: each has a name of its own.
    while (this.#images.has(name)) name = isExport(name) ? another(name) : other(name)
    this.#images.set(name, image)
    this.#put(name, image.below)
    return name
  }

  /** What images may pull in: what they name, but for those that the command line has the file below of. */
  get references(): ReferencePolicy {
    return this.#below.size === 0 ? 'allow' : allowBut(path => this.belowOf(path))
  }

  /** The file that the command line has below the image at a path. */
  belowOf(path: string): Below | undefined {
    return this.#below.get(path)
  }

  /** Whoever comes to an image by this path finds the same below it. */
  alsoAt(filename: string, path: string): void {
    const below = this.belowOf(localPath(filename))
    if (below !== undefined) this.#below.set(path, below)
  }

  /** Takes the files below an image by its name, the next one first. */
  putBelow(filename: string, parents: readonly string[]): void {
    if (isRemote(filename) || this.#below.has(localPath(filename))) {
      const why = isRemote(filename)
        ? 'of what is no file, --parent is not taken'
        : 'both --parent and its description have it'
      throw new CommandFailure(`Could not open '${filename}': what lies below it: ${why}`)
    }
    this.#put(
      filename,
      parents.map(parent => ({ filename: localPath(parent), format: undefined })),
    )
  }

  #put(filename: string, below: readonly BelowImage[]): void {
    if (below.length === 0) return
    let above = localPath(filename)
    for (const { filename: path, format } of below) {
      this.#below.set(above, { path, format })
      above = path
    }
  }

  /** A message, with what was typed in place of the name of an image that was described. */
  asTyped(message: string): string {
    for (const [name, { typed }] of this.#images) {
      const opening = `Could not open '${name}'`
      if (message.startsWith(opening)) return `Could not open '${typed}'${message.slice(opening.length)}`
    }
    return message
  }

  /** Refuses to write to an image that is described as read-only. */
  refuseReadOnly(filename: string): void {
    if (this.#images.get(filename)?.readOnly) {
      throw new CommandFailure(`Could not open '${filename}': Block node is read-only`)
    }
  }

  /** How the description of an image says that it is shared with other processes; of several, the first that says so. */
  sharingOf(...filenames: readonly string[]): Pick<SharingOptions, 'locking' | 'forceShare'> {
    const images = filenames.flatMap(filename => this.#images.get(filename) ?? [])
    const locking = images.find(image => image.locking !== undefined)?.locking
    return {
      ...(locking !== undefined && { locking }),
      ...(images.some(image => image.forceShare) && { forceShare: true }),
    }
  }

  /** The cache mode that the description of an image says. */
  cacheOf(filename: string): CacheMode | undefined {
    return this.#images.get(filename)?.cache
  }

  /** The format that the description of an image says. */
  formatOf(filename: string): Format | undefined {
    return this.#images.get(filename)?.format
  }

  /** The file with the header of an image, where its description has one. */
  headerOf(filename: string): string | undefined {
    return this.#images.get(filename)?.header
  }

  /** The disk of an appliance that a name or its description means. */
  memberOf(filename: string): string | undefined {
    return this.#images.get(filename)?.member
  }

  /** What opens a layer of an image. */
  secretOfLayer(filename: string, depth: number): Secret | undefined {
    const image = this.#images.get(filename)
    const id = image?.secrets[depth]
    return id === undefined ? undefined : { secret: this.secret(id), allowWeak: image?.weak[depth] === true }
  }

  /** What opens the layers of an image. */
  secretsOf(filename: string): Secrets | undefined {
    if (!this.#images.has(filename)) return undefined
    return ({ depth }: EncryptedLayer) => this.secretOfLayer(filename, depth)
  }
}

/** Runs what fails in few words, and puts others in front. */
export function saying<T>(what: string, run: () => T): T {
  try {
    return run()
  } catch (error) {
    throw error instanceof CommandFailure ? new CommandFailure(`${what}: ${error.message}`, { cause: error }) : error
  }
}

/** Another URI of the same export: parameters that are empty say nothing. */
const another = (uri: string): string => (uri.includes('?') ? `${uri}&` : `${uri}?`)

function toSecret(values: ReadonlyMap<string, string>): SecretBytes {
  const known = ['id', 'data', 'file', 'format']
  const other = [...values.keys()].find(name => !known.includes(name))
  if (other === 'keyid' || other === 'iv') throw unsupported(`Parameter '${other}'`, 'secrets are given as they are')
  if (other !== undefined) throw new CommandFailure(`Property 'secret.${other}' not found`)
  const [data, file] = [values.get('data'), values.get('file')]
  if (data !== undefined && file !== undefined) {
    throw new CommandFailure("'file' and 'data' are mutually exclusive")
  }
  const format = values.get('format') ?? 'raw'
  const read = Object.hasOwn(READERS, format) ? READERS[format] : undefined
  if (read === undefined) throw new CommandFailure(`Parameter 'format' does not accept value '${format}'`)
  if (file !== undefined) return read.file(file)
  if (data !== undefined) return read.text(data)
  throw new CommandFailure("Must provide 'file' or 'data' property")
}

/** How a secret is read that is given in an argument, and one in a file. */
const READERS: Readonly<Record<string, { text: (text: string) => SecretBytes; file: (name: string) => SecretBytes }>> =
  {
    raw: { text: toBytes, file: name => reading(name, path => readFileSync(path)) },
    base64: { text: decoded, file: name => decoded(reading(name, path => readFileSync(path, 'latin1'))) },
  }

function toBytes(text: string): Uint8Array {
  const name = toName(text)
  return typeof name === 'string' ? Buffer.from(name) : name
}

function reading<T>(file: string, read: (path: string | Buffer) => T): T {
  try {
    return read(toName(file))
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error)
    throw new CommandFailure(`Unable to read ${file}: ${reason}`, { cause: error })
  }
}

function decoded(text: string): Buffer {
  const compact = text.replace(/[\r\n]/g, '')
  if (!/^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$/.test(compact)) {
    throw new CommandFailure('Base64 data is not valid')
  }
  return Buffer.from(compact, 'base64')
}
