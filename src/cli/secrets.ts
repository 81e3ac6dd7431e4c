/** `--object secret,…` and `--image-opts`: what opens encrypted images, and which of them. */

import { readFileSync } from 'node:fs'
import { isFormat } from '../formats/table.js'
import type { DetachedImage, EncryptedLayer, Format, Secret, SecretBytes, Secrets } from '../index.js'
import { toName } from '../text.js'
import { CommandFailure, unsupported } from './failure.js'
import { argumentOf, imagePath } from './filename.js'
import { settings } from './options.js'

/** An image that was described by options. */
interface Described {
  readonly format: Format | undefined
  /** The file with its header, where that is another one. */
  readonly header: string | undefined
  /** Ids of the secrets of its layers, top first. */
  readonly secrets: readonly (string | undefined)[]
  /** Which of them may be written to although their encryption is weak. */
  readonly weak: readonly boolean[]
}

/** The objects of a command line. */
export class Objects {
  readonly #secrets = new Map<string, SecretBytes>()
  readonly #images = new Map<string, Described>()

  /** Takes an object as qemu-img does: `secret,id=ID` with `data=TEXT` or `file=NAME`, and `format=base64`. */
  add(definition: string): void {
    const [type, ...rest] = settings(definition)
    if (type === undefined || (type.value !== undefined && type.name !== 'qom-type')) {
      throw new CommandFailure("Parameter 'qom-type' is missing")
    }
    const kind = type.value ?? type.name
    if (kind !== 'secret') throw unsupported(`Object '${kind}'`, 'this version has secrets only')
    const values = new Map(rest.map(({ name, value }) => [name, value ?? 'on']))
    const id = values.get('id')
    if (id === undefined || id === '') throw new CommandFailure("Parameter 'id' is missing")
    if (this.#secrets.has(id)) throw new CommandFailure(`attempt to add duplicate property '${id}' to object`)
    this.#secrets.set(id, toSecret(values))
  }

  /** The secret with an id. */
  secret(id: string): SecretBytes {
    const found = this.#secrets.get(id)
    if (found === undefined) throw new CommandFailure(`No secret with id '${id}'`)
    return found
  }

  /** Takes an image that is described by `driver=qcow2,encrypt.key-secret=ID,file.filename=NAME`; returns its name. */
  describe(options: string): string {
    const values = new Map(settings(options).map(({ name, value }) => [name, value ?? 'on']))
    const filename = values.get('file.filename') ?? values.get('filename')
    if (filename === undefined) {
      throw new CommandFailure(`Could not open '${options}': an image is described by its file.filename`)
    }
    const driver = values.get('driver')
    if (driver !== undefined && !isFormat(driver)) {
      throw new CommandFailure(`Could not open '${options}': Unknown driver '${driver}'`)
    }
    const secrets: (string | undefined)[] = []
    const weak: boolean[] = []
    for (const [name, value] of values) {
      const { depth, rest } = withoutBacking(name)
      if (rest === 'encrypt.key-secret' || rest === 'key-secret') {
        this.secret(value)
        secrets[depth] = value
      } else if (rest === 'encrypt.allow-weak' && ['on', 'off'].includes(value)) {
        weak[depth] = value === 'on'
      } else if (!isHarmless(rest, value, depth)) {
        throw new CommandFailure(`Could not open '${options}': Block format does not support the option '${name}'`)
      }
    }
    const name = argumentOf(filename)
    this.#images.set(name, { format: driver, header: values.get('header.filename'), secrets, weak })
    return name
  }

  /** The format that the description of an image says. */
  formatOf(filename: string): Format | undefined {
    return this.#images.get(filename)?.format
  }

  /** What an image is opened by: its name, and that of its header where its description has one. */
  sourceOf(filename: string): string | Buffer | DetachedImage {
    const header = this.#images.get(filename)?.header
    if (header === undefined) return imagePath(filename)
    return { file: imagePath(filename), header: imagePath(header) }
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

/** How many layers below the top an option is for. */
function withoutBacking(name: string): { depth: number; rest: string } {
  const backing = /^(?:backing\.)*/.exec(name)?.[0] ?? ''
  return { depth: backing.length / 'backing.'.length, rest: name.slice(backing.length) }
}

/** What was read already, or says what is so anyway. Which file lies below, and in what format, is the image's to say. */
const isHarmless = (name: string, value: string, depth: number): boolean =>
  (depth === 0 && ['driver', 'filename', 'file.filename'].includes(name)) ||
  (depth === 0 && name === 'header.filename') ||
  (depth === 0 && /^(?:file|header)\.driver$/.test(name) && ['file', 'host_device'].includes(value)) ||
  (name === 'encrypt.format' && ['luks', 'aes'].includes(value))

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
