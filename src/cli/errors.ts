/** The words for what went wrong. */

import { getSystemErrorMap } from 'node:util'
import { DEFAULT_FORMAT, PLAIN_FORMAT } from '../formats/table.js'
import { Qcow2Error } from '../index.js'
import { decodeText } from '../text.js'
import { CommandFailure } from './failure.js'
import { serverOf } from './nbd-names.js'

/** Where libuv's words are not the C library's. */
const STRERROR: Readonly<Record<string, string>> = {
  EADDRNOTAVAIL: 'Cannot assign requested address',
  EAFNOSUPPORT: 'Address family not supported by protocol',
  EALREADY: 'Operation already in progress',
  EBUSY: 'Device or resource busy',
  EEXIST: 'File exists',
  EFAULT: 'Bad address',
  EHOSTUNREACH: 'No route to host',
  EILSEQ: 'Invalid or incomplete multibyte or wide character',
  EINVAL: 'Invalid argument',
  EIO: 'Input/output error',
  EISCONN: 'Transport endpoint is already connected',
  EISDIR: 'Is a directory',
  ELOOP: 'Too many levels of symbolic links',
  EMFILE: 'Too many open files',
  ENAMETOOLONG: 'File name too long',
  ENFILE: 'Too many open files in system',
  ENOMEM: 'Cannot allocate memory',
  ENOTCONN: 'Transport endpoint is not connected',
  ENOTSUP: 'Operation not supported',
  ENXIO: 'No such device or address',
  EOPNOTSUPP: 'Operation not supported',
  ERANGE: 'Numerical result out of range',
  ESPIPE: 'Illegal seek',
  ETXTBSY: 'Text file busy',
  EXDEV: 'Invalid cross-device link',
}

/** The C library's words for a system error's name, if it is one. */
export function strerror(code: string): string | undefined {
  const known = STRERROR[code]
  if (known !== undefined) return known
  for (const [name, message] of getSystemErrorMap().values()) {
    if (name === code) return message.charAt(0).toUpperCase() + message.slice(1)
  }
  return undefined
}

const OPENING: ReadonlySet<string> = new Set(['open', 'openat', 'stat'])

/** What the engine says of a device beside the system's words. */
const READ_ONLY_DEVICE = 'the device is read-only'

interface ErrorFields extends Error {
  readonly code?: unknown
  readonly path?: unknown
  readonly pathBytes?: unknown
  readonly syscall?: unknown
}

/**
 * What an error says, without the name of the image, which the caller puts in front. System errors in the system's words;
 * those of the library with their code, which scripts can look for. `target` is the file that was to be created.
 */
export function describeError(error: unknown, target?: string): string {
  if (!(error instanceof Error)) return String(error)
  const { code, syscall, cause } = error as ErrorFields
  const path = pathOf(error)
  const system = typeof code === 'string' ? strerror(code) : undefined
  if (system !== undefined) {
    if (syscall === 'connect' && path !== undefined) return `Failed to connect to '${serverOf(path)}': ${system}`
    const readOnly = error.message.includes(READ_ONLY_DEVICE)
    const why = readOnly ? `The device is not writable: ${system}` : system
    if (target !== undefined && path === target) return `Could not create '${path}': ${why}`
    return failedOpening(error) && !readOnly ? `Could not open '${path}': ${why}` : why
  }
  if (!(error instanceof Qcow2Error)) return error.message
  const mismatch = mismatchOf(error)
  if (mismatch !== undefined) return `${mismatch} (${code})`
  // A file of the chain that is not there: qemu-img says so in this form, which programs look for.
  if (code === 'ERR_QCOW2_CHAIN' && cause instanceof Qcow2Error) {
    return `Could not open backing file: ${describeError(cause)}`
  }
  const locked = LOCKED.exec(error.message)
  if (code === 'ERR_QCOW2_LOCKED' && locked) return `F${locked[1]} (${error.code})`
  return `${withoutOffer(withoutCall(withoutPath(error.message, error.path)), error.field)} (${error.code})`
}

/** The file of an error, with every byte of its name. */
export function pathOf(error: unknown): string | undefined {
  const { path, pathBytes } = error as ErrorFields
  if (pathBytes instanceof Uint8Array) return decodeText(pathBytes)
  return typeof path === 'string' ? path : undefined
}

/** QEMU's words for a file that is not of the format that it was said to be. */
const MISMATCH: Readonly<Partial<Record<string, string>>> = {
  qcow2: 'Image is not in qcow2 format',
  qcow: 'Image not in qcow format',
}

/** Those words, where an error is that. */
function mismatchOf(error: unknown): string | undefined {
  if (!(error instanceof Qcow2Error)) return undefined
  if (error.code !== 'ERR_QCOW2_INVALID_HEADER' || error.field !== 'magic') return undefined
  const format = /(?:^|: )not a (\w+) image: /.exec(error.message)?.[1]
  return MISMATCH[format ?? DEFAULT_FORMAT] ?? MISMATCH[DEFAULT_FORMAT]
}

/** The library's messages begin with the call that is told; nobody called that here. */
const withoutCall = (message: string): string => message.replace(/^(?:[a-z]+|[A-Z][a-z]+\.\w+): (?=\S)/, '')

/** Without what a program does about it: {@link openHint} has the option. */
const withoutOffer = (message: string, field: string | undefined): string =>
  field === 'member' ? message.replace(/: say which by [^:]*$/, '') : message

/** In two parts, as qemu-img says it: what failed, and what to look for. */
const LOCKED = /(?:^|: )[Ff](ailed to get .* lock)/

const withoutPath = (message: string, path: unknown): string =>
  typeof path === 'string' && message.startsWith(`${path}: `) ? message.slice(path.length + 2) : message

/** Whether the system did not open a file. */
export function failedOpening(error: unknown): boolean {
  if (!(error instanceof Error)) return false
  const { code, syscall } = error as ErrorFields
  const system = typeof code === 'string' && strerror(code) !== undefined && pathOf(error) !== undefined
  return system && (syscall === undefined || OPENING.has(String(syscall)))
}

const READING: ReadonlySet<string> = new Set(['pread', 'preadv', 'read', 'lseek', 'fstat'])

/** Whether a call of the system failed that changes a file: the image was open by then. */
export function failedChanging(error: unknown): boolean {
  const { code, syscall } = error as ErrorFields
  const system = error instanceof Error && typeof code === 'string' && strerror(code) !== undefined
  return system && syscall !== undefined && !OPENING.has(String(syscall)) && !READING.has(String(syscall))
}

/** An image that cannot be opened, in qemu-img's words. */
export function openFailure(filename: string, error: unknown, exitCode = 1, formatOption = '-f'): CommandFailure {
  if (error instanceof CommandFailure) {
    const { message, hint } = error
    return new CommandFailure(message, { exitCode, cause: error, ...(hint !== undefined && { hint }) })
  }
  const message =
    error instanceof Qcow2Error && error.code === 'ERR_QCOW2_NO_SNAPSHOT'
      ? "Failed to load snapshot: Can't find snapshot"
      : `Could not open '${filename}': ${describeError(error)}`
  const hint = openHint(filename, error, formatOption)
  return new CommandFailure(message, { exitCode, cause: error, ...(hint !== undefined && { hint }) })
}

/** The way out, where one is known. */
export function openHint(filename: string, error: unknown, formatOption = '-f'): string | undefined {
  if (!(error instanceof Qcow2Error)) return undefined
  const path = pathOf(error) ?? filename
  if (error.field === 'member') return 'Which disk of an appliance is meant says --member NAME.'
  // A parent that has no name.
  if (error.code === 'ERR_QCOW2_REFERENCE_DENIED' && error.message.includes("'uuid:")) {
    return 'Which file that is says --parent FILE, or backing.file.filename= with --image-opts.'
  }
  if (error.code === 'ERR_QCOW2_LOCKED') {
    const own = error.message.includes('this process')
    return own ? `This command uses the image [${path}] twice.` : `Is another process using the image [${path}]?`
  }
  if (mismatchOf(error) === undefined) return undefined
  return `A file with the plain bytes of a disk is given with ${formatOption} ${PLAIN_FORMAT}.`
}
