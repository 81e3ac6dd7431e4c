/** The table of formats says what is so: the addon opens each, and makes those that are made, with what their rows have. */

import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { type CreateOptions, create, type Image, open, probe } from 'qcow2'
import { describe, expect, it } from 'vitest'
import {
  can,
  creationOf,
  formatNamed,
  isFormat,
  isKnown,
  isTarget,
  listed,
  quoted,
  ROWS,
  SOURCE_FORMATS,
  TARGET_FORMATS,
  traitsOf,
} from '../../src/formats/table.js'
import { failure, temporaryFolder } from '../api/fixtures.js'

const folder = temporaryFolder()
const SIZE = 1 << 20

describe.each(SOURCE_FORMATS)('%s', format => {
  it('has an opener in the addon', async () => {
    const path = join(folder, `noise.${format}`)
    writeFileSync(path, Buffer.alloc(4096, 7))
    if (traitsOf(format).plain) {
      await using image = await open(path, { format })
      expect(image.virtualSize).toBe(4096)
      return
    }
    expect(await failure(() => open(path, { format }))).toMatchObject({ code: 'ERR_QCOW2_INVALID_HEADER', path })
  })
})

describe.each(TARGET_FORMATS)('a new image: %s', format => {
  const { shape, preallocation, needs } = creationOf(format)
  const needed = needs === 'encrypt' ? { encrypt: { secret: 'x', iterTime: 1 } } : {}
  const made = (path: string, options: object): Promise<Image> =>
    create(path, { format, size: SIZE, ...options } as CreateOptions)

  it.each(preallocation)('with the preallocation %s', async mode => {
    const path = join(folder, `${mode}.${format}`)
    await using image = await made(path, { preallocation: mode, ...needed })
    expect((await image.info()).format).toBe(format)
    expect(await probe(path)).toBe(traitsOf(format).probed ? format : 'raw')
    await image.write(Buffer.alloc(512, 1), { position: 0 })
  })

  it('has the options of its row, and no other', async () => {
    const given = { clusterSize: 4096, lazyRefcounts: false, extendedL2: false } as const
    for (const [name, value] of Object.entries(given)) {
      const make = () => made(join(folder, `${name}.${format}`), { [name]: value, ...needed })
      if (shape.some(option => option === name)) await (await make()).close()
      else expect((await failure(make)).message).toContain(`a ${format} image has no ${name}`)
    }
  })

  it('is not made without what its row says', async () => {
    const make = () => made(join(folder, `bare.${format}`), {})
    if (needs === undefined) await (await make()).close()
    else expect(await failure(make)).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field: needs })
  })

  it('is compressed where its row says so', async () => {
    await using image = await made(join(folder, `compressed.${format}`), needed)
    const cluster = Buffer.alloc(65536, 1)
    const write = () => image.write(cluster, { position: 0, compressed: true })
    if (can(format, 'compress')) expect(await write()).toMatchObject({ bytesWritten: 65536 })
    else {
      const code = can(format, 'write') ? 'ERR_QCOW2_UNSUPPORTED_FEATURE' : 'ERR_QCOW2_READ_ONLY'
      expect(await failure(write)).toMatchObject({ code })
    }
  })
})

it('no other file tells formats by their names', () => {
  const source = fileURLToPath(new URL('../../src', import.meta.url))
  // The name of one compression is also that of how clusters are compressed.
  const names = ROWS.map(([name]) => name)
    .filter(name => name !== 'zstd')
    .join('|')
  const comparison = new RegExp(`(?:[!=]==? |case )['"](?:${names})['"]|['"](?:${names})['"] [!=]==`)
  const files = readdirSync(source, { recursive: true, encoding: 'utf8' }).filter(file => file.endsWith('.ts'))
  expect(files.filter(file => comparison.test(readFileSync(join(source, file), 'utf8')))).toEqual([])
})

it('names are found', () => {
  expect(['raw', 'file', 'host_device', 'qcow', 'qed', 'toString'].map(formatNamed)).toEqual([
    'raw',
    'raw',
    'raw',
    'qcow',
    undefined,
    undefined,
  ])
  expect(['qcow2', 'qcow', 'qed', 'toString'].map(isKnown)).toEqual([true, true, true, false])
  expect(['qcow2', 'qcow', 'qed', 'toString', undefined].map(isFormat)).toEqual([true, true, false, false, false])
  expect(['qcow2', 'raw', 'qcow', 'qed'].map(isTarget)).toEqual([true, true, true, false])
})

it('names are listed', () => {
  expect([[], ['a'], ['a', 'b'], ['a', 'b', 'c']].map(names => listed(names, 'and'))).toEqual([
    '',
    'a',
    'a and b',
    'a, b and c',
  ])
  expect(quoted(['a', 'b', 'c'])).toBe("'a', 'b' or 'c'")
})
