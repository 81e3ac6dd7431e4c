import { existsSync, readdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, type Image, type OpenOptions, open, Qcow2Error } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { forge } from './forged.js'

const { folder, images } = forge()

const dataFile = join(folder, 'data.raw')
writeFileSync(dataFile, new Uint8Array(1 << 20))

/** Lets an image have its data file, and nothing else. */
const options: OpenOptions = {
  format: 'qcow2',
  references: reference => (reference.kind === 'data-file' ? dataFile : null),
}

async function read(image: Image, position: number): Promise<void> {
  await image.read(new Uint8Array(512), { position })
}

/** What the image answers at the stage where its lie is told. */
async function provoke(forged: (typeof images)[number]): Promise<void> {
  await using image = await open(forged.path, options)
  if (forged.stage === 'read') await read(image, forged.position ?? 0)
  else await read(image, 0)
  if (forged.stage === 'bitmaps') {
    // The disk does not depend on them: what is wrong is told, not thrown.
    const { damaged = [] } = await image.info()
    if (damaged[0] !== undefined) throw damaged[0]
  }
  if (forged.stage === 'snapshot') {
    await using view = await open(forged.path, { ...options, snapshot: forged.snapshot ?? '' })
    await read(view, 0)
  }
}

async function failure(work: Promise<unknown>): Promise<Qcow2Error> {
  const error: unknown = await work.then(
    () => undefined,
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(Qcow2Error)
  return error as Qcow2Error
}

describe('a broken image', () => {
  it.each(images)('$name is refused with $code', async forged => {
    const error = await failure(provoke(forged))
    expect(error.code).toBe(forged.code)
    expect(error.path).toBe(forged.path)
    expect(error.message.length).toBeGreaterThan(20)
    // The stack leads to the caller, not only into the addon.
    expect(error.stack).toContain('api.test.ts')
  })

  it.each(images)('$name gives a check a result or a coded error', async forged => {
    try {
      const result = await check(forged.path, options)
      expect(result.corruptions + result.leaks + result.checkErrors).toBeGreaterThanOrEqual(0)
    } catch (error) {
      expect(error).toBeInstanceOf(Qcow2Error)
      expect((error as Qcow2Error).code).toMatch(/^ERR_QCOW2_(?!INTERNAL)/)
    }
  })

  it('that is not known to be qcow2 by its magic needs a format', async () => {
    for (const name of ['empty-file', 'zeroes', 'wrong-magic']) {
      const path = join(folder, `${name}.qcow2`)
      expect((await failure(open(path))).code).toBe('ERR_QCOW2_FORMAT_UNKNOWN')
    }
  })

  it.runIf(existsSync('/proc/self/fd'))('leaves no file open', async () => {
    const before = openFiles()
    for (const forged of images) await failure(provoke(forged))
    expect(openFiles()).toBe(before)
  })
})

function openFiles(): number {
  return readdirSync('/proc/self/fd').length
}
