/** Every method of an image in every state of its handle. */

import { once } from 'node:events'
import { readdirSync, readlinkSync } from 'node:fs'
import { join } from 'node:path'
import { buffer as collect } from 'node:stream/consumers'
import { create, Image, open } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { failure, openRaw, pattern, temporaryFolder, writeRaw } from '../api/fixtures.js'

const folder = temporaryFolder()
const SIZE = 1 << 20
let raw = ''
let qcow2 = ''

beforeAll(async () => {
  raw = writeRaw(join(folder, 'disk.raw'), SIZE, [[0, SIZE]])
  qcow2 = join(folder, 'disk.qcow2')
  await (await create(qcow2, { size: SIZE })).close()
})

/** What each method gives on the raw disk, or on the empty qcow2 image where the raw one has nothing to say. */
const methods: Record<string, { of?: 'qcow2'; call: (image: Image) => Promise<unknown>; gives: unknown }> = {
  read: {
    call: async image => (await image.read(Buffer.alloc(16), { position: 512 })).buffer,
    gives: pattern(512, 16),
  },
  readv: {
    call: async image => Buffer.concat((await image.readv([Buffer.alloc(3), Buffer.alloc(5)], 512)).buffers),
    gives: pattern(512, 8),
  },
  info: { call: async image => (await image.info()).virtualSize, gives: SIZE },
  chain: { call: async image => (await image.chain()).length, gives: 1 },
  map: {
    call: async image => {
      let length = 0
      for await (const entry of image.map()) length += entry.length
      return length
    },
    gives: SIZE,
  },
  check: { of: 'qcow2', call: async image => (await image.check()).ok, gives: true },
  createReadStream: {
    call: image => collect(image.createReadStream({ start: 1024, end: 2047 })),
    gives: pattern(1024, 1024),
  },
  readableWebStream: {
    call: image => collect(image.readableWebStream({ start: 1024, end: 2047 })),
    gives: pattern(1024, 1024),
  },
}

const openFor = (of: 'qcow2' | undefined): Promise<Image> => (of === 'qcow2' ? open(qcow2) : openRaw(raw))

/** A request that is under way: its promise is made, and cannot have settled yet. */
const busy = (image: Image): Promise<{ bytesRead: number }> => image.read(Buffer.alloc(SIZE), { position: 0 })

describe.each(Object.entries(methods))('%s', (_, { of, call, gives }) => {
  it('works on an open image', async () => {
    await using image = await openFor(of)
    expect(await call(image)).toEqual(gives)
    expect(image.closed).toBe(false)
  })

  it('works while other requests are under way', async () => {
    await using image = await openFor(of)
    const others = [busy(image), busy(image)]
    expect(await call(image)).toEqual(gives)
    for (const { bytesRead } of await Promise.all(others)) expect(bytesRead).toBe(SIZE)
  })

  it('rejects while the image closes, and what was under way finishes', async () => {
    const image = await openFor(of)
    const other = busy(image)
    const closing = image.close()
    expect(image.closed).toBe(true)
    expect((await failure(() => call(image))).code).toBe('ERR_QCOW2_CLOSED')
    expect((await other).bytesRead).toBe(SIZE)
    await closing
  })

  it('rejects on a closed image, and names the file', async () => {
    const image = await openFor(of)
    await image.close()
    const error = await failure(() => call(image))
    expect(error.code).toBe('ERR_QCOW2_CLOSED')
    expect(error.message).toContain(of === 'qcow2' ? qcow2 : raw)
  })
})

describe('close', () => {
  it('can be called again and again, also while it runs', async () => {
    const image = await openRaw(raw)
    const other = busy(image)
    const first = image.close()
    await Promise.all([first, image.close(), image[Symbol.asyncDispose]()])
    await image.close()
    expect((await other).bytesRead).toBe(SIZE)
  })

  it('waits for requests that are under way', async () => {
    const image = await openRaw(raw)
    const order: string[] = []
    const reads = Array.from({ length: 20 }, () => busy(image).then(() => order.push('read')))
    await image.close().then(() => order.push('close'))
    await Promise.all(reads)
    expect(order.at(-1)).toBe('close')
    expect(order).toHaveLength(21)
  })

  it('keeps the properties of the image', async () => {
    const image = await openRaw(raw)
    await image.close()
    expect([image.virtualSize, image.readOnly, image.depth]).toEqual([SIZE, true, 1])
  })

  it('ends a map at its next step, and a stream with an error', async () => {
    const image = await openRaw(raw)
    const map = image.map()
    await image.close()
    expect((await failure(() => map.next())).code).toBe('ERR_QCOW2_CLOSED')
    const stream = image.createReadStream()
    const [error] = await once(stream.resume(), 'error').catch(reason => [reason])
    expect(error).toMatchObject({ code: 'ERR_QCOW2_CLOSED' })
  })

  it.skipIf(process.platform !== 'linux')('closes the files', async () => {
    const open = (): number =>
      readdirSync('/proc/self/fd').filter(fd => {
        try {
          return readlinkSync(`/proc/self/fd/${fd}`) === raw
        } catch {
          return false
        }
      }).length
    const image = await openRaw(raw)
    expect(open()).toBe(1)
    await image.close()
    expect(open()).toBe(0)
  })
})

it('an image is not made by its constructor', () => {
  expect(() => Reflect.construct(Image, [])).toThrow(expect.objectContaining({ code: 'ERR_QCOW2_INVALID_ARGUMENT' }))
})
