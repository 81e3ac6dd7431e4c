/** QEMU writes, the package reads: the API and the documents of the command line. */

import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { type Image, type MapEntry, open } from 'qcow2'
import { expect, it } from 'vitest'
import { assertSameBytes, describeWithQemu, ok, qcow2, qemuImg, samples } from './qemu.js'

const images = samples()

async function readAll(image: Image): Promise<Buffer> {
  const whole = Buffer.alloc(image.virtualSize, 0xa5)
  expect((await image.read(whole, { position: 0 })).bytesRead).toBe(whole.length)
  return whole
}

/** Deterministic numbers below `bound`. */
function* numbers(bound: number): Generator<number, never> {
  for (let i = 0; ; i++) yield createHash('sha256').update(`${i}`).digest().readUInt32BE() % bound
}

describeWithQemu('an image that QEMU wrote', () => {
  it.each(images)('$name reads as the model says, whole, in pieces at once, and as streams', async sample => {
    const expected = readFileSync(sample.guest)
    await using image = await open(sample.path, { references: 'allow' })
    expect(image.virtualSize).toBe(expected.length)
    assertSameBytes(expected, await readAll(image), 'one read')

    const random = numbers(expected.length)
    const pieces = Array.from({ length: 64 }, async () => {
      const position = random.next().value
      const { buffer, bytesRead } = await image.read(new Uint8Array(random.next().value % 100_000), { position })
      assertSameBytes(expected.subarray(position, position + bytesRead), buffer.subarray(0, bytesRead), 'a piece')
      expect(bytesRead).toBe(Math.min(buffer.length, expected.length - position))
    })
    await Promise.all(pieces)

    const chunks: Buffer[] = []
    for await (const chunk of image.createReadStream({ highWaterMark: 77_777 })) chunks.push(chunk as Buffer)
    assertSameBytes(expected, Buffer.concat(chunks), 'a stream')

    const sparse = Buffer.alloc(expected.length)
    for await (const { position, buffer } of image.createReadStream({ sparse: true })) buffer.copy(sparse, position)
    assertSameBytes(expected, sparse, 'a sparse stream')

    const web: Uint8Array[] = []
    for await (const chunk of image.readableWebStream()) web.push(chunk)
    assertSameBytes(expected, Buffer.concat(web), 'a web stream')
  })

  it.each(images)('$name has snapshots that read as the model says', async sample => {
    for (const { name, guest } of sample.snapshots) {
      await using view = await open(sample.path, { references: 'allow', snapshot: name })
      assertSameBytes(readFileSync(guest), await readAll(view), name)
    }
  })

  it.each(images)('$name is mapped as by qemu-img', async sample => {
    const expected = JSON.parse(ok(qemuImg('map', '-f', 'qcow2', '--output=json', sample.path))) as MapEntry[]
    await using image = await open(sample.path, { references: 'allow' })
    const entries: MapEntry[] = []
    for await (const { filename: _, ...entry } of image.map()) entries.push(entry)
    expect(entries).toEqual(expected)
  })

  it.each(images)('$name is not opened with what it names, unless that is allowed', async sample => {
    const names = /Raw|Qcow2|ext/.test(sample.name)
    const denied = open(sample.path)
    if (names) await expect(denied).rejects.toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    else await (await denied).close()
  })
})

describeWithQemu('the command line prints the documents of qemu-img', () => {
  it.each(images)('map of $name', sample => {
    const args = ['map', '-f', 'qcow2', '--output=json', sample.path]
    expect(ok(qcow2(...args))).toBe(ok(qemuImg(...args)))
  })

  it.each(images)('check of $name', sample => {
    const args = ['check', '-f', 'qcow2', '--output=json', sample.path]
    const [theirs, ours] = [qemuImg(...args), qcow2(...args)]
    expect(JSON.parse(ours.stdout)).toEqual(JSON.parse(theirs.stdout))
    expect(ours.code).toBe(theirs.code)
  })

  it.each(images)('info of $name', sample => {
    const args = ['info', '-f', 'qcow2', '--output=json', sample.path]
    expect(JSON.parse(ok(qcow2(...args)))).toEqual(JSON.parse(ok(qemuImg(...args))))
    const chain = ['info', '-f', 'qcow2', '--backing-chain', '--output=json', sample.path]
    expect(JSON.parse(ok(qcow2(...chain)))).toEqual(JSON.parse(ok(qemuImg(...chain))))
  })

  it.each(images)('measure of $name', sample => {
    for (const target of [
      ['-O', 'qcow2'],
      ['-O', 'raw'],
      ['-O', 'qcow2', '-o', 'cluster_size=4k,refcount_bits=64'],
    ]) {
      const args = ['measure', '--output=json', '-f', 'qcow2', ...target, sample.path]
      expect(JSON.parse(ok(qcow2(...args)))).toEqual(JSON.parse(ok(qemuImg(...args))))
    }
  })

  it.each(images)('compare of $name with its guest bytes, and with one of them changed', sample => {
    const args = ['compare', '-f', 'qcow2', '-F', 'raw', sample.path, sample.guest]
    expect(qcow2(...args)).toEqual(qemuImg(...args))
    const [first] = sample.snapshots
    if (first === undefined) return
    const different = ['compare', '-f', 'qcow2', '-F', 'raw', sample.path, first.guest]
    const theirs = qemuImg(...different)
    expect(theirs.code).toBe(1)
    expect(qcow2(...different)).toEqual(theirs)
  })
})
