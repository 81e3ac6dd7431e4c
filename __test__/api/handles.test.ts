/** Handles as one meets them: in `console.log`, in a message to another thread, in the compiler. */

import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { getSystemErrorMap, inspect } from 'node:util'
import { MessageChannel } from 'node:worker_threads'
import { create, open, type Qcow2Error, type SparseChunk, serveNbd } from 'qcow2'
import { beforeAll, expect, expectTypeOf, it } from 'vitest'
import { temporaryFolder } from './fixtures.js'

const folder = temporaryFolder()
const path = join(folder, 'disk.qcow2')
const shown = { path, format: 'qcow2', virtualSize: 2 ** 20, clusterSize: 65536, depth: 1 }

beforeAll(async () => {
  await using image = await create(path, { size: 2 ** 20 })
  await image.write(Buffer.alloc(512, 1), { position: 65536 })
})

it('are shown with what they are, and in which state', async () => {
  const image = await open(path, { flags: 'r+' })
  expect(inspect(image)).toBe(`Image ${inspect({ ...shown, readOnly: false, state: 'open' })}`)
  expect(inspect({ a: { b: { image } } })).toContain('[Image]')
  expect(inspect([image.snapshots, image.bitmaps, image.keys])).toContain(`Bitmaps { image: '${path}' }`)
  const server = await serveNbd(image, { host: '127.0.0.1', port: 0 })
  expect(inspect(server)).toMatch(/^NbdServer \{.*port: \d+ \},\s+connections: 0,\s+state: 'open'\s+\}$/s)
  const slow = Promise.all(Array.from({ length: 8 }, () => image.read(Buffer.alloc(2 ** 20), { position: 0 })))
  const closed = image.close()
  expect(inspect(image)).toContain(`state: 'closing'`)
  await Promise.all([slow, closed])
  expect(inspect(image)).toContain(`state: 'closed'`)
  expect(inspect(server)).toContain(`state: 'closed'`)
})

it('are refused by structured cloning, which says why, instead of becoming empty objects', async () => {
  await using image = await open(path)
  await using server = await serveNbd(image, { host: '127.0.0.1', port: 0 })
  const { port1, port2 } = new MessageChannel()
  for (const handle of [image, image.snapshots, image.bitmaps, image.keys, server]) {
    const why = expect.objectContaining({
      name: 'DataCloneError',
      message: expect.stringContaining('stays in its thread'),
    })
    expect(() => port1.postMessage({ handle })).toThrow(why)
    expect(() => structuredClone(handle)).toThrow(why)
  }
  port1.close()
  port2.close()
})

it('have streams that say what they give', async () => {
  await using image = await open(path)
  const stream = image.createReadStream({ sparse: true })
  for await (const chunk of stream) {
    expectTypeOf(chunk).toEqualTypeOf<SparseChunk>()
    expect(chunk).toMatchObject({ position: 65536 })
  }
  expectTypeOf(stream.toArray()).resolves.toEqualTypeOf<SparseChunk[]>()
})

it('name in their errors every code of Node’s, and no other', () => {
  const source = readFileSync('src/errors.ts', 'utf8')
  const named = [...source.matchAll(/^ {2}\| '(E\w+)'$/gm)].map(([, name]) => name)
  const known = [...getSystemErrorMap().values()].map(([name]) => name).filter(name => name.startsWith('E'))
  expect(named).toEqual(expect.arrayContaining(known))
  // @ts-expect-error A misspelt code.
  expectTypeOf<'ENOTDIRECTORY'>().toExtend<Qcow2Error['code']>()
  expectTypeOf<'ENOTDIR' | 'ERR_QCOW2_LIMIT'>().toExtend<Qcow2Error['code']>()
})
