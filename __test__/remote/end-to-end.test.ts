/** Images on a real web server and in a real store: how often these are asked, and what becomes of jobs when something breaks. */

import { appendFileSync, existsSync, mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, compare, convert, create, httpSource, inspect, measure, open, type RandomAccessSource } from 'qcow2'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { failure, pattern, temporaryFolder, writeRaw } from '../api/fixtures.js'
import { altered, cut, FaultProxy, mute, reset } from './proxy.js'
import { has, type Serving, startNginx } from './servers.js'

const MIB = 2 ** 20
const GIB = 2 ** 30

describe.skipIf(!has('nginx', 'no image was read from a web server'))('an image on a web server', () => {
  const folder = temporaryFolder()
  const files = join(folder, 'files')
  const local = (name: string): string => join(files, name)
  let server: Serving
  let proxy: FaultProxy

  beforeAll(async () => {
    mkdirSync(files)
    server = await startNginx(folder, files)
    proxy = await FaultProxy.start(server.upstream)
    writeRaw(local('disk.raw'), 256 * MIB, [
      [0, MIB],
      [100 * MIB, 6 * MIB],
      [255 * MIB, MIB],
    ])
    await convert(local('disk.raw'), local('disk.qcow2'), { from: 'raw', to: 'qcow2' })
  })

  afterAll(async () => {
    await proxy.stop()
    await server.stop()
  })

  beforeEach(() => proxy.reset())

  const source = (name: string): Promise<RandomAccessSource> =>
    httpSource(`${proxy.origin}/${name}`, { retries: 2, retryDelay: 1 })

  it('of 100 GB is opened, and its first sector read, in at most 4 requests', async () => {
    // All of it has its tables and its place in the file: nothing is near to anything.
    const huge = await create(local('huge.qcow2'), { size: 100 * GIB, preallocation: 'metadata' })
    await huge.write(pattern(0, 512), { position: 0 })
    await huge.close()
    const late = await create(local('late.qcow2'), { size: 100 * GIB })
    await late.write(Buffer.alloc(20 * MIB, 1), { position: 50 * GIB })
    await late.write(pattern(0, 512), { position: 0 })
    await late.close()
    writeRaw(local('huge.raw'), 100 * GIB, [[0, 512]])
    const asked: Record<string, number> = {}
    for (const [name, format] of [
      ['huge.qcow2', 'qcow2'],
      ['late.qcow2', 'qcow2'],
      ['huge.raw', 'raw'],
    ] as const) {
      proxy.reset()
      await using image = await open(await source(name), { format })
      const sector = Buffer.alloc(512)
      await image.read(sector, { position: 0 })
      expect(sector.equals(pattern(0, 512))).toBe(true)
      expect(image.virtualSize).toBe(100 * GIB)
      asked[name] = proxy.seen.length
    }
    expect(Math.max(...Object.values(asked))).toBeLessThanOrEqual(4)
    expect(asked).toMatchObject({ 'huge.qcow2': 1, 'huge.raw': 1 })
    expect(asked['late.qcow2']).toBeGreaterThan(1)
  })

  it('is converted by asking for every block once', async () => {
    const target = join(folder, 'copy.raw')
    await convert(await source('disk.qcow2'), target, { to: 'raw', concurrency: 4 })
    expect(await compare(local('disk.raw'), target, { formatA: 'raw', formatB: 'raw' })).toMatchObject({
      identical: true,
    })
    const ranges = proxy.seen.map(range => /^bytes=(\d+)-(\d+)$/.exec(range)?.slice(1).map(Number) ?? [])
    const blocks = ranges.flatMap(([first = 0, last = 0]) =>
      Array.from({ length: Math.ceil((last + 1 - first) / MIB) }, (_, i) => first / MIB + i),
    )
    expect(new Set(blocks).size).toBe(blocks.length)
    expect(blocks.every(Number.isInteger)).toBe(true)
    expect(blocks.length).toBeLessThanOrEqual(Math.ceil(statSync(local('disk.qcow2')).size / MIB))
  })

  it('is what every job takes', async () => {
    const file = local('disk.qcow2')
    const remote = await source('disk.qcow2')
    expect(await inspect(remote)).toMatchObject({ format: 'qcow2', virtualSize: 256 * MIB, safe: true })
    expect(await check(remote)).toMatchObject({ leaks: 0, corruptions: 0 })
    expect(await measure(remote, { to: 'raw' })).toEqual(await measure(file, { to: 'raw' }))
    expect(await compare(remote, file)).toMatchObject({ identical: true })
    await using image = await open(remote)
    await using same = await open(file)
    const shape = async (of: typeof image): Promise<unknown[]> => {
      const runs: unknown[] = []
      for await (const { start, length, data, zero } of of.map()) runs.push({ start, length, data, zero })
      return runs
    }
    expect(await shape(image)).toEqual(await shape(same))
    const overlay = join(folder, 'overlay.qcow2')
    await (await create(join(folder, 'base.qcow2'), { size: 256 * MIB })).close()
    await (await create(overlay, { backingFile: 'base.qcow2', backingFormat: 'qcow2' })).close()
    await using above = await open(overlay, { references: () => source('disk.qcow2') })
    const sector = Buffer.alloc(512)
    await above.read(sector, { position: 100 * MIB })
    expect(sector.equals(pattern(100 * MIB, 512))).toBe(true)
    await expect(open(remote, { flags: 'r+' })).rejects.toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
  })

  it('that is replaced, cut off or silent ends the job, and leaves no file', async () => {
    const target = join(folder, 'never.raw')
    writeFileSync(local('changing.qcow2'), readFileSync(local('disk.qcow2')))
    const changing = await source('changing.qcow2')
    appendFileSync(local('changing.qcow2'), 'more')
    const error = await failure(() => convert(changing, target, { to: 'raw' }))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_SOURCE_CHANGED', path: `${proxy.origin}/changing.qcow2` })
    for (const [fault, code] of [
      [reset, 'ECONNRESET'],
      [cut(1000), 'ECONNRESET'],
      [altered({ 'content-range': undefined }), 'ERR_QCOW2_IO'],
    ] as const) {
      const broken = await source('disk.qcow2')
      proxy.always = fault
      expect(await failure(() => convert(broken, target, { to: 'raw' }))).toMatchObject({ code })
      proxy.reset()
    }
    const hanging = await source('disk.qcow2')
    const controller = new AbortController()
    proxy.always = exchange => {
      mute(exchange)
      setTimeout(() => controller.abort(), 20)
    }
    const stopped = await failure(() => convert(hanging, target, { to: 'raw', signal: controller.signal }))
    expect(stopped.name).toBe('AbortError')
    expect(existsSync(target)).toBe(false)
  })

  it('is never asked for because an image names it', async () => {
    const overlay = join(folder, 'asks.qcow2')
    const url = `${proxy.origin}/disk.qcow2`
    const harmless = 'x'.repeat(url.length)
    await (await create(join(folder, harmless), { size: 256 * MIB })).close()
    await (await create(overlay, { backingFile: harmless, backingFormat: 'qcow2' })).close()
    const bytes = readFileSync(overlay)
    bytes.write(url, bytes.indexOf(harmless))
    writeFileSync(overlay, bytes)
    for (const references of ['deny', 'allow'] as const) {
      expect(await failure(() => open(overlay, { references }))).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    }
    expect(await failure(() => open(url))).toMatchObject({ code: 'ENOENT' })
    expect(proxy.seen).toEqual([])
  })
})
