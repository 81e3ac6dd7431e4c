/** `map --output=svg`: the allocation of a disk as a picture that needs nothing but itself. */

import { type Allocation, type DiskCaption, gridFor, type Kind, LABELS } from './allocation.js'
import { LAYOUT_COLUMNS, LAYOUT_ROWS, type Layout } from './layout.js'
import { fixed, humanSize } from './number.js'

const WIDTH = 1040
const MARGIN = 32
const LABEL_WIDTH = 76
const COLUMNS = 128
const MAX_ROWS = 32
const CELL_WIDTH = (WIDTH - 2 * MARGIN - LABEL_WIDTH) / COLUMNS
const CELL_HEIGHT = 14
const ROW_HEIGHT = CELL_HEIGHT + 2
const MAP_TOP = 132
const LEGEND_ROW = 24
const LAYOUT_TITLE = 28
const LAYOUT_HEIGHT = 144

export const svgGrid = (start: number, length: number) => gridFor(start, length, COLUMNS, MAX_ROWS)

/** From the bottom of a cell to its top. What is left is unallocated. */
const STACK: readonly Kind[] = ['data', 'compressed', 'backing1', 'backing2', 'backing3', 'zero']

type Part = Kind | 'paper' | 'ink' | 'faint'

/** Plain rules rather than custom properties, which many viewers do not know. */
export const LIGHT: Readonly<Record<Part, string>> = {
  paper: '#ffffff',
  ink: '#0f172a',
  faint: '#64748b',
  data: '#0d9488',
  compressed: '#f59e0b',
  backing1: '#3b82f6',
  backing2: '#8b5cf6',
  backing3: '#ec4899',
  zero: '#cbd5e1',
  unallocated: '#f1f5f9',
}

export const DARK: Readonly<Record<Part, string>> = {
  paper: '#0f172a',
  ink: '#f1f5f9',
  faint: '#94a3b8',
  data: '#2dd4bf',
  compressed: '#fbbf24',
  backing1: '#60a5fa',
  backing2: '#a78bfa',
  backing3: '#f472b6',
  zero: '#475569',
  unallocated: '#1e293b',
}

const fills = (colors: Readonly<Record<Part, string>>): string =>
  Object.entries(colors)
    .map(([part, color]) => `.${part}{fill:${color}}`)
    .join('')

const STYLE = [
  'svg{font:13px ui-sans-serif,system-ui,"Segoe UI","DejaVu Sans",sans-serif}',
  '.title{font-size:19px;font-weight:600}',
  '.small{font-size:11px}',
  '.offset{font-size:11px;text-anchor:end}',
  '.number{text-anchor:end}',
  '.swatch{stroke:#94a3b8;stroke-opacity:.5}',
  fills(LIGHT),
  `@media(prefers-color-scheme:dark){${fills(DARK)}}`,
].join('')

/** `layout` adds a second picture: where in the file the data is. */
export function drawSvg(allocation: Allocation, caption: DiskCaption, layout?: Layout): string {
  const { grid } = allocation
  const rows = Math.ceil(grid.cells / grid.columns)
  const legendTop = MAP_TOP + Math.max(rows, 1) * ROW_HEIGHT + 34
  const kinds = allocation.present
  const layoutTop = legendTop + kinds.length * LEGEND_ROW + 30
  const plotted = layout !== undefined && !layout.empty
  const height = layoutTop + (plotted ? LAYOUT_TITLE + LAYOUT_HEIGHT + 24 : 0) + 8
  return `${[
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${height}" width="${WIDTH}" height="${height}" role="img" aria-labelledby="title summary">`,
    `<title id="title">Allocation of ${xmlText(caption.filename)}</title>`,
    `<desc id="summary">${xmlText(summary(allocation))}</desc>`,
    `<style>${STYLE}</style>`,
    `<rect class="paper" width="${WIDTH}" height="${height}"/>`,
    ...header(caption),
    ...proportions(allocation),
    ...cells(allocation),
    ...legend(allocation, caption, legendTop),
    ...(plotted ? plot(layout, allocation, layoutTop) : []),
    '</svg>',
  ].join('\n')}\n`
}

const summary = (allocation: Allocation): string =>
  allocation.present.map(kind => `${LABELS[kind]} ${humanSize(allocation.totals[kind].bytes)}`).join(', ')

function header({ filename, format, virtualSize, clusterSize, fileSize, chain }: DiskCaption): string[] {
  const facts = [format, `${humanSize(virtualSize)} disk`]
  if (clusterSize !== undefined) facts.push(`${humanSize(clusterSize)} clusters`)
  if (fileSize !== undefined) facts.push(`${humanSize(fileSize)} on disk`)
  if (chain.length > 1) facts.push(`chain of ${chain.length}`)
  return [
    `<text class="title ink" x="${MARGIN}" y="48">${xmlText(filename)}</text>`,
    `<text class="faint" x="${MARGIN}" y="70">${xmlText(facts.join(' · '))}</text>`,
  ]
}

/** The whole disk as one bar. */
function proportions(allocation: Allocation): string[] {
  const width = WIDTH - 2 * MARGIN
  const { length } = allocation.grid
  const parts = ['<clipPath id="bar"><rect', `x="${MARGIN}" y="88" width="${width}" height="14" rx="7"/></clipPath>`]
  const bars = [parts.join(' '), '<g clip-path="url(#bar)">', box('unallocated', MARGIN, 88, width, 14)]
  let left = MARGIN
  for (const kind of STACK) {
    const part = length === 0 ? 0 : (allocation.totals[kind].bytes / length) * width
    if (part > 0) bars.push(box(kind, left, 88, part, 14))
    left += part
  }
  return [...bars, '</g>']
}

/** Row by row; neighbours that look the same are one shape, which keeps pictures of empty disks small. */
function cells(allocation: Allocation): string[] {
  const { start, columns, cells: count, cellBytes } = allocation.grid
  const shapes: string[] = []
  for (let first = 0; first < count; first += columns) {
    const y = MAP_TOP + (first / columns) * ROW_HEIGHT
    const label = humanSize(start + first * cellBytes)
    shapes.push(`<text class="faint offset" x="${MARGIN + LABEL_WIDTH - 10}" y="${y + 11}">${label}</text>`)
    const end = Math.min(first + columns, count)
    for (let cell = first; cell < end; ) {
      const look = lookOf(allocation, cell)
      let next = cell + 1
      while (next < end && lookOf(allocation, next).key === look.key) next += 1
      shapes.push(...run(look, cell - first, next - cell, y, start + cell * cellBytes, cellBytes))
      cell = next
    }
  }
  return shapes
}

interface Look {
  readonly key: string
  readonly layers: readonly (readonly [kind: Kind, share: number])[]
}

/** Shares in steps of a fortieth; what is there at all is seen. */
function lookOf(allocation: Allocation, cell: number): Look {
  const layers = STACK.map(kind => {
    const share = allocation.share(cell, kind)
    return [kind, share === 0 ? 0 : Math.max(0.1, Math.round(share * 40) / 40)] as const
  }).filter(([, share]) => share > 0)
  return { key: layers.join(';'), layers }
}

function run(look: Look, column: number, length: number, y: number, offset: number, cellBytes: number): string[] {
  const x = MARGIN + LABEL_WIDTH + column * CELL_WIDTH
  const width = length * CELL_WIDTH
  const total = look.layers.reduce((sum, [, share]) => sum + share, 0)
  const shapes = total < 1 ? [box('unallocated', x, y, width, CELL_HEIGHT)] : []
  let filled = 0
  for (const [kind, share] of look.layers) {
    // The least that is shown of a kind may push the sum beyond the cell.
    const part = share / Math.max(total, 1)
    shapes.push(box(kind, x, y + CELL_HEIGHT * (1 - filled - part), width, CELL_HEIGHT * part))
    filled += part
  }
  const what = look.layers.map(([kind, share]) => `${LABELS[kind]} ${fixed(share * 100, 0)}%`).join(', ')
  const range = `${humanSize(offset)} to ${humanSize(offset + length * cellBytes)}`
  return [`<g><title>${range}: ${what || LABELS.unallocated}</title>${shapes.join('')}</g>`]
}

function legend(allocation: Allocation, caption: DiskCaption, top: number): string[] {
  const { length, cellBytes } = allocation.grid
  const left = MARGIN + LABEL_WIDTH
  const lines = [
    `<text class="faint" x="${WIDTH - MARGIN}" y="${top - 12}" text-anchor="end">one cell: ${humanSize(cellBytes)}</text>`,
  ]
  for (const [index, kind] of allocation.present.entries()) {
    const y = top + index * LEGEND_ROW
    const { bytes, extents } = allocation.totals[kind]
    const file = kind === 'backing1' ? caption.chain[1] : kind === 'backing2' ? caption.chain[2] : undefined
    lines.push(
      `<rect class="swatch ${kind}" x="${left}" y="${y}" width="14" height="14" rx="3"/>`,
      `<text class="ink" x="${left + 24}" y="${y + 12}">${xmlText(file === undefined ? LABELS[kind] : `${LABELS[kind]}: ${file}`)}</text>`,
      `<text class="number ink" x="${WIDTH - MARGIN - 190}" y="${y + 12}">${humanSize(bytes)}</text>`,
      `<text class="number ink" x="${WIDTH - MARGIN - 110}" y="${y + 12}">${fixed((bytes * 100) / length, 1)}%</text>`,
      `<text class="number faint" x="${WIDTH - MARGIN}" y="${y + 12}">${extents} extent${extents === 1 ? '' : 's'}</text>`,
    )
  }
  return lines
}

/** A straight line from the upper left is a file in the order of the disk. */
function plot(layout: Layout, allocation: Allocation, top: number): string[] {
  const { start, length } = allocation.grid
  const left = MARGIN + LABEL_WIDTH
  const right = WIDTH - MARGIN
  const y = top + LAYOUT_TITLE
  const [column, row] = [(right - left) / LAYOUT_COLUMNS, LAYOUT_HEIGHT / LAYOUT_ROWS]
  const label = (text: string, at: number): string =>
    `<text class="faint offset" x="${left - 10}" y="${at}">${text}</text>`
  return [
    `<text class="ink" x="${left}" y="${top + 12}">Place in the file<tspan class="faint" dx="12">across: disk, down: file</tspan></text>`,
    label(humanSize(0), y + 11),
    label(humanSize(layout.fileLength), y + LAYOUT_HEIGHT),
    `<text class="faint small" x="${left}" y="${y + LAYOUT_HEIGHT + 18}">${humanSize(start)}</text>`,
    `<text class="faint offset" x="${right}" y="${y + LAYOUT_HEIGHT + 18}">${humanSize(start + length)}</text>`,
    box('unallocated', left, y, right - left, LAYOUT_HEIGHT),
    ...Array.from(layout.runs(), run =>
      box('data', left + run.column * column, y + run.row * row, run.length * column, row),
    ),
  ]
}

const box = (kind: Kind, x: number, y: number, width: number, height: number): string =>
  `<rect class="${kind}" x="${round(x)}" y="${round(y)}" width="${round(width)}" height="${round(height)}"/>`

const round = (value: number): number => Math.round(value * 100) / 100

/** File names may hold anything; XML may not. */
export const xmlText = (text: string): string =>
  text
    .replace(/[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, '\ufffd')
    .replaceAll('&', '&amp;')
    .replaceAll('<', '&lt;')
    .replaceAll('>', '&gt;')
    .replaceAll('"', '&quot;')
