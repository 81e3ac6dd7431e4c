/** Differencing images: made on their parents, written to, known again, by the API and the command line. */

import { copyFileSync, mkdirSync, readFileSync, utimesSync } from 'node:fs'
import { join } from 'node:path'
import { check, convert, create, type Image, inspect, measure, open, type ReferencePolicy } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { failure, pattern, writeRaw } from '../api/fixtures.js'
import { asQemuImg, qcow2, workspace } from '../cli/run.js'
import { assertSameBytes } from '../interop/qemu.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const SIZE = 5 * 2 ** 20
const source = writeRaw(at('source.raw'), SIZE, [
  [0, 70_000],
  [2 ** 21, 100_000],
  [SIZE - 5000, 5000],
])

interface Row {
  readonly format: 'vpc' | 'vhdx' | 'vdi'
  readonly shape: object
  /** The name of its parent that a child says. */
  readonly named: RegExp
}

const FORMATS: readonly Row[] = [
  { format: 'vpc', shape: { forceSize: true }, named: /^\.\/base\.vpc$/ },
  { format: 'vhdx', shape: {}, named: /^\.\/base\.vhdx$/ },
  { format: 'vdi', shape: {}, named: /^uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/ },
]

async function diskOf(image: Image): Promise<Buffer> {
  const buffer = Buffer.alloc(SIZE, 0xee)
  await image.read(buffer, { position: 0 })
  return buffer
}

describe.each(FORMATS)('$format', ({ format, shape, named }) => {
  const [base, child] = [at(`base.${format}`), at(`child.${format}`)]
  const backing = { backingFile: `base.${format}`, backingFormat: format }
  /** A name that the image has is followed; of one without, the caller says it. */
  const references: ReferencePolicy = format === 'vdi' ? ({ kind }) => (kind === 'backing' ? base : null) : 'allow'
  const expected = Buffer.from(readFileSync(source))

  it('a child is made, written to and opened again', async () => {
    await convert(source, base, { from: 'raw', to: format, create: shape as never })
    const before = readFileSync(base)
    {
      await using image = await create(child, { format, ...backing } as never)
      expect(image.virtualSize).toBe(SIZE)
      assertSameBytes(await diskOf(image), expected, 'the new child')
      await image.write(pattern(0, 1000), { position: 2 ** 21 + 100 })
      await image.writeZeroes(100, 3000)
      pattern(0, 1000).copy(expected, 2 ** 21 + 100)
      expected.fill(0, 100, 3100)
    }
    assertSameBytes(readFileSync(base), before, 'the parent')
    {
      await using image = await open(child, { references, flags: 'r+' })
      assertSameBytes(await diskOf(image), expected, 'the child')
      await image.write(Buffer.alloc(5, 7), { position: SIZE - 5 })
      expected.fill(7, SIZE - 5)
      const refused = await failure(() => image.truncate(2 * SIZE))
      expect(refused).toMatchObject({ code: 'ERR_QCOW2_UNSUPPORTED_FEATURE', field: 'size' })
    }
    await using image = await open(child, { references })
    const info = await image.info()
    expect(info.backingFilename).toMatch(named)
    assertSameBytes(await diskOf(image), expected, 'the child')
    expect(await check(child)).toMatchObject({ ok: true })
  })

  it('the command line has another file as its parent', async () => {
    const moved = at(`moved/elsewhere.${format}`)
    mkdirSync(at('moved'), { recursive: true })
    copyFileSync(base, moved)
    copyFileSync(child, at(`moved/child.${format}`))
    const file = `moved/child.${format}`
    const opts = `driver=${format},file.filename=${file},backing.driver=${format},backing.file.filename=${moved}`
    for (const words of [
      ['--image-opts', opts],
      ['--parent', moved, file],
    ]) {
      expect(await qcow2(['convert', '-O', 'raw', ...words, 'seen.raw'], folder)).toMatchObject({ code: 0, stderr: '' })
      assertSameBytes(readFileSync(at('seen.raw')), expected, 'the child')
    }
    const chain = await qcow2(['info', '-b', '--output=json', '--parent', moved, file], folder)
    expect(JSON.parse(chain.stdout)).toMatchObject([{ format }, { filename: moved, format }])
    // It is known again by what the child keeps of it.
    const other = at(`moved/other.${format}`)
    await convert(source, other, { from: 'raw', to: format, overwrite: true, create: shape as never })
    const wrong = await qcow2(['map', '--parent', other, file], folder)
    expect(wrong).toMatchObject({ code: 1, stderr: expect.stringContaining('ERR_QCOW2_CHAIN') })
    const none = await qcow2(['map', '--parent', child, moved], folder)
    expect(none).toMatchObject({ code: 1, stderr: expect.stringContaining('is made on no other') })
  })

  it('nothing is opened that the caller does not allow, and a layer can be looked at alone', async () => {
    expect(await failure(() => open(child))).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    expect(await inspect(child)).toMatchObject({ safe: false, findings: [{ code: 'BACKING_FILE' }] })
    const own = Buffer.alloc(1000)
    {
      await using alone = await open(child, { references: 'layer' })
      await alone.read(own, { position: 2 ** 21 + 100 })
    }
    assertSameBytes(own, pattern(0, 1000), 'what the child has itself')
    const written = await failure(() => open(child, { references: 'layer', flags: 'r+' }))
    expect(written).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    if (format !== 'vdi') return
    const asked = await qcow2(['map', child], folder)
    expect(asked).toMatchObject({ code: 1, stderr: expect.stringContaining('--parent FILE') })
    const followed = await failure(() => open(child, { references: 'allow' }))
    expect(followed).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    expect(followed.message).toContain('knows it by its UUID')
  })

  it('another parent is refused', async () => {
    const other = at(`other.${format}`)
    await convert(source, other, { from: 'raw', to: format, create: shape as never })
    const swapped = await failure(() => open(child, { references: () => other }))
    expect(swapped).toMatchObject({ code: 'ERR_QCOW2_CHAIN' })
    const raw = await failure(() => open(child, { references: () => source }))
    expect(raw.code).toMatch(/^ERR_QCOW2_/)
  })

  it('a disk is converted onto a parent', async () => {
    const copy = at(`copy.${format}`)
    await convert(child, copy, { references, to: format, base, create: backing as never })
    await using image = await open(copy, { references })
    assertSameBytes(await diskOf(image), expected, 'the copy')
  })

  it('options that contradict a backing file are refused by name', async () => {
    const refused = (options: object) =>
      failure(() => create(at(`no.${format}`), { format, ...backing, ...options } as never))
    expect(await refused({ size: 2 * SIZE })).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'size' })
    expect(await refused({ backingFormat: 'qcow2' })).toMatchObject({ field: 'backingFormat' })
    expect(await refused({ references: 'layer', size: SIZE })).toMatchObject({ field: 'backingFile' })
    const fixed = format === 'vdi' ? { static: true } : { subformat: 'fixed' }
    expect(await refused(fixed)).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field: Object.keys(fixed)[0] })
  })

  it('is measured as an image of its own: what it will have of its parent is not known', async () => {
    const own = await measure({ size: SIZE }, { to: format, create: shape as never })
    expect(await measure({ size: SIZE }, { to: format, create: { ...shape, ...backing } as never })).toEqual(own)
  })

  it('by the command line', async () => {
    const made = await asQemuImg(
      ['create', '-f', format, '-b', `base.${format}`, '-F', format, `cli.${format}`],
      folder,
    )
    expect(made).toMatchObject({ code: 0, stderr: '' })
    await using image = await open(at(`cli.${format}`), { references })
    assertSameBytes(await diskOf(image), readFileSync(source), 'the child')
    const other = await asQemuImg(['create', '-f', format, '-b', 'source.raw', '-F', 'raw', `no.${format}`], folder)
    expect(other).toMatchObject({ code: 1, stderr: expect.stringContaining(`backing_file must be a ${format} image`) })
    if (format === 'vdi') return
    const compared = await asQemuImg(['compare', `cli.${format}`, 'source.raw', '-F', 'raw'], folder)
    expect(compared).toMatchObject({ code: 0 })
  })
})

it('a child of a VHD says when its parent was last changed', async () => {
  const changed = Date.UTC(2100, 4, 17, 12, 30, 15) / 1000
  utimesSync(at('base.vpc'), changed, changed)
  await (await create(at('dated.vpc'), { format: 'vpc', backingFile: 'base.vpc', backingFormat: 'vpc' })).close()
  expect(readFileSync(at('dated.vpc')).readUInt32BE(512 + 56)).toBe(changed - Date.UTC(2000, 0, 1) / 1000)
  // One that was copied with its times is older than it says itself.
  utimesSync(at('base.vpc'), 0, 0)
  const backing = { backingFile: 'base.vpc', backingFormat: 'vpc', overwrite: true } as const
  await (await create(at('dated.vpc'), { format: 'vpc', ...backing })).close()
  expect(readFileSync(at('dated.vpc')).readUInt32BE(512 + 56)).toBe(readFileSync(at('base.vpc')).readUInt32BE(24))
})
