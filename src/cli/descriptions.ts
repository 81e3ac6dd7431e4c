/**
 * Images that a person describes in place of naming them: `json:{"driver":"qcow2","file":{"filename":"a"}}`, and
 * `driver=qcow2,file.filename=a` with `--image-opts`. Only what is typed is read so: a name that an image stores never is.
 */

import { isFormat, PLAIN_FORMAT } from '../formats/table.js'
import type { CacheMode, Format } from '../index.js'
import { CommandFailure } from './failure.js'
import { describedExport, type ExportConnection, NBD_DRIVER, takeOfExport } from './nbd-description.js'
import { parseValue, settings } from './options.js'
import { OVERLAP_TEMPLATES, runtimeOption } from './runtime-options.js'

/** A file below an image. */
export interface BelowImage {
  readonly filename: string
  readonly format: Format | undefined
}

/** An image that was described. */
export interface Description {
  /** The path of a file, or the URI of an export. */
  readonly filename: string
  readonly isFile: boolean
  readonly format: Format | undefined
  /** How the export is reached, where it is one. */
  readonly connection: ExportConnection
  /** The file with its header, where that is another one. */
  readonly header: string | undefined
  /** The disk of an appliance that is meant. */
  readonly member: string | undefined
  /** The files below it, in place of those that the image names: the next one first. */
  readonly below: readonly BelowImage[]
  /** Ids of the secrets of its layers, top first. */
  readonly secrets: readonly (string | undefined)[]
  /** Which of them may be written to although their encryption is weak. */
  readonly weak: readonly boolean[]
  /** Nothing may write to it. */
  readonly readOnly: boolean
  readonly forceShare: boolean
  readonly locking: 'auto' | 'on' | 'off' | undefined
  readonly cache: CacheMode | undefined
}

/** What is said of an image by its name alone. */
export const plainDescription = (filename: string): Description => ({
  filename,
  isFile: true,
  format: undefined,
  connection: {},
  header: undefined,
  member: undefined,
  below: [],
  secrets: [],
  weak: [],
  readOnly: false,
  forceShare: false,
  locking: undefined,
  cache: undefined,
})

/** What a node is told, by dotted names. */
type Values = ReadonlyMap<string, string>

const JSON_PREFIX = 'json:'

/** Whether an argument describes an image. */
export const isDescription = (argument: string): boolean => argument.startsWith(JSON_PREFIX)

/** Reads a description; one that begins with `json:` is JSON, any other a list of options. */
export function readDescription(typed: string): Description {
  const refused = (why: string): CommandFailure => new CommandFailure(`Could not open '${typed}': ${why}`)
  try {
    return toDescription(isDescription(typed) ? fromJson(typed.slice(JSON_PREFIX.length)) : fromList(typed))
  } catch (error) {
    throw error instanceof CommandFailure ? refused(error.message) : error
  }
}

function fromList(list: string): Values {
  const [first, ...rest] = settings(list)
  if (first !== undefined && first.value === undefined && rest.length === 0) {
    throw new CommandFailure(`Cannot find device='${first.name}' nor node-name='${first.name}'`)
  }
  return new Map(settings(list).map(({ name, value }) => [name, value ?? 'on']))
}

/** QEMU's JSON has strings in single quotes, too. */
const STRING = /"(?:[^"\\]|\\.)*"|'((?:[^'\\]|\\.)*)'/gs

function fromJson(text: string): Values {
  const strict = text.replace(STRING, (whole, single: string | undefined) =>
    single === undefined ? whole : `"${single.replaceAll("\\'", "'").replace(/(?<!\\)"/g, '\\"')}"`,
  )
  let parsed: unknown
  try {
    parsed = JSON.parse(strict)
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error)
    throw new CommandFailure(`Could not parse the JSON options: ${reason}`)
  }
  if (!isObject(parsed)) throw new CommandFailure('Invalid JSON object given')
  const values = new Map<string, string>()
  flatten(parsed, '', values)
  return values
}

const isObject = (value: unknown): value is Readonly<Record<string, unknown>> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

function flatten(object: Readonly<Record<string, unknown>>, prefix: string, values: Map<string, string>): void {
  for (const [key, value] of Object.entries(object)) {
    const name = `${prefix}${key}`
    if (isObject(value)) flatten(value, `${name}.`, values)
    else if (values.has(name)) throw new CommandFailure(`The option '${name}' is given twice`)
    else if (typeof value === 'boolean') values.set(name, value ? 'on' : 'off')
    else if (typeof value === 'string' || typeof value === 'number') values.set(name, String(value))
    else throw new CommandFailure(`The option '${name}' has no value that is known here`)
  }
}

/** Drivers of files. They are opened as what they are: QEMU asks for the right one, the system knows. */
const FILE_DRIVERS = ['file', 'host_device']

/** What a description was read into. */
interface Reading {
  readonly top: string
  /** Its file is an export of an NBD server, by options. */
  readonly exported: boolean
  readonly connection: { -readonly [K in keyof ExportConnection]: ExportConnection[K] }
  readonly secrets: (string | undefined)[]
  readonly weak: boolean[]
  readOnly: boolean
  forceShare: boolean
  locking: 'auto' | 'on' | 'off' | undefined
  direct: boolean
  noFlush: boolean
}

function toDescription(values: Values): Description {
  const driver = values.get('driver')
  // A driver of files at the top is the file itself: a disk of plain bytes.
  const bare = driver !== undefined && [...FILE_DRIVERS, NBD_DRIVER].includes(driver)
  const protocol = bare ? driver : values.get('file.driver')
  const exported = protocol === NBD_DRIVER
  if (driver !== undefined && !bare && !isFormat(driver)) throw new CommandFailure(`Unknown driver '${driver}'`)
  if (driver === undefined && ![...values.keys()].some(name => name.startsWith('file.'))) {
    throw new CommandFailure('Must specify either driver or file')
  }
  const filename = exported
    ? describedExport(values, bare ? '' : 'file.')
    : bare
      ? values.get('filename')
      : (values.get('file.filename') ?? values.get('filename'))
  if (filename === undefined) {
    throw new CommandFailure(
      bare ? "The 'file' block driver requires a file name" : 'A block device must be specified for "file"',
    )
  }
  const reading: Reading = {
    top: driver ?? 'qcow2',
    exported,
    connection: {},
    secrets: [],
    weak: [],
    readOnly: false,
    forceShare: false,
    locking: undefined,
    direct: false,
    noFlush: false,
  }
  for (const [name, value] of values) take(name, value, bare, reading)
  const { direct, noFlush, connection, secrets, weak, readOnly, forceShare, locking } = reading
  return {
    filename,
    isFile: !exported,
    format: bare ? PLAIN_FORMAT : isFormat(driver) ? driver : undefined,
    connection,
    header: values.get('header.filename'),
    member: values.get(bare ? 'member' : 'file.member'),
    below: belowOf(values),
    secrets,
    weak,
    readOnly,
    forceShare,
    locking,
    cache: noFlush ? 'unsafe' : direct ? 'none' : undefined,
  }
}

const BELOW = /^((?:backing\.)+)(?:driver|file\.filename)$/

/** The files that are described below the image, one for each level down to the last that is. */
function belowOf(values: Values): readonly BelowImage[] {
  const depths = [...values.keys()].map(name => (BELOW.exec(name)?.[1] ?? '').length / 'backing.'.length)
  return Array.from({ length: Math.max(0, ...depths) }, (_, index) => {
    const prefix = 'backing.'.repeat(index + 1)
    const filename = values.get(`${prefix}file.filename`)
    if (filename === undefined) {
      throw new CommandFailure(`A block device must be specified for "file": '${prefix}file.filename' says which`)
    }
    const driver = values.get(`${prefix}driver`)
    return { filename, format: isFormat(driver) ? driver : undefined }
  })
}

const onOff = (name: string, value: string): boolean => parseValue({ name, type: 'bool' }, value) === true

const oneOf = (name: string, value: string, ...known: readonly string[]): void => {
  if (!known.includes(value)) throw new CommandFailure(`Parameter '${name}' does not accept value '${value}'`)
}

/** One option, wherever it stands: of the image, of one below it (`backing.`), of the file that holds one (`file.`). */
function take(option: string, value: string, bare: boolean, reading: Reading): void {
  const backing = /^(?:backing\.)*/.exec(option)?.[0] ?? ''
  const depth = backing.length / 'backing.'.length
  const rest = option.slice(backing.length)
  const file = /^(?:file|header)\./.exec(rest)?.[0] ?? ''
  const name = rest.slice(file.length)
  if (takeOfNode(name, value, depth, reading)) return
  if (reading.exported && depth === 0 && (bare || file === 'file.')) {
    if (takeOfExport(name, value, reading.connection)) return
    throw new CommandFailure(`Block protocol '${NBD_DRIVER}' doesn't support the option '${name}'`)
  }
  if (file !== '' || (bare && depth === 0)) {
    if (takeOfFile(name, value, depth, reading)) return
    throw new CommandFailure(`Block protocol 'file' doesn't support the option '${name}'`)
  }
  if (takeOfFormat(name, value, depth, reading)) return
  const driver = depth === 0 ? reading.top : 'qcow2'
  throw new CommandFailure(`Block format '${driver}' does not support the option '${option}'`)
}

/** Options of every node. */
function takeOfNode(name: string, value: string, depth: number, reading: Reading): boolean {
  switch (name) {
    case 'read-only':
      // What lies below the top is only read anyway.
      if (onOff(name, value) && depth === 0) reading.readOnly = true
      return true
    case 'force-share':
      if (onOff(name, value)) reading.forceShare = true
      return true
    case 'cache.direct':
      if (onOff(name, value)) reading.direct = true
      return true
    case 'cache.no-flush':
      if (onOff(name, value)) reading.noFlush = true
      return true
    case 'auto-read-only':
      onOff(name, value)
      return true
    case 'discard':
      oneOf(name, value, 'ignore', 'off', 'unmap', 'on')
      return true
    case 'detect-zeroes':
      oneOf(name, value, 'off', 'on', 'unmap')
      return true
    case 'node-name':
      return true
    default:
      return false
  }
}

/** Options of the file that holds an image. */
function takeOfFile(name: string, value: string, depth: number, reading: Reading): boolean {
  switch (name) {
    case 'driver':
      if (!FILE_DRIVERS.includes(value)) throw new CommandFailure(`Unknown protocol '${value}'`)
      return true
    case 'filename':
      return true
    case 'member':
      // Of a file that is one part of an image, nothing is chosen.
      return depth === 0
    case 'locking':
      oneOf(name, value, 'auto', 'on', 'off')
      if (depth === 0) reading.locking = value as 'auto' | 'on' | 'off'
      return true
    case 'aio':
      oneOf(name, value, 'threads', 'native', 'io_uring')
      return true
    case 'aio-max-batch':
      parseValue({ name, type: 'number' }, value)
      return true
    case 'drop-cache':
    case 'x-check-cache-dropped':
      onOff(name, value)
      return true
    default:
      return false
  }
}

const belowIsAFile = (name: string): CommandFailure =>
  new CommandFailure(`The option '${name}' names no other node here: '${name}.file.filename' says which file it is`)

/** Options of a format. */
function takeOfFormat(name: string, value: string, depth: number, reading: Reading): boolean {
  switch (name) {
    case 'driver':
      if (isFormat(value) || (depth === 0 && FILE_DRIVERS.includes(value))) return true
      throw new CommandFailure(`Unknown driver '${value}'`)
    case 'filename':
      return depth === 0
    case 'encrypt.key-secret':
    case 'key-secret':
      reading.secrets[depth] = value
      return true
    case 'encrypt.allow-weak':
      reading.weak[depth] = onOff(name, value)
      return true
    case 'encrypt.format':
      oneOf(name, value, 'luks', 'aes')
      return true
    case 'overlap-check':
    case 'overlap-check.template':
      if (OVERLAP_TEMPLATES.includes(value)) return true
      throw new CommandFailure(
        `Unsupported value '${value}' for qcow2 option '${name}'. Allowed are any of the following: ${OVERLAP_TEMPLATES.join(', ')}`,
      )
    case 'offset':
    case 'size':
      if (reading.top !== PLAIN_FORMAT || depth > 0) return false
      throw new CommandFailure(`The option '${name}' of raw disks is not supported: a disk is the whole file`)
    case 'data-file.driver':
      oneOf(name, value, ...FILE_DRIVERS)
      return true
    case 'backing':
      throw belowIsAFile(name)
    case 'data-file':
      throw new CommandFailure('Which file has the data of an image is what the image says: amend changes that')
    default: {
      // None of these is for one command, but each must make sense.
      const type = runtimeOption(name)
      if (type === undefined) return false
      parseValue({ name, type }, value)
      return true
    }
  }
}
