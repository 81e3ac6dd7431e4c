/** The example for Electron: its jobs between real processes' messages, and its page in a real browser. */

import { randomBytes } from 'node:crypto'
import { appendFileSync, cpSync, existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { MessageChannel } from 'node:worker_threads'
import { build } from 'esbuild'
import { type Browser, chromium, type Page } from 'playwright-core'
import { compare, open } from 'qcow2'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import type { FromJobs, Outcome, Request, ToJobs } from '../examples/electron/src/bridge.js'
import { serveJobs } from '../examples/electron/src/jobs.js'
import { temporaryFolder } from './api/fixtures.js'

const example = fileURLToPath(new URL('../examples/electron/', import.meta.url))
const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20

beforeAll(() => {
  appendFileSync(at('small.raw'), randomBytes(4 * MIB))
  const bytes = randomBytes(16 * MIB)
  for (let n = 0; n < 16; n++) appendFileSync(at('large.raw'), bytes)
})

describe('the jobs', () => {
  /** Messages go through a channel, as between processes: what cannot be cloned does not arrive. */
  async function run(request: Request, onProgress?: (cancel: () => void) => void) {
    const { port1: page, port2: process } = new MessageChannel()
    const take = serveJobs(message => process.postMessage(message))
    process.on('message', (message: ToJobs) => take(message))
    const shares: number[] = []
    const outcome = await new Promise<Outcome>(resolve => {
      page.on('message', (message: FromJobs) => {
        if ('outcome' in message) return resolve(message.outcome)
        shares.push(message.progress)
        onProgress?.(() => page.postMessage({ id: 7, cancel: true } satisfies ToJobs))
      })
      page.postMessage({ id: 7, start: request } satisfies ToJobs)
    })
    page.close()
    return { outcome, shares }
  }

  it('convert, with progress that ends at the whole', async () => {
    const { outcome, shares } = await run({
      source: at('small.raw'),
      target: at('a.qcow2'),
      to: 'qcow2',
      compress: true,
    })
    expect(outcome).toMatchObject({ done: { virtualSize: 4 * MIB } })
    expect(shares.at(-1)).toBe(1)
    expect(await compare(at('small.raw'), at('a.qcow2'), { formatA: 'raw' })).toMatchObject({ identical: true })
  })

  it('are cancelled, and tell errors with their codes', async () => {
    const long = { source: at('large.raw'), target: at('never.qcow2'), to: 'qcow2', compress: true } as const
    const { outcome } = await run(long, cancel => cancel())
    expect(outcome).toMatchObject({ failure: { code: 'ABORT_ERR' } })
    expect(existsSync(long.target)).toBe(false)
    const missing = await run({ source: at('missing.qcow2'), target: at('b.raw'), to: 'raw', compress: false })
    expect(missing.outcome).toMatchObject({ failure: { code: 'ENOENT' } })
  })
})

it('the guide shows what the example has', () => {
  const guide = readFileSync(fileURLToPath(new URL('../docs/guides/electron.md', import.meta.url)), 'utf8')
  const files = [example, join(example, 'src')].flatMap(within =>
    readdirSync(within, { withFileTypes: true })
      .filter(entry => entry.isFile())
      .map(({ name }) => readFileSync(join(within, name), 'utf8')),
  )
  const shown = [...guide.matchAll(/^```(?:ts|yaml|cjs|mjs)\n(.*?)^```$/gms)].map(([, code = '']) => code.trim())
  expect(shown.length).toBeGreaterThan(4)
  for (const code of shown)
    expect(
      files.some(file => file.includes(code)),
      code,
    ).toBe(true)
})

const browser = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'].find(existsSync)
if (browser === undefined) process.stderr.write('SKIPPED the page of the example: there is no Chromium\n')

describe.skipIf(browser === undefined)('the page', () => {
  let started: Browser
  let page: Page
  beforeAll(async () => {
    const out = at('page')
    const app = join(example, 'src', 'renderer', 'app.ts')
    await build({ entryPoints: [app], outdir: out, bundle: true, platform: 'browser', format: 'iife' })
    for (const name of ['index.html', 'style.css']) cpSync(join(example, 'src', 'renderer', name), join(out, name))
    started = await chromium.launch({ executablePath: browser ?? '', args: ['--no-sandbox'] })
    page = await started.newPage()
    await bridgeTo(page)
    await page.goto(pathToFileURL(join(out, 'index.html')).href)
  })
  afterAll(() => started?.close())

  /** In place of the preload script: the same jobs, by way of the browser's protocol. */
  async function bridgeTo(page: Page): Promise<void> {
    const ends = new Map<number, (outcome: Outcome) => void>()
    const take = serveJobs(message => {
      if ('outcome' in message) ends.get(message.id)?.(message.outcome)
      else page.evaluate(`window.shares[${message.id}]?.(${message.progress})`).catch(() => {})
    })
    await page.exposeFunction('startJob', (id: number, start: Request) => {
      return new Promise<Outcome>(resolve => {
        ends.set(id, resolve)
        take({ id, start })
      })
    })
    await page.exposeFunction('cancelJob', (id: number) => take({ id, cancel: true }))
    await page.addInitScript(`
      window.shares = {}
      window.qcow2 = {
        pathOf: file => ${JSON.stringify(folder)} + '/' + file.name,
        chooseTarget: async (source, to) => source.replace(/\\.[^.]*$/, '-page.') + to,
        convert: (id, request, onProgress) => {
          window.shares[id] = onProgress
          return startJob(id, request)
        },
        cancel: id => cancelJob(id),
      }`)
  }

  const drop = (name: string): Promise<void> =>
    page.evaluate(`{
      const data = new DataTransfer()
      data.items.add(new File(['only its name counts'], ${JSON.stringify(name)}))
      document.querySelector('#zone').dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true, cancelable: true }))
    }`)

  it('converts what is dropped on it', async () => {
    await drop('small.raw')
    await page.waitForSelector('li[data-state=done]', { timeout: 30_000 })
    expect(await page.textContent('li .state')).toContain('4.0 MiB disk')
    expect(await page.locator('li progress').evaluate((bar: { value: number }) => bar.value)).toBe(1)
    await using image = await open(at('small-page.qcow2'))
    expect(image.virtualSize).toBe(4 * MIB)
  })

  it('cancels, and says what went wrong', async () => {
    await drop('large.raw')
    await page.click('li button')
    await page.waitForSelector('li[data-state=cancelled]', { timeout: 30_000 })
    expect(existsSync(at('large-page.qcow2'))).toBe(false)
    await drop('missing.qcow2')
    await page.waitForSelector('li[data-state=failed]', { timeout: 30_000 })
    expect(await page.textContent('li[data-state=failed] .state')).toContain('ENOENT')
    expect(await page.locator('li button').count()).toBe(0)
  })

  it('asks for nothing beside itself', async () => {
    const policy = await page.getAttribute('meta[http-equiv=Content-Security-Policy]', 'content')
    expect(policy).toBe("default-src 'self'")
    expect(
      await page.evaluate(`performance.getEntriesByType('resource').every(({ name }) => name.startsWith('file:'))`),
    ).toBe(true)
  })
})
