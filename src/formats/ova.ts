/**
 * Appliances: an `.ova` is a tar archive whose first member is an OVF descriptor, and whose other members are disk images, stored as they
 * are. Only headers are read. Sources: POSIX.1-1988 "ustar" and -2001 "pax" interchange formats, the OVF specification (DSP0243), section 6.4.
 */

import type { FileBytes } from './sizes.js'

/** One file in an archive. */
export interface Member {
  /** As the archive has it. */
  readonly name: string
  /** Bytes of the archive in front of its contents. */
  readonly offset: number
  /** Bytes of its contents. */
  readonly length: number
}

const BLOCK = 512
/** Appliances have a handful. */
const MAX_MEMBERS = 1000
/** Bytes of a long name, or of attributes, that are looked at. */
const MAX_EXTENSION = 64 << 10

/** An archive has more of something than is read. */
export class ArchiveLimit extends RangeError {}

/** Whether the first bytes are those of an appliance: a tar archive that begins with an OVF descriptor. */
export function isOva(head: Buffer): boolean {
  const header = head.length >= BLOCK ? readHeader(head.subarray(0, BLOCK)) : undefined
  if (header === undefined) return false
  // The descriptor's name can be in an extension, in front of it.
  return /\.ovf$/i.test(header.name) || (isExtension(header.type) && /\.ovf\b/i.test(head.toString('latin1', BLOCK)))
}

/** Whether the first bytes are those of an OVF descriptor: XML whose element is an Envelope. */
export function isOvf(head: Buffer): boolean {
  const text = head.toString('latin1').replace('\xef\xbb\xbf', '')
  return /^\s*</.test(text) && /<(?:[\w.-]+:)?Envelope[\s/>]/.test(text)
}

/** Whether the first bytes are those of any tar archive. */
export const isTar = (head: Buffer): boolean =>
  head.length >= BLOCK && readHeader(head.subarray(0, BLOCK)) !== undefined

/**
 * The files in an archive, in its order.
 *
 * @throws RangeError for one that is cut short or damaged, {@link ArchiveLimit} for too many members
 */
export async function members(file: FileBytes): Promise<readonly Member[]> {
  const found: Member[] = []
  for await (const member of eachMember(file)) found.push(member)
  return found
}

/** The same one by one: each when its header was read, whatever follows. */
export async function* eachMember(file: FileBytes): AsyncGenerator<Member> {
  let position = 0
  let count = 0
  let own: Attributes = {}
  for (;;) {
    const block = await file.at(position, BLOCK)
    // Two blocks of zeroes end it; some writers leave them out.
    if (block.length === 0 || block.every(byte => byte === 0)) return
    const header = block.length === BLOCK ? readHeader(block) : undefined
    if (header === undefined) throw new RangeError(`the archive has no header at ${position}`)
    const offset = position + BLOCK
    const length = own.length ?? header.length
    const end = offset + length
    if (!Number.isSafeInteger(end) || (file.length !== undefined && end > file.length)) {
      throw new RangeError(`the member '${own.name ?? header.name}' at ${position} goes on behind the archive's end`)
    }
    if (isExtension(header.type)) {
      if (length > MAX_EXTENSION)
        throw new ArchiveLimit(`the attributes at ${position} have ${length} bytes, more than ${MAX_EXTENSION}`)
      own = { ...own, ...attributesOf(header.type, await file.at(offset, length)) }
    } else {
      if (isFile(header.type)) {
        count += 1
        if (count > MAX_MEMBERS) throw new ArchiveLimit(`the archive has more than ${MAX_MEMBERS} members`)
        yield { name: own.name ?? header.name, offset, length }
      }
      own = {}
    }
    position = Math.ceil(end / BLOCK) * BLOCK
  }
}

/** What an extension says of the member behind it. */
interface Attributes {
  readonly name?: string
  readonly length?: number
}

interface Header {
  readonly name: string
  readonly length: number
  readonly type: string
}

/** A name that is too long for the header (GNU), or attributes (pax). */
const isExtension = (type: string): boolean => type === 'L' || type === 'x'

const isFile = (type: string): boolean => type === '0' || type === '\0'

function readHeader(block: Buffer): Header | undefined {
  if (block.toString('latin1', 257, 262) !== 'ustar') return undefined
  // The sum of all bytes, where its own field counts as spaces.
  let sum = 8 * 0x20
  for (const [index, byte] of block.entries()) if (index < 148 || index >= 156) sum += byte
  if (numberOf(block.subarray(148, 156)) !== sum) return undefined
  const length = numberOf(block.subarray(124, 136))
  if (length === undefined) return undefined
  // GNU's archives have other fields where POSIX has the folder.
  const isPosix = block[262] === 0
  const [folder, name] = [isPosix ? textOf(block.subarray(345, 500)) : '', textOf(block.subarray(0, 100))]
  return { name: folder === '' ? name : `${folder}/${name}`, length, type: String.fromCharCode(block[156] ?? 0) }
}

/** Octal digits; or, where the first bit is set, a binary number. */
function numberOf(field: Buffer): number | undefined {
  const [first = 0] = field
  if (first === 0x80) {
    const number = Number(BigInt(`0x${field.subarray(1).toString('hex')}`))
    return Number.isSafeInteger(number) ? number : undefined
  }
  const digits = textOf(field).trim()
  return /^[0-7]+$/.test(digits) ? Number.parseInt(digits, 8) : undefined
}

const textOf = (field: Buffer): string => {
  const end = field.indexOf(0)
  return field.toString('utf8', 0, end < 0 ? field.length : end)
}

function attributesOf(type: string, bytes: Buffer): Attributes {
  if (type === 'L') return { name: textOf(bytes) }
  const records = new Map<string, string>()
  // Each is `LENGTH NAME=VALUE` and a line feed; the length counts all of it.
  for (let rest = bytes; rest.length > 0; ) {
    const [, digits = '', name = ''] = /^(\d{1,6}) ([^=]+)=/.exec(rest.toString('latin1', 0, 256)) ?? []
    const length = Number(digits)
    if (length <= digits.length || length > rest.length) break
    records.set(name, rest.toString('utf8', digits.length + 1 + name.length + 1, length - 1))
    rest = rest.subarray(length)
  }
  const [path, size] = [records.get('path'), Number(records.get('size') ?? Number.NaN)]
  return { ...(path !== undefined && { name: path }), ...(Number.isSafeInteger(size) && size >= 0 && { length: size }) }
}
