/** `info` for people. Works on the QAPI document that `--output=json` prints, so that the two never disagree. */

import { encodeText } from '../../text.js'
import { fields, isList, type Json } from './json.js'
import { humanSize } from './number.js'

export interface SnapshotDocument {
  readonly [key: string]: Json | undefined
  readonly id: string
  readonly name: string
  readonly 'vm-state-size': number | bigint
  readonly 'date-sec': number
  readonly 'date-nsec': number
  readonly 'vm-clock-sec': number
  readonly 'vm-clock-nsec': number
  readonly icount?: number
}

/** QAPI `BlockGraphInfo`: one node and, below it, the file that holds it. */
export interface InfoDocument {
  readonly [key: string]: Json | undefined
  readonly filename: string
  readonly format: string
  /** Absent where only reading all of the file tells. */
  readonly 'virtual-size'?: number | bigint
  readonly 'actual-size'?: number | bigint
  readonly 'cluster-size'?: number
  readonly encrypted?: boolean
  readonly 'dirty-flag'?: boolean
  readonly 'backing-filename'?: string
  readonly 'full-backing-filename'?: string
  readonly 'backing-filename-format'?: string
  readonly snapshots?: readonly SnapshotDocument[]
  /** What an appliance has, where the image is one, or lies in one. */
  readonly appliance?: { readonly [key: string]: Json | undefined }
  readonly limits?: { readonly [key: string]: Json | undefined }
  readonly 'format-specific'?: { readonly type: string; readonly data: { readonly [key: string]: Json | undefined } }
  readonly children: readonly { readonly name: string; readonly info: InfoDocument }[]
}

/** One image; several images of a chain are separated by an empty line. */
export const formatInfo = (images: readonly InfoDocument[]): string =>
  images.map(image => formatNode(image, 0, '/')).join('\n')

function formatNode(node: InfoDocument, depth: number, path: string): string {
  const indent = '    '.repeat(depth)
  // Below the image, a node without children is the file that stores it: no disk of its own.
  const protocol = depth > 0 && node.children.length === 0
  const lines = [...sizeLines(node, protocol), ...detailLines(node)].map(line => `${indent}${line}\n`)
  const limits = fields(node.limits ?? {})
  if (limits.length > 0) lines.push(`${indent}Block limits:\n`, ...dumpFields(limits, depth + 1))
  const specific = node['format-specific']?.data ?? {}
  lines.push(...specificLines(specific, depth))
  if (node.appliance) lines.push(`${indent}Appliance:\n`, ...dumpFields(fields(node.appliance), depth + 1))
  for (const child of node.children) {
    lines.push(`${indent}Child node '${path}${child.name}':\n`)
    lines.push(formatNode(child.info, depth + 1, `${path}${child.name}/`))
  }
  return lines.join('')
}

/** What only images of this format have. */
export function specificLines(data: { readonly [key: string]: Json | undefined }, depth = 0): string[] {
  const found = fields(data)
  return found.length === 0
    ? []
    : [`${'    '.repeat(depth)}Format specific information:\n`, ...dumpFields(found, depth + 1)]
}

function sizeLines(node: InfoDocument, protocol: boolean): string[] {
  const size = node['virtual-size']
  const actual = node['actual-size']
  // Of an appliance with several disks, each has one.
  const unknown = node.appliance === undefined ? ['virtual size: unknown'] : []
  return [
    `${protocol ? 'filename' : 'image'}: ${node.filename}`,
    `${protocol ? 'protocol type' : 'file format'}: ${node.format}`,
    ...(size === undefined
      ? unknown
      : [`${protocol ? 'file length' : 'virtual size'}: ${humanSize(size)} (${size} bytes)`]),
    `disk size: ${actual === undefined ? 'unavailable' : humanSize(actual)}`,
  ]
}

function detailLines(node: InfoDocument): string[] {
  const lines: string[] = []
  if (node.encrypted) lines.push('encrypted: yes')
  if (node['cluster-size'] !== undefined) lines.push(`cluster_size: ${node['cluster-size']}`)
  if (node['dirty-flag']) lines.push('cleanly shut down: no')
  if (node['backing-filename'] !== undefined) {
    lines.push(`backing file: ${node['backing-filename']}${actualPath(node)}`)
    if (node['backing-filename-format']) lines.push(`backing file format: ${node['backing-filename-format']}`)
  }
  if (node.snapshots) lines.push(...snapshotLines(node.snapshots))
  return lines
}

const snapshotLines = (snapshots: readonly SnapshotDocument[]): string[] => [
  'Snapshot list:',
  SNAPSHOT_HEADER,
  ...snapshots.map(snapshotRow),
]

/** A list of snapshots on its own. */
export const formatSnapshots = (snapshots: readonly SnapshotDocument[]): string =>
  snapshotLines(snapshots)
    .map(line => `${line}\n`)
    .join('')

function actualPath(node: InfoDocument): string {
  const full = node['full-backing-filename']
  if (full === undefined) return ' (cannot determine actual path)'
  return full === node['backing-filename'] ? '' : ` (actual path: ${full})`
}

const row = (id: string, tag: string, size: string, date: string, clock: string, icount: string): string =>
  `${padEnd(id, 7)} ${padEnd(tag, 16)} ${size.padStart(8)} ${date.padStart(19)} ${clock.padStart(15)} ${icount.padStart(10)}`

/** In bytes, as the C library pads. */
const padEnd = (text: string, width: number): string => text + ' '.repeat(Math.max(0, width - encodeText(text).length))

const SNAPSHOT_HEADER = row('ID', 'TAG', 'VM_SIZE', 'DATE', 'VM_CLOCK', 'ICOUNT')

const snapshotRow = (snapshot: SnapshotDocument): string =>
  row(
    snapshot.id,
    snapshot.name,
    humanSize(snapshot['vm-state-size']),
    localTime(snapshot['date-sec']),
    vmClock(snapshot['vm-clock-sec'], snapshot['vm-clock-nsec']),
    snapshot.icount === undefined ? '--' : String(snapshot.icount),
  )

const pad = (value: number, digits: number): string => String(value).padStart(digits, '0')

function localTime(seconds: number): string {
  const date = new Date(seconds * 1000)
  const day = [pad(date.getFullYear(), 4), pad(date.getMonth() + 1, 2), pad(date.getDate(), 2)].join('-')
  return `${day} ${[date.getHours(), date.getMinutes(), date.getSeconds()].map(part => pad(part, 2)).join(':')}`
}

const vmClock = (seconds: number, nanoseconds: number): string =>
  `${pad(Math.floor(seconds / 3600), 4)}:${pad(Math.floor(seconds / 60) % 60, 2)}:${pad(seconds % 60, 2)}` +
  `.${pad(Math.floor(nanoseconds / 1_000_000), 3)}`

/** QEMU's listing of any document: dashes of names become spaces, list items are numbered. */
function dumpFields(entries: readonly (readonly [string, Json])[], depth: number): string[] {
  return entries.flatMap(([name, value]) => dumpValue(`${name.replaceAll('-', ' ')}:`, value, depth))
}

function dumpValue(label: string, value: Json, depth: number): string[] {
  const head = `${'    '.repeat(depth)}${label}`
  if (typeof value !== 'object') return [`${head} ${value}\n`]
  const inner = isList(value)
    ? value.flatMap((item, index) => dumpValue(`[${index}]:`, item, depth + 1))
    : dumpFields(fields(value), depth + 1)
  return [`${head}\n`, ...inner]
}
