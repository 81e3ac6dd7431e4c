/** What can be opened as a disk image, and how it becomes an open file of the addon's. */

import type { FileHandle } from 'node:fs/promises'
import { fileURLToPath } from 'node:url'
import { invalidArgument, Qcow2Error } from './errors.js'
import type { FileBytes } from './formats/sizes.js'
import {
  type Format,
  quoted,
  SOURCE_FORMATS,
  STREAM_FORMATS,
  type StreamFormat,
  TARGET_FORMATS,
  type TargetFormat,
} from './formats/table.js'
import type { NativeFile, NativeFileOptions } from './native.js'
import { type NbdPlace, NbdSource, reach } from './nbd-source.js'
import { bytes, oneOf, type Reader } from './options.js'
import { isRandomAccess, type RandomAccessSource, type RandomPlace, toRandomPlace } from './random-access.js'
import { openRandom } from './random-answers.js'
import { fileStat } from './support/files.js'
import type { Held } from './support/jobs.js'
import { request } from './support/requests.js'
import { decodeText, toName, userText } from './text.js'
import { describe } from './units.js'

/** A file name as Node's `fs` takes it. A `URL` must have the scheme `file:`. */
export type PathLike = string | Buffer | URL

/**
 * What can be opened: a file name, or a `FileHandle` of Node's. A handle stays the caller's: the library reads through a
 * descriptor of its own and leaves the handle, its cursor and its closing alone. An export of an NBD server is what `nbdSource` makes; anything else
 * that can be read at any place is an object of the caller's ({@link RandomAccessSource}). A folder with a `DiskDescriptor.xml` is a Parallels bundle, `disk.hdd`, and opened by that.
 */
export type ImageSource =
  | PathLike
  | FileHandle
  | DetachedImage
  | ImageInFile
  | ImageInAppliance
  | NbdSource
  | RandomAccessSource

/** An image inside of another file, which is read in place: in an archive, say. What lies around it cannot be reached through it. */
export interface ImageInFile {
  /** The file that holds it. */
  readonly file: PathLike
  /** Bytes of the file in front of the image. */
  readonly offset: number
  /** Bytes of the image. */
  readonly length: number
}

/** A disk of an appliance (`.ova`, `.ovf`) that has several, by the name of its file or its id: `inspect` lists them. */
export interface ImageInAppliance {
  /** The appliance (`.ova`) or the OVF descriptor. */
  readonly file: PathLike
  /** Name of the disk in it. */
  readonly member: string
}

/**
 * A LUKS disk whose header lies in another file: `cryptsetup luksFormat --header`. The header's file is only read. An overlay stores the name
 * of `file` alone: a function for `references` gives both.
 */
export interface DetachedImage {
  /** The file with the data. */
  readonly file: PathLike
  /** The file with the header. */
  readonly header: PathLike
}

/** Reads a {@link Format}. */
export const format: Reader<Format> = oneOf(...SOURCE_FORMATS)

/** Reads what a convert has as its source. */
export const sourceFormat: Reader<Format | StreamFormat> = oneOf(...SOURCE_FORMATS, ...STREAM_FORMATS)

/** Reads a {@link TargetFormat}. */
export const targetFormat: Reader<TargetFormat> = oneOf(...TARGET_FORMATS)

/** What `convert` and its like make: a target has no default. */
export function toTargetFormat(owner: string, to: TargetFormat | undefined): TargetFormat {
  if (to === undefined) throw invalidArgument('to', `${owner}: the option to is needed: ${quoted(TARGET_FORMATS)}`)
  return to
}

/** A source that was checked: a path with all its bytes (see `text.ts`), a handle's descriptor, a stream, an export, or a caller's object. */
export type Located = FileLocated | ArrivingLocated | RemoteLocated

/** What is no file of the system. */
export type RemoteLocated = { readonly header?: undefined; readonly member?: undefined } & (
  | { readonly nbd: NbdPlace }
  | { readonly random: RandomPlace }
)

/** Whether a source is somewhere else. */
export const isRemote = (located: Located): located is RemoteLocated => 'nbd' in located || 'random' in located

/** Whether a source is a file of the system. */
export const isFile = (located: Located): located is FileLocated => !isRemote(located) && !('arriving' in located)

/** A target that is no file of the system; undefined for what is one. */
export function toRemote(target: unknown, name: string): RemoteLocated | undefined {
  const nbd = NbdSource.read(target)
  if (nbd !== undefined) return { nbd }
  return isRandomAccess(target) ? { random: toRandomPlace(target, name) } : undefined
}

/** A file of the system. */
export type FileLocated = ({ readonly path: string } | { readonly descriptor: number }) & {
  /** Where its header is, if that is another file. */
  readonly header?: { readonly path: string }
  /** The part of the file that is the image, if that is not all of it. */
  readonly part?: Part
  /** The disk of an appliance that is meant. */
  readonly member?: string
}

/** What comes as a stream. */
export interface ArrivingLocated {
  readonly arriving: Arriving
  readonly header?: undefined
  readonly part?: Part
  readonly member?: string | undefined
}

/** A stream that is read as a file, as far as it came. */
export interface Arriving {
  /** A new file of it, or of a part. */
  open(part?: Part): Promise<NativeFile>
  readonly bytes: FileBytes
}

/** A part of a file, in bytes. */
export interface Part {
  readonly offset: number
  readonly length: number
}

const NO_DESCRIPTOR = -1

/** Checks an image source. `name` is the argument's, for the message. */
export function toLocated(source: unknown, name: string): Located {
  const remote = toRemote(source, name)
  if (remote !== undefined) return remote
  if (typeof source === 'object' && source !== null && !(source instanceof URL) && !Buffer.isBuffer(source)) {
    if ('fd' in source && typeof source.fd === 'number') {
      if (source.fd !== NO_DESCRIPTOR) return { descriptor: source.fd }
      throw new Qcow2Error('EBADF', `EBADF: bad file descriptor: ${name} is a FileHandle that is closed`, {
        field: name,
        syscall: 'open',
      })
    }
    if ('file' in source && 'header' in source) {
      return {
        path: toPath(source.file, `${name}.file`),
        header: { path: toPath(source.header, `${name}.header`) },
      }
    }
    if ('file' in source && 'member' in source) {
      const { member } = source
      if (typeof member !== 'string') {
        throw invalidArgument('member', `${name}.member must be a string, not ${describe(member)}`)
      }
      return { path: toPath(source.file, `${name}.file`), member }
    }
    if ('file' in source && 'offset' in source && 'length' in source) {
      const part = {
        offset: bytes(source.offset, `${name}.offset`),
        length: bytes(source.length, `${name}.length`),
      }
      return { path: toPath(source.file, `${name}.file`), part }
    }
  }
  return {
    path: toPath(source, name, 'a string, Buffer, file: URL, FileHandle, RandomAccessSource or what nbdSource() made'),
  }
}

/** Checks the source of a call that takes several. */
export const toSources = (source: unknown): readonly Located[] =>
  Array.isArray(source)
    ? source.map((each: unknown, index) => toLocated(each, `source[${index}]`))
    : [toLocated(source, 'source')]

/** Checks a file name; it has all its bytes then. */
export function toPath(source: unknown, name: string, wanted = 'a string, Buffer or file: URL'): string {
  if (source instanceof URL) {
    try {
      return pathOfUrl(source)
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error)
      throw invalidArgument(name, `${name}: ${source.href} is not a file: URL of this machine: ${reason}`)
    }
  }
  if (typeof source !== 'string' && !Buffer.isBuffer(source)) {
    throw invalidArgument(name, `${name} must be ${wanted}, not ${describe(source)}`)
  }
  if (source.length === 0) throw invalidArgument(name, `${name} must not be empty`)
  if (source.includes('\0')) throw invalidArgument(name, `${name} must not contain a null character`)
  return typeof source === 'string' ? userText(source) : decodeText(source)
}

function pathOfUrl(url: URL): string {
  try {
    return fileURLToPath(url)
  } catch (error) {
    // What stands for bytes that are not UTF-8; all else about it was right.
    if (!(error instanceof URIError) || process.platform === 'win32') throw error
    const byte = (_: string, digits: string): string => String.fromCharCode(Number.parseInt(digits, 16))
    return toPath(Buffer.from(url.pathname.replace(/%([0-9a-f]{2})/gi, byte), 'latin1'), 'url')
  }
}

/** Connections, by the numbers of what uses them: files, then the image that is made of these. */
const connections = new Map<number, readonly Held<NativeFile>[]>()

/** Opens the file; for reading, unless the options say more. The signal ends a connection until it is released or detached. */
export async function openFile(
  located: Located,
  options: NativeFileOptions = {},
  signal?: AbortSignal,
): Promise<NativeFile> {
  if ('nbd' in located) {
    const { nbd } = located
    const held = await reach<NativeFile>(nbd, signal, (number, job, addon, connect) =>
      addon.openNbd(number, job, nbd.uri, { ...connect, writable: options.writable }),
    )
    connections.set(held.value.file, [held])
    return held.value
  }
  if ('random' in located) {
    const held = await openRandom(located.random, options.writable === true, signal)
    connections.set(held.value.file, [held])
    return held.value
  }
  if ('arriving' in located) return await located.arriving.open(located.part)
  try {
    return await openLocal(located, options)
  } catch (error) {
    const isFolder = error instanceof Qcow2Error && error.code === 'EISDIR' && 'path' in located
    const path = isFolder ? `${located.path}/${BUNDLE_DESCRIPTOR}` : ''
    if (!isFolder || (await fileStat(toName(path)).catch(() => undefined)) === undefined) throw error
    return openLocal({ ...located, path }, options)
  }
}

/** The file that a folder is opened as, where it has one: of a Parallels disk, `disk.hdd`. */
const BUNDLE_DESCRIPTOR = 'DiskDescriptor.xml'

function openLocal(located: FileLocated, options: NativeFileOptions): Promise<NativeFile> {
  const given = { ...options, ...located.part }
  return request<NativeFile>((number, addon) => {
    if ('path' in located) addon.openFile(number, located.path, given)
    else if (addon.openDescriptor !== undefined) addon.openDescriptor(number, located.descriptor, given)
    else
      throw new Qcow2Error(
        'ERR_QCOW2_UNSUPPORTED_FEATURE',
        'a FileHandle cannot be opened on this system: give its path',
      )
  })
}

/** The connections of files belong to the image that was made of them. */
export function handOver(files: readonly number[], image: number): void {
  const held = files.flatMap(file => connections.get(file) ?? [])
  for (const file of files) connections.delete(file)
  if (held.length > 0) connections.set(image, [...(connections.get(image) ?? []), ...held])
}

/** The signal under which an image was opened ends its connections no more. */
export function detach(image: number): void {
  for (const held of connections.get(image) ?? []) held.detach()
}

/** What stands on these files is being closed. */
export function closing(image: number): void {
  for (const held of connections.get(image) ?? []) held.closing?.()
}

/** Gives a file, layer or image of the addon's up; an image is flushed first. It is gone also if that fails. */
export async function release(number: number): Promise<void> {
  closing(number)
  const held = connections.get(number) ?? []
  try {
    await request<void>((id, addon) => addon.release(id, number))
  } finally {
    connections.delete(number)
    for (const connection of held) connection.end()
  }
  await Promise.all(held.map(connection => connection.ended))
}
