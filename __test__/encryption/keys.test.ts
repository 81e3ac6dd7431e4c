/** Key slots of encrypted images: what is added here opens in QEMU, what QEMU adds opens here. */

import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { check, create, type Image, inspect, open, Qcow2Error } from '../../dist/index.js'
import { failure, temporaryFolder } from '../api/fixtures.js'
import { describeWithQemu, ok, qemuImg } from '../interop/qemu.js'

const MIB = 1 << 20
const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)

const objects = (...secrets: string[]): string[] =>
  secrets.flatMap((secret, i) => ['--object', `secret,id=s${i},data=${secret}`])
const described = (name: string): string => `driver=qcow2,encrypt.key-secret=s0,file.filename=${at(name)}`

/** Whether QEMU opens the image with a secret. */
const qemuOpens = (name: string, secret: string): boolean =>
  qemuImg('check', ...objects(secret), '--image-opts', described(name)).code === 0

/** Whether it opens here: then its data can be read. */
async function opens(name: string, secret: string): Promise<boolean> {
  try {
    await using image = await open(at(name), { secret })
    const { buffer } = await image.read(Buffer.alloc(512), { position: 0 })
    return buffer.every(byte => byte === 7)
  } catch (error) {
    expect(error).toMatchObject({ code: 'ERR_QCOW2_BAD_SECRET' })
    return false
  }
}

/** Both say the same of each secret. */
async function opening(name: string, secrets: readonly string[]): Promise<boolean[]> {
  const ours = await Promise.all(secrets.map(secret => opens(name, secret)))
  expect(secrets.map(secret => qemuOpens(name, secret))).toEqual(ours)
  return ours
}

async function made(name: string): Promise<Image> {
  const image = await create(at(name), { size: MIB, overwrite: true, encrypt: { secret: 'one', iterTime: 10 } })
  await image.write(Buffer.alloc(512, 7), { position: 0 })
  return image
}

const slotsOf = async (image: Image): Promise<number[]> =>
  (await image.keys.list()).filter(({ active }) => active).map(({ slot }) => slot)

const iterTime = 10

describeWithQemu('key slots', () => {
  it('are added, changed and removed, and QEMU opens with what opens here', async () => {
    await using image = await made('keys.qcow2')
    expect(await image.keys.add({ secret: 'one', newSecret: 'two', iterTime })).toBe(1)
    expect(await image.keys.add({ secret: 'two', newSecret: 'three', slot: 6, iterTime })).toBe(6)
    expect(await slotsOf(image)).toEqual([0, 1, 6])
    await image.close()
    expect(await opening('keys.qcow2', ['one', 'two', 'three', 'four'])).toEqual([true, true, true, false])
    {
      await using again = await open(at('keys.qcow2'), { flags: 'r+', secret: 'three' })
      expect(await again.keys.change({ secret: 'one', newSecret: 'four', iterTime })).toBe(2)
      // Without a secret.
      expect(await again.keys.remove({ slot: 1 })).toEqual([1])
      await again.write(Buffer.alloc(512, 7), { position: 0 })
    }
    expect(await opening('keys.qcow2', ['one', 'two', 'three', 'four'])).toEqual([false, false, true, true])
    expect((await check(at('keys.qcow2'))).ok).toBe(true)
  })

  it('that QEMU adds open here, and those that it removes do not', async () => {
    await (await made('theirs.qcow2')).close()
    const amend = (secrets: readonly string[], options: string) =>
      ok(qemuImg('amend', ...objects(...secrets), '-o', options, '--image-opts', described('theirs.qcow2')))
    amend(['one', 'two'], 'encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=10,encrypt.keyslot=7')
    expect(await opening('theirs.qcow2', ['one', 'two'])).toEqual([true, true])
    amend(['two', 'one'], 'encrypt.state=inactive,encrypt.old-secret=s1')
    expect(await opening('theirs.qcow2', ['one', 'two'])).toEqual([false, true])
    await using image = await open(at('theirs.qcow2'), { flags: 'r+', secret: 'two' })
    expect(await slotsOf(image)).toEqual([7])
    expect(await image.keys.add({ secret: 'two', newSecret: 'three', iterTime })).toBe(0)
  })

  it('without a secret can be listed and removed, and guest data stays closed', async () => {
    await using image = await made('closed.qcow2')
    await image.keys.add({ secret: 'one', newSecret: 'two', iterTime })
    await image.close()
    await using closed = await open(at('closed.qcow2'), { flags: 'r+' })
    expect(await slotsOf(closed)).toEqual([0, 1])
    expect(await closed.keys.remove({ slot: 0 })).toEqual([0])
    expect(await failure(() => closed.read(Buffer.alloc(512), { position: 0 }))).toMatchObject({
      code: 'ERR_QCOW2_BAD_SECRET',
    })
    await closed.close()
    expect(await opening('closed.qcow2', ['one', 'two'])).toEqual([false, true])
  })

  it('say what they cannot do, and change nothing then', async () => {
    await using image = await made('refused.qcow2')
    const { keys } = image
    await keys.add({ secret: 'one', newSecret: 'two', iterTime })
    const before = readFileSync(at('refused.qcow2'))
    const given = { newSecret: 'more', iterTime } as const
    for (const [code, work] of [
      ['ERR_QCOW2_BAD_SECRET', () => keys.add({ ...given, secret: 'wrong' })],
      ['ERR_QCOW2_BAD_SECRET', () => keys.change({ ...given, secret: 'wrong' })],
      ['ERR_QCOW2_BAD_SECRET', () => keys.remove({ secret: 'wrong' })],
      ['ERR_QCOW2_BAD_SECRET', () => keys.remove({ secret: 'two', slot: 0 })],
      ['ERR_QCOW2_INVALID_ARGUMENT', () => keys.add({ ...given, secret: 'one', slot: 1 })],
      ['ERR_QCOW2_INVALID_ARGUMENT', () => keys.add({ ...given, secret: 'one', slot: 8 })],
      ['ERR_QCOW2_INVALID_ARGUMENT', () => keys.remove({ slot: 5 })],
      ['ERR_QCOW2_INVALID_ARGUMENT', () => keys.remove({})],
      ['ENOENT', () => keys.add({ ...given, secret: { file: at('gone') } })],
    ] as const) {
      expect(await failure(work), String(work)).toMatchObject({ code })
    }
    expect(readFileSync(at('refused.qcow2')).equals(before)).toBe(true)
    await keys.remove({ secret: 'one' })
    for (const last of [{ slot: 1 }, { secret: 'two' }]) {
      expect(await failure(() => keys.remove(last))).toMatchObject({ code: 'ERR_QCOW2_DATA_LOSS' })
    }
    for (let count = 1; count < 8; count++) await keys.add({ ...given, secret: 'two' })
    expect(await slotsOf(image)).toEqual([0, 1, 2, 3, 4, 5, 6, 7])
    for (const full of [keys.add({ ...given, secret: 'two' }), keys.change({ ...given, secret: 'two' })]) {
      expect(await failure(() => full)).toMatchObject({ code: 'ERR_QCOW2_LIMIT', field: 'slot' })
    }
    expect(await keys.remove({ secret: 'more' })).toEqual([0, 2, 3, 4, 5, 6, 7])
    expect(await slotsOf(image)).toEqual([1])
  })

  it('give up a slot in use, and the last one, by force', async () => {
    await using image = await made('force.qcow2')
    const { keys } = image
    expect(await keys.add({ secret: 'one', newSecret: 'two', slot: 0, force: true, iterTime })).toBe(0)
    expect(await slotsOf(image)).toEqual([0])
    await image.close()
    expect(await opening('force.qcow2', ['one', 'two'])).toEqual([false, true])
    {
      await using last = await open(at('force.qcow2'), { flags: 'r+', secret: 'two' })
      expect(await last.keys.remove({ slot: 3, force: true })).toEqual([3])
      expect(await last.keys.remove({ secret: 'two', force: true })).toEqual([0])
    }
    expect(await opening('force.qcow2', ['two'])).toEqual([false])
  })

  it('are there once the calls of several at once are done', async () => {
    await using image = await made('many.qcow2')
    const names = ['a', 'b', 'c', 'd']
    const writes = names.map((_, i) => image.write(Buffer.alloc(65_536, i), { position: 65_536 * (i + 1) }))
    const added = names.map(newSecret => image.keys.add({ secret: 'one', newSecret, iterTime }))
    expect((await Promise.all(added)).toSorted()).toEqual([1, 2, 3, 4])
    await Promise.all(writes)
    await image.close()
    expect(await opening('many.qcow2', names)).toEqual([true, true, true, true])
  })

  it('are those of qcow2 with LUKS, open for writing', async () => {
    writeFileSync(at('disk.raw'), Buffer.alloc(512))
    {
      await using plain = await create(at('plain.qcow2'), { size: MIB })
      await using raw = await open(at('disk.raw'), { format: 'raw', flags: 'r+' })
      for (const { keys } of [plain, raw]) {
        const code = 'ERR_QCOW2_UNSUPPORTED_FEATURE'
        expect(await failure(() => keys.list())).toMatchObject({ code })
        expect(await failure(() => keys.remove({ slot: 0 }))).toMatchObject({ code })
      }
    }
    await (await made('read.qcow2')).close()
    await using image = await open(at('read.qcow2'), { secret: 'one' })
    expect(await failure(() => image.keys.remove({ slot: 0, force: true }))).toMatchObject({
      code: 'ERR_QCOW2_READ_ONLY',
    })
  })

  it('stop being derived when their signal says so', async () => {
    await using image = await made('abort.qcow2')
    const before = await image.keys.list()
    const controller = new AbortController()
    const adding = image.keys.add({
      secret: 'one',
      newSecret: 'two',
      iterTime: 60_000,
      signal: controller.signal,
    })
    setTimeout(() => controller.abort(), 20)
    const begun = performance.now()
    expect(await failure(() => adding)).toMatchObject({ name: 'AbortError' })
    expect(performance.now() - begun).toBeLessThan(20_000)
    expect(await image.keys.list()).toEqual(before)
  })

  it('of a header that is damaged are an error of the header', async () => {
    await (await made('damaged.qcow2')).close()
    const bytes = readFileSync(at('damaged.qcow2'))
    bytes.fill(0xff, bytes.indexOf('LUKS'), bytes.indexOf('LUKS') + 8)
    writeFileSync(at('damaged.qcow2'), bytes)
    await using image = await open(at('damaged.qcow2'), { flags: 'r+' })
    const invalid = { code: 'ERR_QCOW2_INVALID_HEADER', path: at('damaged.qcow2') }
    expect(await failure(() => image.keys.list())).toMatchObject(invalid)
    expect(await failure(() => image.keys.remove({ slot: 0 }))).toMatchObject(invalid)
    const { formatSpecific } = await image.info()
    expect(formatSpecific?.encrypt).toEqual({ format: 'luks', damaged: expect.any(Qcow2Error) })
    expect(await inspect(at('damaged.qcow2'))).toMatchObject({
      safe: false,
      findings: [
        { code: 'HEADER_INVALID', message: expect.stringMatching(/^encryption header, 0x[0-9a-f]+: not a LUKS/) },
      ],
    })
  })

  it('that ask for too much are named by an inspection', async () => {
    await (await made('greedy.qcow2')).close()
    expect(await inspect(at('greedy.qcow2'))).toMatchObject({ safe: true, encryption: 'luks' })
    const bytes = readFileSync(at('greedy.qcow2'))
    const luks = bytes.indexOf('LUKS')
    bytes.fill(0xff, luks + 208 + 4, luks + 208 + 8)
    writeFileSync(at('greedy.qcow2'), bytes)
    const place = `encryption header, 0x${(luks + 208).toString(16)}`
    for (const source of [at('greedy.qcow2'), bytes]) {
      expect(await inspect(source)).toMatchObject({
        safe: false,
        findings: [
          {
            code: 'LIMIT',
            message: `${place}: key slot 0 demands 4294967295 iterations, above the limit of 268435456`,
          },
        ],
      })
    }
    const begun = performance.now()
    expect(await failure(() => open(at('greedy.qcow2'), { secret: 'one' }))).toMatchObject({ code: 'ERR_QCOW2_LIMIT' })
    expect(performance.now() - begun).toBeLessThan(5000)
  })
})
