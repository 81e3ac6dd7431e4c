/**
 * The formats that are known by their bytes: qcow2 in order to open it, the others in order to refuse to take them for raw, and to say
 * what they are. One table: names are QEMU's.
 */

/** Formats that are recognised in order to refuse them. */
export type KnownFormat =
  | 'bochs'
  | 'cloop'
  | 'dmg'
  | 'luks'
  | 'parallels'
  | 'qcow'
  | 'qed'
  | 'vdi'
  | 'vhdx'
  | 'vmdk'
  | 'vpc'

/** The bytes of a file, or as many of them as there are. */
export interface FileBytes {
  /** Undefined where only its first bytes are known. */
  readonly length: number | undefined
  /** The bytes from `position` on: fewer where the file ends before. */
  at(position: number, length: number): Promise<Buffer>
}

interface Magic {
  readonly bytes: Buffer
  readonly offset?: number
}

interface FormatRow {
  readonly format: KnownFormat
  readonly magics: readonly Magic[]
  /** What else it is known by. */
  readonly matches?: (head: Buffer) => boolean
  /** A structure at the end of the file that makes it one, too: its magic and its length. QEMU does not look for it. */
  readonly footer?: { readonly bytes: Buffer; readonly length: number }
  /** The disk's size in bytes as the file says it; throws where it is cut short. */
  readonly virtualSize: (file: FileBytes) => Promise<number | undefined>
}

const SECTOR = 512
const ascii = (text: string): Buffer => Buffer.from(text, 'latin1')

const FORMATS: readonly FormatRow[] = [
  {
    format: 'bochs',
    magics: [{ bytes: ascii('Bochs Virtual HD Image') }],
    // Version 2 has a reserved field in front of the size.
    virtualSize: async file => {
      const head = await file.at(0, 96)
      return u64le(head, head.readUInt32LE(64) === 0x20000 ? 88 : 84)
    },
  },
  {
    format: 'cloop',
    magics: [{ bytes: ascii('#!/bin/sh\n#V2.0 Format\nmodprobe cloop') }],
    virtualSize: async file => {
      const head = await file.at(128, 8)
      return head.readUInt32BE(0) * head.readUInt32BE(4)
    },
  },
  {
    format: 'dmg',
    magics: [{ bytes: ascii('koly') }],
    footer: { bytes: ascii('koly'), length: 512 },
    virtualSize: async file => u64be(await trailer(file, 'koly'), 492) * SECTOR,
  },
  {
    format: 'luks',
    magics: [{ bytes: ascii('LUKS\xba\xbe') }],
    // Version 1 has no size: it is the rest of the file. Version 2 keeps it in a document.
    virtualSize: async file => {
      const head = await file.at(0, 108)
      if (file.length === undefined || head.readUInt16BE(6) !== 1) return undefined
      return Math.max(0, file.length - head.readUInt32BE(104) * SECTOR)
    },
  },
  {
    format: 'parallels',
    magics: [{ bytes: ascii('WithoutFreeSpace') }, { bytes: ascii('WithouFreSpacExt') }],
    // The older kind has a size of 32 bits.
    virtualSize: async file => {
      const head = await file.at(0, 64)
      const old = startsWith(head, ascii('WithoutFreeSpace'))
      return (old ? head.readUInt32LE(36) : u64le(head, 36)) * SECTOR
    },
  },
  {
    format: 'qcow',
    // Versions 2 and 3 are qcow2; version 1 is another format of the same magic. An unknown version is qcow2's to refuse.
    magics: [{ bytes: ascii('QFI\xfb\0\0\0\x01') }],
    virtualSize: async file => u64be(await file.at(0, 32), 24),
  },
  {
    format: 'qed',
    magics: [{ bytes: ascii('QED\0') }],
    virtualSize: async file => u64le(await file.at(0, 56), 48),
  },
  {
    format: 'vdi',
    magics: [{ bytes: Buffer.from([0x7f, 0x10, 0xda, 0xbe]), offset: 0x40 }],
    virtualSize: async file => u64le(await file.at(0, 376), 368),
  },
  { format: 'vhdx', magics: [{ bytes: ascii('vhdxfile') }], virtualSize: vhdxSize },
  {
    format: 'vmdk',
    magics: [{ bytes: ascii('KDMV') }, { bytes: ascii('COWD') }],
    matches: isVmdkDescriptor,
    virtualSize: vmdkSize,
  },
  {
    format: 'vpc',
    magics: [{ bytes: ascii('conectix') }],
    footer: { bytes: ascii('conectix'), length: 512 },
    virtualSize: vpcSize,
  },
]

const QCOW_MAGIC = ascii('QFI\xfb')

const startsWith = (head: Buffer, bytes: Buffer, offset = 0): boolean =>
  head.subarray(offset, offset + bytes.length).equals(bytes)

/**
 * The format that the first bytes of a file (1024 are enough) have the magic number of. Undefined for everything else: that
 * is not the same as raw.
 */
export function detectFormat(head: Buffer): 'qcow2' | KnownFormat | undefined {
  const found = FORMATS.find(
    ({ magics, matches }) =>
      magics.some(({ bytes, offset }) => startsWith(head, bytes, offset)) || matches?.(head) === true,
  )
  return found?.format ?? (startsWith(head, QCOW_MAGIC) ? 'qcow2' : undefined)
}

/** What a file of another format says about itself. */
export interface KnownImage {
  readonly format: KnownFormat
  /** Bytes of the disk; undefined where the file does not say. */
  readonly virtualSize: number | undefined
}

/** What a file of another format than qcow2 is, by its first bytes or by its last ones; undefined for everything else. */
export async function describeKnown(file: FileBytes): Promise<KnownImage | undefined> {
  const detected = detectFormat(await file.at(0, 1024))
  if (detected === 'qcow2') return undefined
  const row = FORMATS.find(({ format }) => format === detected) ?? (await byFooter(file))
  if (row === undefined) return undefined
  // A file that is cut short has a format, and no size.
  const size = await row.virtualSize(file).catch((error: unknown) => {
    if (error instanceof RangeError) return undefined
    throw error
  })
  return { format: row.format, virtualSize: Number.isSafeInteger(size) ? size : undefined }
}

async function byFooter(file: FileBytes): Promise<FormatRow | undefined> {
  for (const row of FORMATS) {
    if (row.footer === undefined || file.length === undefined) continue
    const start = file.length - row.footer.length
    if (start > 0 && startsWith(await file.at(start, row.footer.length), row.footer.bytes)) return row
  }
  return undefined
}

/** A structure of 512 bytes that is at the end of the file, or a copy of it at its start. */
async function trailer(file: FileBytes, magic: string): Promise<Buffer> {
  const head = await file.at(0, 512)
  if (startsWith(head, ascii(magic)) || file.length === undefined) return head
  return file.at(Math.max(0, file.length - 512), 512)
}

const u64le = (bytes: Buffer, offset: number): number => Number(bytes.readBigUInt64LE(offset))
const u64be = (bytes: Buffer, offset: number): number => Number(bytes.readBigUInt64BE(offset))

/** A VMDK descriptor is a text file: comments and blank lines, then `version=` 1 to 3. */
function isVmdkDescriptor(head: Buffer): boolean {
  const text = head.toString('latin1')
  return /^#\s*Disk DescriptorFile/i.test(text) || /^(?:#[^\n]*\n| *\r?\n)*version=[123]\r?\n/.test(text)
}

/** The longest descriptor that is looked at. */
const DESCRIPTOR = 1 << 20

async function vmdkSize(file: FileBytes): Promise<number> {
  const head = await file.at(0, 20)
  if (startsWith(head, ascii('KDMV'))) return u64le(head, 12) * SECTOR
  if (startsWith(head, ascii('COWD'))) return head.readUInt32LE(12) * SECTOR
  const text = (await file.at(0, DESCRIPTOR)).toString('latin1')
  // One line for each extent: how it is accessed, its sectors, its kind, its file.
  const extents = text.matchAll(/^(?:RW|RDONLY|NOACCESS)[ \t]+(\d+)[ \t]+[A-Z]/gm)
  return [...extents].reduce((sum, [, sectors]) => sum + Number(sectors) * SECTOR, 0)
}

/** Programs whose disks have the size that the footer says, not the one of its geometry. */
const SIZED_CREATORS: ReadonlySet<string> = new Set(['win ', 'qem2', 'd2v ', 'tap\0', 'wa\0\0', 'CTXS'])
const LARGEST_GEOMETRY = 65535 * 16 * 255

async function vpcSize(file: FileBytes): Promise<number> {
  const footer = await trailer(file, 'conectix')
  const sectors = footer.readUInt16BE(56) * footer.readUInt8(58) * footer.readUInt8(59)
  const exact = SIZED_CREATORS.has(footer.toString('latin1', 28, 32)) || sectors >= LARGEST_GEOMETRY
  return exact ? u64be(footer, 48) : sectors * SECTOR
}

/** GUIDs as they lie in the file. */
const VHDX_METADATA = Buffer.from('06a27c8b90479a4bb8fe575f050f886e', 'hex')
const VHDX_DISK_SIZE = Buffer.from('2442a52f1bcd7648b2115dbed83bf4b8', 'hex')
const VHDX_REGIONS = 192 << 10
const VHDX_TABLE = 64 << 10

async function vhdxSize(file: FileBytes): Promise<number | undefined> {
  const region = findEntry(await file.at(VHDX_REGIONS, VHDX_TABLE), 16, 8, VHDX_METADATA)
  if (region === undefined) return undefined
  const start = u64le(region, 16)
  if (!Number.isSafeInteger(start)) return undefined
  const item = findEntry(await file.at(start, VHDX_TABLE), 32, 10, VHDX_DISK_SIZE)
  return item && u64le(await file.at(start + item.readUInt32LE(16), 8), 0)
}

/** The entry of 32 bytes with this GUID in a table whose entries begin at `first`; their number is at `count`. */
function findEntry(table: Buffer, first: number, count: number, guid: Buffer): Buffer | undefined {
  const most = Math.min(table.readUInt16LE(count), Math.floor((table.length - first) / 32))
  const entries = Array.from({ length: most }, (_, index) =>
    table.subarray(first + index * 32, first + index * 32 + 32),
  )
  return entries.find(entry => startsWith(entry, guid))
}
