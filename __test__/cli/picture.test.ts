import { describe, expect, it } from 'vitest'
import { Allocation, type DiskCaption, gridFor } from '../../src/cli/format/allocation.js'
import { colorDepthOf } from '../../src/cli/format/color.js'
import { Layout } from '../../src/cli/format/layout.js'
import type { MapExtent } from '../../src/cli/format/map.js'
import { drawPicture, terminalGrid } from '../../src/cli/format/picture.js'
import { drawSvg, svgGrid } from '../../src/cli/format/svg.js'

const MIB = 1 << 20
const hole = { depth: 0, present: false, zero: true, data: false, compressed: false }
const data = { depth: 0, present: true, zero: false, data: true, compressed: false }
const zero = { depth: 0, present: true, zero: true, data: false, compressed: false }

const DISK: readonly MapExtent[] = [
  { start: 0, length: 2 * MIB, ...data, offset: 327680 },
  { start: 2 * MIB, length: MIB, ...data, compressed: true },
  { start: 3 * MIB, length: MIB, ...zero },
  { start: 4 * MIB, length: MIB, ...data, depth: 1 },
  { start: 5 * MIB, length: MIB, ...data, depth: 2, compressed: true },
  { start: 6 * MIB, length: MIB, ...data, depth: 3 },
  { start: 7 * MIB, length: 9 * MIB, ...hole },
]

const CAPTION: DiskCaption = {
  filename: 'a<b>.qcow2',
  format: 'qcow2',
  virtualSize: 16 * MIB,
  clusterSize: 65536,
  fileSize: 3 * MIB,
  chain: ['a<b>.qcow2', 'base.qcow2'],
}

const fill = (allocation: Allocation, extents = DISK) => {
  for (const extent of extents) allocation.add(extent)
  return allocation
}

describe('allocation', () => {
  it('cuts a disk into rows that begin at round offsets', () => {
    expect(gridFor(0, 16 * MIB, 64, 16)).toEqual({
      start: 0,
      length: 16 * MIB,
      columns: 64,
      cellBytes: 16384,
      cells: 1024,
    })
    expect(gridFor(0, 17 * MIB, 64, 16)).toMatchObject({ cellBytes: 24576 })
    expect(gridFor(0, 512, 64, 16)).toMatchObject({ cellBytes: 512, cells: 1 })
    expect(gridFor(0, 0, 64, 16)).toMatchObject({ cells: 0 })
    const huge = gridFor(0, 2 ** 53 - 1, 64, 16)
    expect(huge.cells).toBeLessThanOrEqual(64 * 16)
  })

  it('accounts for every byte once, however extents and cells fall', () => {
    const allocation = new Allocation(gridFor(1000, 10_000, 3, 2))
    const lengths = [1, 999, 4000, 37, 6000]
    let start = 0
    for (const [index, length] of lengths.entries()) {
      allocation.add({ start, length, ...(index % 2 === 0 ? data : hole) })
      start += length
    }
    const { cells } = allocation.grid
    for (let cell = 0; cell < cells; cell += 1) {
      expect(allocation.share(cell, 'data') + allocation.share(cell, 'unallocated')).toBeCloseTo(1, 10)
    }
    expect(allocation.present).toEqual(['data', 'unallocated'])
  })
})

describe('the picture in a terminal', () => {
  const draw = (depth: 1 | 4 | 8 | 24, extents = DISK, length = 16 * MIB, width = 40) =>
    drawPicture(fill(new Allocation(terminalGrid(0, length, width)), extents), CAPTION, depth)

  it('uses one sign a cell where there are no colours', () => {
    expect(draw(1)).toBe(`
 a<b>.qcow2  qcow2 · 16 MiB · 64 KiB clusters · 3 MiB on disk

          ┌────────────────────────┐
      0 B │████████████████████████│
  1.5 MiB │████████▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓▓│
    3 MiB │░░░░░░░░░░░░░░░░▒▒▒▒▒▒▒▒│
  4.5 MiB │▒▒▒▒▒▒▒▒◆◆◆◆◆◆◆◆◆◆◆◆◆◆◆◆│
    6 MiB │◇◇◇◇◇◇◇◇◇◇◇◇◇◇◇◇········│
  7.5 MiB │························│
    9 MiB │························│
 10.5 MiB │························│
   12 MiB │························│
 13.5 MiB │························│
   15 MiB │················        │
          └────────────────────────┘
           one cell: 64 KiB

           ██ data                           2 MiB  12.5%  1 extent
           ▓▓ compressed                     1 MiB   6.2%  1 extent
           ▒▒ backing file (base.qcow2)      1 MiB   6.2%  1 extent
           ◆◆ 2nd backing file               1 MiB   6.2%  1 extent
           ◇◇ deeper in the chain            1 MiB   6.2%  1 extent
           ░░ zero                           1 MiB   6.2%  1 extent
           ·· unallocated                    9 MiB  56.2%  1 extent

`)
  })

  it('fills a cell by how much of it is stored, and never hides the least of it', () => {
    const cell = 16384
    const half: MapExtent[] = [
      { start: 0, length: cell / 2, ...data },
      { start: cell / 2, length: cell / 2, ...hole },
      { start: cell, length: 512, ...data },
      { start: cell + 512, length: 16 * MIB - cell - 512, ...hole },
    ]
    const first = draw(24, half, 16 * MIB, 80).split('\n')[4] ?? ''
    expect(first).toContain('38;2;45;212;191;48;2;30;41;59m▄')
    expect(first).toContain('38;2;45;212;191;48;2;30;41;59m▁')
    expect(draw(8)).toContain('38;5;')
    expect(draw(4)).toContain('\u001b[92;40m█')
  })

  it('fits the width, and draws a disk of one sector or none', () => {
    for (const width of [20, 40, 80, 120, 250]) {
      for (const line of draw(1, DISK, 16 * MIB, width)
        .split('\n')
        .slice(3, 10)) {
        expect(line.length).toBeLessThanOrEqual(Math.max(width, 20))
      }
    }
    expect(draw(1, [{ start: 0, length: 512, ...data }], 512)).toContain('      0 B │█│')
    expect(draw(1, [], 0)).toContain('one cell: 512 B')
  })

  it('has colours where the terminal has and nobody objects', () => {
    const terminal = { isTTY: true, getColorDepth: () => 24 }
    expect(colorDepthOf(terminal, {})).toBe(24)
    expect(colorDepthOf(terminal, { NO_COLOR: '1' })).toBe(1)
    expect(colorDepthOf({ isTTY: false }, {})).toBe(1)
    expect(colorDepthOf({}, { FORCE_COLOR: '1' })).toBe(24)
    expect(colorDepthOf({}, { FORCE_COLOR: '0' })).toBe(1)
  })
})

describe('the picture as SVG', () => {
  it('is well-formed, needs nothing else, and says what it shows', () => {
    const svg = drawSvg(fill(new Allocation(svgGrid(0, 16 * MIB))), CAPTION)
    expect(svg).toMatch(/^<svg xmlns="http:\/\/www\.w3\.org\/2000\/svg" viewBox="0 0 \d+ \d+"/)
    expect(svg.replace('http://www.w3.org/2000/svg', '')).not.toMatch(/https?:|<script|<image|@import/)
    expect(svg).toContain('<title id="title">Allocation of a&lt;b&gt;.qcow2</title>')
    expect(svg).toContain('data 2 MiB, compressed 1 MiB, backing file 1 MiB')
    expect(svg).toContain('backing file: base.qcow2')
    expect(svg).toContain('<title>0 B to 512 KiB: data 100%</title>')
    // Every element that opens also closes, in order.
    const open: string[] = []
    for (const [, close, name = '', attributes = ''] of svg.matchAll(/<(\/?)([a-zA-Z]+)([^>]*)>/g)) {
      if (close) expect(open.pop()).toBe(name)
      else if (!attributes.endsWith('/')) open.push(name)
    }
    expect(open).toEqual([])
  })

  it('shows where in its file the image keeps its data', () => {
    const layout = new Layout(0, 16 * MIB, 8 * MIB)
    for (const extent of DISK) layout.add(extent)
    // Two of sixteen parts of the disk, at 320 KiB of a file of 8 MiB: rows 1 to 13 of 48, one step down each few columns.
    const runs = [...layout.runs()]
    expect(runs[0]).toEqual({ row: 1, column: 0, length: 1 })
    expect(runs.at(-1)).toMatchObject({ row: 13 })
    expect(Math.max(...runs.map(({ column, length }) => column + length))).toBe(38)
    const svg = drawSvg(fill(new Allocation(svgGrid(0, 16 * MIB))), CAPTION, layout)
    expect(svg).toContain('Place in the file')
    const none = new Layout(0, 16 * MIB, 8 * MIB)
    none.add({ start: 0, length: MIB, ...data, depth: 1, offset: 0 })
    none.add({ start: 0, length: MIB, ...data, compressed: true })
    expect(none.empty).toBe(true)
    expect(drawSvg(fill(new Allocation(svgGrid(0, 16 * MIB))), CAPTION, none)).not.toContain('Place in the file')
  })

  it('does not grow with what an empty disk does not have', () => {
    const extents = [{ start: 0, length: 2 ** 44, ...hole }]
    const svg = drawSvg(fill(new Allocation(svgGrid(0, 2 ** 44)), extents), CAPTION)
    expect(svg.length).toBeLessThan(12_000)
    expect(drawSvg(new Allocation(svgGrid(0, 0)), CAPTION)).toContain('</svg>')
  })

  it('keeps characters that XML cannot have out', () => {
    const svg = drawSvg(new Allocation(svgGrid(0, 512)), { ...CAPTION, filename: '\u0001&"\ud800😀' })
    expect(svg).toContain('\ufffd&amp;&quot;\ufffd😀')
  })
})
