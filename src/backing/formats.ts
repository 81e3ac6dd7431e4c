/** Formats by their magic numbers: qcow2 in order to open it, the others in order to refuse to take them for raw. */

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

interface Magic {
  readonly format: KnownFormat
  readonly bytes: Buffer
  readonly offset?: number
}

const ascii = (text: string): Buffer => Buffer.from(text, 'latin1')

const MAGICS: readonly Magic[] = [
  { format: 'bochs', bytes: ascii('Bochs Virtual HD Image') },
  { format: 'cloop', bytes: ascii('#!/bin/sh\n#V2.0 Format\nmodprobe cloop') },
  { format: 'dmg', bytes: ascii('koly') },
  { format: 'luks', bytes: ascii('LUKS\xba\xbe') },
  { format: 'parallels', bytes: ascii('WithoutFreeSpace') },
  { format: 'parallels', bytes: ascii('WithouFreSpacExt') },
  { format: 'qed', bytes: ascii('QED\0') },
  { format: 'vdi', bytes: Buffer.from([0x7f, 0x10, 0xda, 0xbe]), offset: 0x40 },
  { format: 'vhdx', bytes: ascii('vhdxfile') },
  { format: 'vmdk', bytes: ascii('KDMV') },
  { format: 'vmdk', bytes: ascii('COWD') },
  { format: 'vpc', bytes: ascii('conectix') },
]

const QCOW_MAGIC = ascii('QFI\xfb')

const startsWith = (head: Buffer, bytes: Buffer, offset = 0): boolean =>
  head.subarray(offset, offset + bytes.length).equals(bytes)

/**
 * The format that the first bytes of a file (1024 are enough) have the magic number of. Undefined for everything else: that
 * is not the same as raw.
 */
export function detectFormat(head: Buffer): 'qcow2' | KnownFormat | undefined {
  // Versions 2 and 3 are qcow2; version 1 is another format of the same magic. An unknown version is qcow2's to refuse.
  if (startsWith(head, QCOW_MAGIC)) return head.length >= 8 && head.readUInt32BE(4) === 1 ? 'qcow' : 'qcow2'
  const found = MAGICS.find(({ bytes, offset }) => startsWith(head, bytes, offset))
  if (found !== undefined) return found.format
  return isVmdkDescriptor(head) ? 'vmdk' : undefined
}

/** A VMDK descriptor is a text file: comments and blank lines, then `version=` 1 to 3. */
function isVmdkDescriptor(head: Buffer): boolean {
  const text = head.toString('latin1')
  return /^#\s*Disk DescriptorFile/i.test(text) || /^(?:#[^\n]*\n| *\r?\n)*version=[123]\r?\n/.test(text)
}
