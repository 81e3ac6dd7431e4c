/** `report`: what the page says, against the image; and the page itself in a browser. */

import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { chromium } from 'playwright-core'
import { create } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { KINDS } from '../../src/cli/format/allocation.js'
import { Runs } from '../../src/cli/format/runs.js'
import { shareOut } from '../../src/cli/shares.js'
import { temporaryFolder } from '../api/fixtures.js'
import { asQemuImg } from './run.js'

const folder = temporaryFolder()
/** In this process: commands that are not qemu-img's work under its name, too. */
const run = (...args: string[]) => asQemuImg(args, folder)
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20
const CLUSTER = 65536

beforeAll(async () => {
  const base = await create(at('base.qcow2'), { size: 64 * MIB })
  await base.write(Buffer.alloc(CLUSTER, 1), { position: 32 * MIB })
  await base.close()
  const below = { backingFile: 'base.qcow2', backingFormat: 'qcow2', references: 'allow' } as const
  const image = await create(at('disk.qcow2'), { size: 64 * MIB, ...below })
  await image.bitmaps.add('nightly <i>')
  await image.write(Buffer.alloc(8 * CLUSTER, 2), { position: 0 })
  await image.snapshots.create('</script><b>one')
  await image.write(Buffer.alloc(3 * CLUSTER, 3), { position: 0 })
  await image.writeZeroes(48 * MIB, MIB)
  await image.close()
})

const cells = (page: string, within: string): string[][] => {
  const [, part = ''] = page.split(`<h2>${within}</h2>`)
  const rows = (part.split('<h2>')[0] ?? '').match(/<tr>.*?<\/tr>/gs) ?? []
  return rows.map(row =>
    [...row.matchAll(/<t[dh][^>]*>(.*?)<\/t[dh]>/gs)].map(([, text = '']) => text.replace(/<.*?>/g, '')),
  )
}

describe('report', () => {
  it('tells what the image has', async () => {
    const { code, stdout: page, stderr } = await run('report', 'disk.qcow2')
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
    expect(cells(page, 'Allocation')).toEqual([
      ['What', 'Bytes', 'Of the disk', 'Extents'],
      ['data', '512 KiB', '0.8 %', '2'],
      ['backing file', '64 KiB', '0.1 %', '1'],
      ['zero', '1 MiB', '1.6 %', '1'],
      ['unallocated', '62.4 MiB', '97.6 %', '3'],
    ])
    expect(cells(page, 'Chain').map(([depth, file]) => [depth, file])).toEqual([
      ['Depth', 'File'],
      ['0', 'disk.qcow2'],
      ['1', 'base.qcow2'],
    ])
    const [, snapshot, disk] = cells(page, 'Snapshots')
    expect(snapshot).toMatchObject([
      '1',
      '&lt;/script&gt;&lt;b&gt;one',
      expect.stringMatching(/^\d{4}-.* UTC$/),
      '',
      '192 KiB',
    ])
    expect(disk).toEqual(['', 'the disk itself', '', '', '192 KiB'])
    expect(page).toContain('320 KiB are held by several')
    expect(cells(page, 'Bitmaps')[1]).toEqual(['nightly &lt;i&gt;', 'recording', '64 KiB', '1.5 MiB', '2.3 %'])
    expect(cells(page, 'What compacting would win')).toHaveLength(3)
    expect(page).toContain('No errors were found.')
  })

  it('is written into a file, and never over one of the image', async () => {
    expect(await run('report', 'disk.qcow2', '-o', 'page.html')).toMatchObject({ code: 0, stdout: '' })
    expect(readFileSync(at('page.html'), 'utf8')).toMatch(/^<!doctype html>.*<\/html>\n$/s)
    const before = readFileSync(at('base.qcow2'))
    const refused = await run('report', 'disk.qcow2', '-o', './base.qcow2')
    expect(refused).toMatchObject({ code: 1, stderr: expect.stringContaining('the report is not written over it') })
    expect(readFileSync(at('base.qcow2')).equals(before)).toBe(true)
  })

  it('of a raw disk says what that has not', async () => {
    writeFileSync(at('small.raw'), Buffer.alloc(MIB, 1))
    const { code, stdout } = await run('report', '-f', 'raw', 'small.raw')
    expect(code).toBe(0)
    expect(stdout.match(/raw images have no such thing/g)).toHaveLength(2)
  })
})

it('shares out what views have alone, and gives up where there are very many extents', async () => {
  const place = { depth: 0, data: true, compressed: false, length: 10 }
  const shares = await shareOut(3, async add => {
    add(0, { ...place, offset: 0 })
    add(1, { ...place, offset: 5 })
    add(2, { ...place, offset: 40 })
    add(2, { ...place, depth: 1, offset: 80 })
    add(1, { ...place, compressed: true })
  })
  expect(shares).toEqual({ views: [5, 5, 10], shared: 5, compressed: true })
  const many = await shareOut(1, async add => {
    for (let offset = 0; add(0, { ...place, offset }); offset += 20) {}
  })
  expect(many).toBeUndefined()
})

it('draws very many extents by cells, in which what is stored is seen', () => {
  const hole = { depth: 0, present: false, zero: true, data: false, compressed: false }
  const data = { depth: 0, present: true, zero: false, data: true, compressed: false, offset: 0 }
  const runs = new Runs(2 ** 40)
  for (let n = 0; n < 2 ** 15; n++) {
    runs.add({ start: n * 2 ** 25, length: 512, ...data })
    runs.add({ start: n * 2 ** 25 + 512, length: 2 ** 25 - 512, ...hole })
  }
  expect(runs.cellBytes).toBe(2 ** 26)
  expect(runs.list()).toEqual([[2 ** 40, KINDS.indexOf('data'), -1]])
})

const browser = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'].find(existsSync)
if (browser === undefined) process.stderr.write('SKIPPED the page of a report: there is no Chromium\n')

it.skipIf(browser === undefined)(
  'zooms in a browser, in light and dark, and asks for nothing beside itself',
  async () => {
    await run('report', 'disk.qcow2', '-o', 'page.html')
    const started = await chromium.launch({ executablePath: browser ?? '', args: ['--no-sandbox'] })
    const wrong: string[] = []
    const papers: unknown[] = []
    for (const colorScheme of ['light', 'dark'] as const) {
      const page = await started.newPage({ colorScheme })
      page.on('pageerror', error => wrong.push(error.message))
      page.on('console', message => {
        if (message.type() === 'error') wrong.push(message.text())
      })
      page.on('request', request => {
        if (!/^(file|data):/.test(request.url())) wrong.push(request.url())
      })
      await page.goto(pathToFileURL(at('page.html')).href)
      papers.push(await page.evaluate('getComputedStyle(document.body).backgroundColor'))
      const range = (): Promise<string | null> => page.textContent('#range')
      expect(await range()).toBe('0 B to 64 MiB, a row is 2 MiB')
      // Data begins at once: the pixel in the upper left is not that of the lower right.
      const pixel = (x: number, y: number) =>
        page.evaluate(
          `(() => { const c = document.getElementById('map'); return [...c.getContext('2d').getImageData(${x} * (c.width - 1), ${y} * (c.height - 1), 1, 1).data].join() })()`,
        )
      expect(await pixel(0, 0)).not.toBe(await pixel(0.99, 0.97))
      await page.click('#in')
      expect(await range()).toBe('16 MiB to 48 MiB, a row is 1 MiB')
      await page.press('#map', 'Home')
      expect(await range()).toBe('0 B to 32 MiB, a row is 1 MiB')
      await page.hover('#map', { position: { x: 2, y: 2 } })
      expect(await page.textContent('#tip')).toMatch(/^0 B to 192 KiB: data, at \d+ in the file$/)
      await page.click('#all')
      expect(await page.isDisabled('#out')).toBe(true)
    }
    await started.close()
    expect(wrong).toEqual([])
    expect(papers).toEqual(['rgb(255, 255, 255)', 'rgb(15, 23, 42)'])
  },
)
