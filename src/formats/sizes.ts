/** How large the disk in a file is that is recognised and not opened: what the file itself says, in bytes. */

/** The bytes of a file, or as many of them as there are. */
export interface FileBytes {
  /** Undefined where only its first bytes are known. */
  readonly length: number | undefined
  /** The bytes from `position` on: fewer where the file ends before. */
  at(position: number, length: number): Promise<Buffer>
}

/** The disk's size in bytes; undefined where the file does not say. Throws a `RangeError` where it is cut short. */
export type SizeReader = (file: FileBytes) => Promise<number | undefined>

const SECTOR = 512

/** The bytes of a magic number. */
export const ascii = (text: string): Buffer => Buffer.from(text, 'latin1')

/** Whether a file has these bytes at an offset. */
export const startsWith = (head: Buffer, bytes: Buffer, offset = 0): boolean =>
  head.subarray(offset, offset + bytes.length).equals(bytes)

const u64le = (bytes: Buffer, offset: number): number => Number(bytes.readBigUInt64LE(offset))
const u64be = (bytes: Buffer, offset: number): number => Number(bytes.readBigUInt64BE(offset))

/** A structure of 512 bytes that is at the end of the file, or a copy of it at its start. */
async function trailer(file: FileBytes, magic: string): Promise<Buffer> {
  const head = await file.at(0, 512)
  if (startsWith(head, ascii(magic)) || file.length === undefined) return head
  return file.at(Math.max(0, file.length - 512), 512)
}

/** Version 2 has a reserved field in front of the size. */
export const bochsSize: SizeReader = async file => {
  const head = await file.at(0, 96)
  return u64le(head, head.readUInt32LE(64) === 0x20000 ? 88 : 84)
}

export const cloopSize: SizeReader = async file => {
  const head = await file.at(128, 8)
  return head.readUInt32BE(0) * head.readUInt32BE(4)
}

export const dmgSize: SizeReader = async file => u64be(await trailer(file, 'koly'), 492) * SECTOR

export const qedSize: SizeReader = async file => u64le(await file.at(0, 56), 48)

/** Programs whose disks have the size of their geometry, unless that is the largest one. */
const SIZED_BY_GEOMETRY: ReadonlySet<string> = new Set(['vpc ', 'qemu'])
const LARGEST_GEOMETRY = 65535 * 16 * 255

export const vpcSize: SizeReader = async file => {
  const footer = await trailer(file, 'conectix')
  const sectors = footer.readUInt16BE(56) * footer.readUInt8(58) * footer.readUInt8(59)
  const exact = !SIZED_BY_GEOMETRY.has(footer.toString('latin1', 28, 32)) || sectors === LARGEST_GEOMETRY
  return exact ? u64be(footer, 48) : sectors * SECTOR
}
