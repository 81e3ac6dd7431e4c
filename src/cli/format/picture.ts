/** `map --picture`: the allocation of a disk, drawn in a terminal. */

import { type Allocation, type DiskCaption, gridFor, type Kind, LABELS, STORED } from './allocation.js'
import { bold, type Color, type ColorDepth, dim, mix, paint } from './color.js'
import { fixed, humanSize } from './number.js'

const COLORS: Readonly<Record<Kind, Color>> = {
  data: { rgb: [45, 212, 191], ansi: 10 },
  compressed: { rgb: [251, 191, 36], ansi: 11 },
  backing1: { rgb: [96, 165, 250], ansi: 12 },
  backing2: { rgb: [167, 139, 250], ansi: 13 },
  backing3: { rgb: [244, 114, 182], ansi: 9 },
  zero: { rgb: [71, 85, 105], ansi: 8 },
  unallocated: { rgb: [30, 41, 59], ansi: 0 },
}

/** Without colours, one sign for the kind that fills most of a cell. */
const SIGNS: Readonly<Record<Kind, string>> = {
  data: '█',
  compressed: '▓',
  backing1: '▒',
  backing2: '◆',
  backing3: '◇',
  zero: '░',
  unallocated: '·',
}

const EIGHTHS = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'] as const

const LABEL_WIDTH = 9
const MAX_ROWS = 16

/** As many cells as fit, in steps that keep the rows' offsets round. */
function columnsFor(width: number): number {
  const room = width - LABEL_WIDTH - 3
  return [192, 128, 96, 64, 48, 32, 24, 16].find(columns => columns <= room) ?? 8
}

/** The grid that a terminal of this width gives room for. */
export const terminalGrid = (start: number, length: number, width: number) =>
  gridFor(start, length, columnsFor(width), MAX_ROWS)

export function drawPicture(allocation: Allocation, caption: DiskCaption, depth: ColorDepth): string {
  const { grid } = allocation
  const lines = ['', ` ${heading(caption, depth)}`, '']
  const edge = '─'.repeat(Math.min(grid.columns, Math.max(grid.cells, 1)))
  lines.push(`${' '.repeat(LABEL_WIDTH)} ${dim(`┌${edge}┐`, depth)}`)
  for (let first = 0; first < grid.cells; first += grid.columns) lines.push(drawRow(allocation, first, depth))
  lines.push(`${' '.repeat(LABEL_WIDTH)} ${dim(`└${edge}┘`, depth)}`)
  lines.push(dim(`${' '.repeat(LABEL_WIDTH + 2)}one cell: ${humanSize(grid.cellBytes)}`, depth), '')
  lines.push(...legend(allocation, caption, depth), '')
  return `${lines.join('\n')}\n`
}

function heading({ filename, format, virtualSize, clusterSize, fileSize }: DiskCaption, depth: ColorDepth): string {
  const facts = [format, humanSize(virtualSize)]
  if (clusterSize !== undefined) facts.push(`${humanSize(clusterSize)} clusters`)
  if (fileSize !== undefined) facts.push(`${humanSize(fileSize)} on disk`)
  return `${bold(filename, depth)}  ${dim(facts.join(' · '), depth)}`
}

function drawRow(allocation: Allocation, first: number, depth: ColorDepth): string {
  const { start, columns, cells, cellBytes } = allocation.grid
  const label = humanSize(start + first * cellBytes).padStart(LABEL_WIDTH)
  const end = Math.min(first + columns, cells)
  let row = ''
  for (let cell = first; cell < end; cell += 1) row += drawCell(allocation, cell, depth)
  const short = cells > columns ? ' '.repeat(first + columns - end) : ''
  return `${dim(`${label} │`, depth)}${row}${short}${dim('│', depth)}`
}

function drawCell(allocation: Allocation, cell: number, depth: ColorDepth): string {
  const shares = STORED.map(kind => [kind, allocation.share(cell, kind)] as const)
  const stored = shares.reduce((sum, [, share]) => sum + share, 0)
  const zero = allocation.share(cell, 'zero')
  const empty = allocation.share(cell, 'unallocated')
  if (depth === 1) return plainCell(shares, stored, zero, empty)
  const ground: Kind = zero > empty ? 'zero' : 'unallocated'
  // What is there is always seen: the least of it fills an eighth of the cell.
  const level = stored === 0 ? 0 : Math.min(8, Math.max(1, Math.round(stored * 8)))
  const ink = mix(shares.filter(([, share]) => share > 0).map(([kind, share]) => [COLORS[kind], share]))
  return paint(EIGHTHS[level] ?? ' ', depth, level === 0 ? COLORS[ground] : ink, COLORS[ground])
}

function plainCell(shares: readonly (readonly [Kind, number])[], stored: number, zero: number, empty: number): string {
  if (stored === 0) return SIGNS[zero > empty ? 'zero' : 'unallocated']
  const [main] = shares.reduce((best, next) => (next[1] > best[1] ? next : best))
  return main === 'data' && stored < 0.5 ? '▄' : SIGNS[main]
}

function legend(allocation: Allocation, caption: DiskCaption, depth: ColorDepth): string[] {
  const { length } = allocation.grid
  const names = allocation.present.map(kind => [kind, nameOf(kind, caption)] as const)
  const width = Math.max(...names.map(([, name]) => name.length), 0)
  return names.map(([kind, name]) => {
    const { bytes, extents } = allocation.totals[kind]
    const sample = depth === 1 ? SIGNS[kind].repeat(2) : paint('██', depth, COLORS[kind])
    const share = `${fixed((bytes * 100) / length, 1)}%`
    const count = `${extents} extent${extents === 1 ? '' : 's'}`
    return (
      `${' '.repeat(LABEL_WIDTH + 2)}${sample} ${name.padEnd(width)}  ${humanSize(bytes).padStart(9)} ` +
      `${share.padStart(6)}  ${dim(count, depth)}`
    )
  })
}

/** Kinds below the image are known by the file that they come from. */
function nameOf(kind: Kind, { chain }: DiskCaption): string {
  const file = kind === 'backing1' ? chain[1] : kind === 'backing2' ? chain[2] : undefined
  return file === undefined ? LABELS[kind] : `${LABELS[kind]} (${file})`
}
