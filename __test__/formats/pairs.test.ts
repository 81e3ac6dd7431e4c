/** Every format becomes every other one, in both directions, with the same disk in it; QEMU reads what is written. */

import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { type ConvertOptions, check, compare, convert, create, open } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { can, creationOf, TARGET_FORMATS, type TargetFormat } from '../../src/formats/table.js'
import { failure } from '../api/fixtures.js'
import { execute, haveQemu, workspace } from '../cli/run.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const SECRET = 'hunter2'

/** Data, a hole, zeroes as data, and an end that is no multiple of a megabyte. */
const SIZE = 5 * 2 ** 20 + 1536
const DISK = Buffer.alloc(SIZE)
for (let at = 100_000; at < 900_000; at++) DISK[at] = (at * 31) & 0xff
DISK.fill(9, SIZE - 700)

/** The size of a VHD is that of a geometry unless it is forced; a small cluster meets more of a table. */
const SHAPES: Readonly<Partial<Record<TargetFormat, object>>> = {
  luks: { encrypt: { secret: SECRET, iterTime: 1 } },
  vpc: { forceSize: true },
  parallels: { clusterSize: 65536 },
}
const shaped = (to: TargetFormat) => ({ create: SHAPES[to] }) as Pick<ConvertOptions, 'create'>
const secret = (format: TargetFormat) => (creationOf(format).needs === 'encrypt' ? { secret: SECRET } : {})

/** The bytes of a disk; some formats round its size up. */
function holdsDisk(path: string): void {
  const bytes = readFileSync(path)
  expect(bytes.subarray(0, SIZE).equals(DISK)).toBe(true)
  expect(bytes.subarray(SIZE).every(byte => byte === 0)).toBe(true)
}

beforeAll(async () => {
  writeFileSync(at('disk.raw'), DISK)
  for (const to of TARGET_FORMATS) {
    await convert(at('disk.raw'), at(`from.${to}`), { from: 'raw', to, ...shaped(to) })
  }
})

describe.each(TARGET_FORMATS)('%s', from => {
  it.each(TARGET_FORMATS)('becomes %s', async to => {
    const target = at(`${from}-to.${to}`)
    await convert(at(`from.${from}`), target, { from, to, ...secret(from), ...shaped(to) })
    const same = await compare(target, at('disk.raw'), {
      formatA: to,
      formatB: 'raw',
      ...(creationOf(to).needs === 'encrypt' && { secretA: SECRET }),
    })
    expect(same).toMatchObject({ identical: true })
    if (can(to, 'check')) expect(await check(target)).toMatchObject({ ok: true })
    rmSync(target)
  })

  it.skipIf(!haveQemu)('is read by QEMU, and what QEMU makes of it is read here', async () => {
    const named = (name: string) =>
      creationOf(from).needs === 'encrypt'
        ? [
            '--object',
            `secret,id=s,data=${SECRET}`,
            '--image-opts',
            `driver=${from},key-secret=s,file.filename=${name}`,
          ]
        : ['-f', from, name]
    expect(
      await execute('qemu-img', ['convert', ...named(`from.${from}`), '-O', 'raw', 'back.raw'], folder),
    ).toMatchObject({
      code: 0,
      stderr: '',
    })
    holdsDisk(at('back.raw'))
    if (creationOf(from).needs === 'encrypt') return
    await execute('qemu-img', ['convert', '-f', 'raw', '-O', from, 'disk.raw', `theirs.${from}`], folder)
    await convert(at(`theirs.${from}`), at('back.raw'), { from, to: 'raw', overwrite: true })
    holdsDisk(at('back.raw'))
  })
})

const isWritten = (format: TargetFormat): boolean => can(format, 'write')

describe.each(TARGET_FORMATS.filter(format => !isWritten(format)))('%s', from => {
  it('is written once', async () => {
    const image = await create(at(`once.${from}`), { format: from, size: 512 } as Parameters<typeof create>[1])
    const error = await failure(() => image.write(Buffer.alloc(512), { position: 0 }))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
    const clone = await failure(() => image.clone(at(`clone.${from}`), { to: from }))
    expect(clone).toMatchObject({
      code: 'ERR_QCOW2_UNSUPPORTED_FEATURE',
      message: expect.stringContaining('written once'),
    })
    expect(existsSync(at(`clone.${from}`))).toBe(false)
    await image.close()
  })
})

describe.each(TARGET_FORMATS.filter(isWritten))('%s', from => {
  it('takes writes when it is new', async () => {
    const path = at(`written.${from}`)
    const image = await create(path, { format: from, size: 2 ** 20, ...SHAPES[from] } as Parameters<typeof create>[1])
    await image.write(Buffer.alloc(5000, 3), { position: 70_000 })
    await image.close()
    await using again = await open(path, { format: from, ...secret(from) })
    const read = Buffer.alloc(5000)
    await again.read(read, { position: 70_000 })
    expect(read.equals(Buffer.alloc(5000, 3))).toBe(true)
  })
})
