/** The page of `examples/upload` in a real browser: an upload with its progress, one that is refused, one that is cancelled, a download. */

import { type ChildProcess, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { existsSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type Browser, chromium, type Page } from 'playwright-core'
import { compare, convert } from 'qcow2'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder } from './fixtures.js'

const FOLDERS = (process.env['PATH'] ?? '').split(':')
const program = ['chromium', 'chromium-browser', 'google-chrome']
  .flatMap(name => FOLDERS.map(folder => join(folder, name)))
  .find(path => existsSync(path))
if (program === undefined) {
  if (process.env['QCOW2_REQUIRE_BROWSER'] === '1') throw new Error('no Chromium, and QCOW2_REQUIRE_BROWSER is set')
  process.stderr.write('SKIPPED there is no Chromium: the upload page is not looked at in a browser\n')
}

const SERVER = fileURLToPath(new URL('../../examples/upload/server.mjs', import.meta.url))
const folder = temporaryFolder()
const disks = temporaryFolder()
const at = (name: string): string => join(folder, name)
const MIB = 1 << 20

describe.skipIf(program === undefined)('the upload page', () => {
  let server: ChildProcess
  let browser: Browser
  let page: Page

  beforeAll(async () => {
    server = spawn(process.execPath, [SERVER, disks, '0'], { stdio: ['ignore', 'pipe', 'inherit'] })
    const listening = once(server.stdout!, 'data')
    writeFileSync(at('disk.raw'), randomBytes(3 * MIB))
    await convert(at('disk.raw'), at('disk.vmdk'), {
      from: 'raw',
      to: 'vmdk',
      create: { subformat: 'streamOptimized' },
    })
    writeFileSync(at('text.txt'), 'no image')
    // Root has no sandbox.
    browser = await chromium.launch({ executablePath: program ?? '', args: ['--no-sandbox', '--disable-gpu'] })
    page = await browser.newPage()
    await page.goto(/^\S+/.exec(String((await listening)[0]))?.[0] ?? '')
  })
  afterAll(async () => {
    await browser?.close()
    server?.kill()
  })

  const upload = async (name: string): Promise<void> => {
    await page.setInputFiles('#file', at(name))
    await page.click('#send')
  }
  const said = (text: string) => page.locator('#said', { hasText: text }).waitFor({ timeout: 20_000 })
  const progress = () => page.evaluate('document.getElementById("progress").value')

  it('uploads an image of another format, and gives it back', async () => {
    await upload('disk.vmdk')
    await said(`disk.qcow2: a disk of ${3 * MIB} bytes`)
    expect(await progress()).toBe(1)
    const [download] = await Promise.all([page.waitForEvent('download'), page.click('#disks a')])
    await download.saveAs(at('back.qcow2'))
    expect(await compare(at('disk.raw'), at('back.qcow2'), { formatA: 'raw' })).toMatchObject({ identical: true })
  })

  it('says why an upload is refused', async () => {
    await upload('text.txt')
    await said('refused: not a qcow2 image')
    await upload('disk.vmdk')
    await said('refused: EEXIST')
    expect(readdirSync(disks)).toEqual(['disk.qcow2'])
  })

  it('cancels an upload, of which nothing stays', async () => {
    const network = await page.context().newCDPSession(page)
    const limits = { offline: false, latency: 0, downloadThroughput: -1, uploadThroughput: MIB }
    await network.send('Network.enable')
    await network.send('Network.emulateNetworkConditions', limits)
    await convert(at('disk.raw'), at('second.qcow2'), { from: 'raw', to: 'qcow2' })
    await upload('second.qcow2')
    await page.waitForFunction('document.getElementById("progress").value > 0.2')
    await page.click('#cancel')
    await said('cancelled')
    await network.send('Network.emulateNetworkConditions', { ...limits, uploadThroughput: -1 })
    expect(readdirSync(disks)).toEqual(['disk.qcow2'])
    await upload('second.qcow2')
    await said(`second.qcow2: a disk of ${3 * MIB} bytes`)
  })
})
