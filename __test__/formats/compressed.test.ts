/** Raw disks in gzip, xz and zstd files: read front to back by a convert, and by nothing else. */

import { execFileSync } from 'node:child_process'
import { existsSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'
import { convert, create, inspect, open, type Progress, probe, type StreamFormat } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { failure } from '../api/fixtures.js'
import { asQemuImg, workspace } from '../cli/run.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
/** No whole sector at its end. */
const SIZE = 3 * 2 ** 20 + 100
const DISK = Buffer.alloc(SIZE)
for (let i = 100_000; i < 900_000; i++) DISK[i] = (i * i) & 0xff
DISK.fill(9, SIZE - 50)
const WHOLE = Buffer.concat([DISK, Buffer.alloc(412)])

const tools: Readonly<Record<StreamFormat, (bytes: Buffer) => Buffer>> = {
  gzip: bytes => gzipSync(bytes),
  xz: bytes => execFileSync('xz', ['-1c'], { input: bytes, maxBuffer: 1 << 28 }),
  zstd: bytes => execFileSync('zstd', ['-1c'], { input: bytes, maxBuffer: 1 << 28 }),
}
const has = (tool: string): boolean => {
  try {
    execFileSync(tool, ['--version'], { stdio: 'ignore' })
    return true
  } catch {
    console.warn(`skipped: there is no ${tool}`)
    return false
  }
}
const FORMATS = (['gzip', 'xz', 'zstd'] as const).filter(format => format === 'gzip' || has(format))

beforeAll(async () => {
  await (await create(at('inner.qcow2'), { size: 1 << 20 })).close()
  for (const format of FORMATS) {
    writeFileSync(at(`disk.${format}`), tools[format](DISK))
    writeFileSync(at(`inner.${format}`), tools[format](readFileSync(at('inner.qcow2'))))
  }
})

describe.each(FORMATS)('%s', format => {
  it('becomes an image, and holes stay holes', async () => {
    const [source, target] = [at(`disk.${format}`), at(`${format}.raw`)]
    expect(await convert(source, target, { to: 'raw' })).toMatchObject({ virtualSize: WHOLE.length })
    expect(readFileSync(target).equals(WHOLE)).toBe(true)
    expect(statSync(target).blocks * 512).toBeLessThan(1_500_000)
    await convert(source, at(`${format}.qcow2`), { to: 'qcow2', compress: true, from: format, concurrency: 4 })
    await convert(at(`${format}.qcow2`), target, { to: 'raw', overwrite: true })
    expect(readFileSync(target).equals(WHOLE)).toBe(true)
  })

  it('is one of several sources, and a part in front of its end', async () => {
    const source = at(`disk.${format}`)
    await convert([source, at('inner.qcow2'), source], at('several'), { to: 'raw', overwrite: true })
    const several = Buffer.concat([WHOLE, Buffer.alloc(1 << 20), WHOLE])
    expect(readFileSync(at('several')).equals(several)).toBe(true)
    await convert(source, at('several'), { to: 'raw', overwrite: true, length: 500_224 })
    expect(readFileSync(at('several')).equals(WHOLE.subarray(0, 500_224))).toBe(true)
  })

  it('is refused by everything that does not read front to back', async () => {
    const source = at(`disk.${format}`)
    const only = `compressed with ${format}, which only a convert reads`
    for (const call of [() => open(source), () => open(source, { references: 'allow' })]) {
      expect(await failure(call)).toMatchObject({
        code: 'ERR_QCOW2_FORMAT_UNKNOWN',
        message: expect.stringContaining(only),
      })
    }
    for (const [field, options] of Object.entries({ start: { start: 512 }, salvage: { salvage: true } })) {
      const error = await failure(() => convert(source, at('none'), { to: 'raw', ...options }))
      expect(error).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field })
    }
    expect(existsSync(at('none'))).toBe(false)
  })

  it('with another image in it is refused, unless its bytes are said to be the disk', async () => {
    const source = at(`inner.${format}`)
    const error = await failure(() => convert(source, at('none'), { to: 'raw' }))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_FORMAT_UNKNOWN', path: source })
    expect(error.message).toContain(`the ${format} data holds a qcow2 image`)
    expect(error.message).toContain(`from: '${format}'`)
    expect(existsSync(at('none'))).toBe(false)
    await convert(source, at('bytes'), { to: 'raw', from: format, overwrite: true })
    const inner = readFileSync(at('inner.qcow2'))
    expect(readFileSync(at('bytes')).subarray(0, inner.length).equals(inner)).toBe(true)
    // As its own bytes, compressed.
    await convert(source, at('bytes'), { to: 'raw', from: 'raw', overwrite: true })
    expect(readFileSync(at('bytes')).subarray(0, 100)).toEqual(readFileSync(source).subarray(0, 100))
  })

  it('is said to be what it is', async () => {
    const source = at(`disk.${format}`)
    expect(await probe(source)).toBe(format)
    const found = await inspect(source)
    expect(found).toMatchObject({ format: 'unknown', detected: format })
    expect([0, SIZE]).toContain(found.virtualSize)
    expect(found.safe).toBe(found.virtualSize === SIZE)
    const { stdout } = await asQemuImg(['info', source], folder)
    expect(stdout).toContain(`file format: ${format}\nvirtual size: ${found.virtualSize === 0 ? 'unknown' : '3 MiB'}`)
  })

  it('that is cut short leaves nothing', async () => {
    const bytes = readFileSync(at(`disk.${format}`))
    writeFileSync(at('cut'), bytes.subarray(0, Math.floor(bytes.length * 0.9)))
    expect(await failure(() => convert(at('cut'), at('none'), { to: 'qcow2' }))).toMatchObject({
      code: 'ERR_QCOW2_CORRUPT',
      path: at('cut'),
    })
    expect(existsSync(at('none'))).toBe(false)
  })

  it('is taken by the command line, and by its name alone for what it holds', async () => {
    const run = (...args: string[]) => asQemuImg(['convert', ...args], folder)
    expect(await run('-O', 'qcow2', `disk.${format}`, 'cli.qcow2')).toMatchObject({ code: 0, stderr: '' })
    expect(await run('-p', '-f', format, `inner.${format}`, 'cli.raw')).toMatchObject({ code: 0, stderr: '' })
    const refused = await run(`inner.${format}`, 'cli.raw')
    expect([refused.code, refused.stderr]).toEqual([1, expect.stringContaining('holds a qcow2 image')])
    const same = await asQemuImg(['compare', '-f', 'qcow2', '-F', 'raw', 'cli.qcow2', `${format}.raw`], folder)
    expect(same.stdout).toContain('Images are identical')
    for (const args of [['check'], ['map'], ['snapshot', '-l'], ['measure', '-O', 'raw']]) {
      const { code, stderr } = await asQemuImg([...args, `disk.${format}`], folder)
      expect([code, stderr]).toEqual([expect.any(Number), expect.stringContaining('only a convert reads')])
    }
  })
})

it('the limits hold for what comes out', async () => {
  const limits = { maxVirtualSize: 1 << 20 }
  for (const format of FORMATS) {
    const error = await failure(() => convert(at(`disk.${format}`), at('none'), { to: 'raw', limits }))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_LIMIT', field: 'size' })
  }
})

it('an archive is no disk', async () => {
  writeFileSync(at('disk.raw'), DISK)
  execFileSync('tar', ['-czf', at('disk.tar.gz'), '-C', folder, 'disk.raw'])
  expect((await failure(() => convert(at('disk.tar.gz'), at('none'), { to: 'raw' }))).message).toContain(
    'a tar archive',
  )
})

it('progress goes to its end once, and counting can be cancelled', async () => {
  writeFileSync(at('large.gz'), gzipSync(Buffer.alloc(400 << 20), { level: 1 }))
  const seen: Progress[] = []
  const onProgress = (progress: Progress): void => void seen.push(progress)
  await convert(at('large.gz'), at('large'), { to: 'raw', onProgress, progressInterval: 1 })
  const shares = seen.filter(each => each.total > 0).map(({ current, total }) => current / total)
  expect(shares.length).toBeGreaterThan(2)
  expect(shares.at(-1)).toBe(1)
  expect(shares).toEqual([...shares].sort((a, b) => a - b))
  const controller = new AbortController()
  const cancel = (): void => controller.abort()
  const { signal } = controller
  const call = () => convert(at('large.gz'), at('none'), { to: 'raw', onProgress: cancel, progressInterval: 1, signal })
  await expect(call()).rejects.toMatchObject({ name: 'AbortError' })
  expect(existsSync(at('none'))).toBe(false)
})
