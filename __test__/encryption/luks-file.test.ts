/** LUKS files as images of their own: what QEMU and cryptsetup make is read and changed here, what is made here is read there. */

import { spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, readFileSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import {
  commit,
  compare,
  convert,
  create,
  type ImageSource,
  inspect,
  type MapEntry,
  measure,
  open,
  probe,
  type Secrets,
  type TargetFormat,
} from '../../dist/index.js'
import { failure, pattern, temporaryFolder } from '../api/fixtures.js'
import { describeWithQemu, ok, qemuImg } from '../interop/qemu.js'

const SECRET = 'a secret that is long enough'
const MIB = 1 << 20
const SIZE = 3 * MIB
/** Nothing that repeats or is zero. */
const MARKER = Buffer.from('PLAIN-MARKER-0123456789-abcdefgh')

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
/** Weak derivation: these images hold nothing that is worth a second. */
const encrypt = { secret: SECRET, iterTime: 5 } as const

const object = ['--object', `secret,id=s,data=${SECRET}`]
const described = (name: string): string => `driver=luks,key-secret=s,file.filename=${at(name)}`

/** Data, zeroes, data at the end. */
const disk = Buffer.concat([pattern(0, MIB), Buffer.alloc(MIB), Buffer.alloc(MIB, MARKER)])

/** The disk as qemu-img reads it. */
function theirs(options: string): Buffer {
  ok(qemuImg('convert', ...object, '--image-opts', options, '-O', 'raw', at('theirs.raw')))
  return readFileSync(at('theirs.raw'))
}

async function ours(source: ImageSource, secret: Secrets = SECRET): Promise<Buffer> {
  await using image = await open(source, { secret, references: 'allow' })
  const bytes = Buffer.alloc(image.virtualSize)
  await image.read(bytes, { position: 0 })
  return bytes
}

/** QEMU makes the disk anew, or has made it: that takes it a second. */
function made(name: string, more = ''): void {
  if (more === '' && existsSync(at('first.luks'))) {
    copyFileSync(at('first.luks'), at(name))
    return
  }
  const options = `key-secret=s,iter-time=10${more}`
  ok(qemuImg('convert', ...object, '-f', 'raw', '-O', 'luks', '-o', options, at('disk.raw'), at(name)))
}

const haveCryptsetup = spawnSync('cryptsetup', ['--version']).status === 0
if (!haveCryptsetup && process.env['QCOW2_REQUIRE_QEMU'] === '1') throw new Error('cryptsetup is missing')
if (!haveCryptsetup) console.warn('SKIPPED: cryptsetup is missing')

function cryptsetup(...args: readonly string[]): void {
  const { status, stderr } = spawnSync('cryptsetup', [...args, '--key-file', '-', '-q'], { input: SECRET })
  expect({ status, stderr: status === 0 ? '' : stderr.toString() }).toEqual({ status: 0, stderr: '' })
}

/** Both read the disk, and no plain byte of it is in the file. */
async function holds(name: string, bytes: Buffer): Promise<void> {
  expect((await ours(at(name))).equals(bytes), `${name}: read here`).toBe(true)
  expect(theirs(described(name)).equals(bytes), `${name}: read by qemu-img`).toBe(true)
  expect(readFileSync(at(name)).includes(MARKER), `${name}: a plain marker`).toBe(false)
}

describeWithQemu('LUKS files', () => {
  beforeAll(() => {
    writeFileSync(at('disk.raw'), disk)
    made('first.luks')
  })

  it('reads what QEMU wrote, and QEMU what is written into it', async () => {
    made('theirs.luks')
    await holds('theirs.luks', disk)
    const changed = Buffer.from(disk)
    {
      await using image = await open(at('theirs.luks'), { flags: 'r+', secret: SECRET })
      const bytes = Buffer.alloc(100_000, MARKER)
      bytes.copy(changed, 700)
      await image.write(bytes, { position: 700 })
      changed.fill(0, 2 * MIB + 5, 2 * MIB + 70_000)
      await image.writeZeroes(2 * MIB + 5, 70_000 - 5)
      await image.discard(0, 4096)
      await image.sync()
      // What was not written is zero, as in every format.
      await image.truncate(SIZE + 512 * 3)
    }
    await holds('theirs.luks', Buffer.concat([changed, Buffer.alloc(512 * 3)]))
    {
      await using image = await open(at('theirs.luks'), { flags: 'r+', secret: SECRET })
      await image.truncate(MIB, { shrink: true })
    }
    await holds('theirs.luks', changed.subarray(0, MIB))
  })

  it('changes its key slots while it is in use, as QEMU and cryptsetup see them', async () => {
    made('keys.luks')
    const iterTime = 5
    {
      await using image = await open(at('keys.luks'), { flags: 'r+', secret: SECRET })
      expect(await image.keys.add({ secret: SECRET, newSecret: 'second', slot: 4, iterTime })).toBe(4)
      await image.write(Buffer.alloc(MIB, 9), { position: 0 })
      expect(await image.keys.change({ secret: SECRET, newSecret: 'third', iterTime })).toBe(1)
      expect((await image.keys.list()).filter(({ active }) => active).map(({ slot }) => slot)).toEqual([1, 4])
      expect(await failure(() => image.keys.add({ secret: SECRET, newSecret: 'no', iterTime }))).toMatchObject({
        code: 'ERR_QCOW2_BAD_SECRET',
      })
      expect(await image.keys.remove({ secret: 'second' })).toEqual([4])
      expect(await failure(() => image.keys.remove({ slot: 1 }))).toMatchObject({ code: 'ERR_QCOW2_DATA_LOSS' })
    }
    expect(await failure(() => open(at('keys.luks'), { secret: SECRET }))).toMatchObject({
      code: 'ERR_QCOW2_BAD_SECRET',
    })
    const third = ['--object', 'secret,id=s,data=third']
    ok(qemuImg('convert', ...third, '--image-opts', described('keys.luks'), '-O', 'raw', at('third.raw')))
    expect(readFileSync(at('third.raw')).equals(await ours(at('keys.luks'), 'third'))).toBe(true)
    await using closed = await open(at('keys.luks'), { secret: 'third' })
    expect(await failure(() => closed.keys.add({ secret: 'third', newSecret: 'no', iterTime }))).toMatchObject({
      code: 'ERR_QCOW2_READ_ONLY',
    })
  })

  it('looks at one without its secret, and says what is so', async () => {
    made('closed.luks', ',cipher-alg=serpent-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512')
    const info = JSON.parse(ok(qemuImg('info', '--output=json', at('closed.luks'))))['format-specific'].data
    expect(await probe(at('closed.luks'))).toBe('luks')
    await using image = await open(at('closed.luks'))
    expect(image.virtualSize).toBe(SIZE)
    const { luks, encrypted, format, clusterSize } = await image.info()
    expect({ encrypted, format, clusterSize }).toEqual({ encrypted: true, format: 'luks', clusterSize: undefined })
    expect(luks).toMatchObject({
      version: 1,
      detachedHeader: false,
      cipherAlg: 'serpent-256',
      cipherMode: 'cbc',
      ivgenAlg: 'essiv',
      ivgenHashAlg: 'sha256',
      hashAlg: 'sha512',
      uuid: info.uuid,
      payloadOffset: info['payload-offset'],
      masterKeyIters: info['master-key-iters'],
      sectorSize: 512,
    })
    expect(luks?.slots.map(({ active, keyOffset }) => ({ active, 'key-offset': keyOffset }))).toEqual(
      info.slots.map((slot: Record<string, unknown>) => ({ active: slot['active'], 'key-offset': slot['key-offset'] })),
    )
    expect(await failure(() => image.read(Buffer.alloc(512), { position: 0 }))).toMatchObject({
      code: 'ERR_QCOW2_BAD_SECRET',
      field: 'secret',
      path: at('closed.luks'),
    })
    for (const secret of ['wrong', { file: at('disk.raw') }]) {
      expect(await failure(() => open(at('closed.luks'), { secret }))).toMatchObject({ code: 'ERR_QCOW2_BAD_SECRET' })
    }
    await image.close()
    expect(await failure(() => open(at('closed.luks'), { flags: 'r+' }))).toMatchObject({
      code: 'ERR_QCOW2_BAD_SECRET',
    })
    expect(await inspect(at('closed.luks'))).toMatchObject({
      format: 'luks',
      virtualSize: SIZE,
      encryption: 'luks',
      safe: true,
      findings: [],
    })
    expect(await inspect(readFileSync(at('closed.luks')).subarray(0, 1024))).toMatchObject({
      format: 'luks',
      virtualSize: 0,
    })
  })

  it.each([
    {},
    { cipherAlg: 'aes-128', cipherMode: 'cbc', ivgenAlg: 'essiv' },
    { cipherAlg: 'twofish-256', hashAlg: 'sha512' },
  ] as const)('makes one, %j', async options => {
    const create = { encrypt: { ...encrypt, ...options } }
    await convert(at('disk.raw'), at('made.luks'), { from: 'raw', to: 'luks', create, overwrite: true })
    await holds('made.luks', disk)
    expect(existsSync(at('made.luks'))).toBe(true)
    const info = JSON.parse(ok(qemuImg('info', '--output=json', at('made.luks'))))
    expect(info['virtual-size']).toBe(SIZE)
    // What it tries needs the kernel's cipher.
    if (haveCryptsetup && !('cipherAlg' in options)) cryptsetup('open', '--test-passphrase', at('made.luks'))
  })

  it('creates one for a guest', async () => {
    for (const preallocation of ['off', 'metadata', 'falloc', 'full'] as const) {
      const name = `${preallocation}.luks`
      await using image = await create(at(name), { format: 'luks', size: SIZE, encrypt, preallocation })
      for (let position = 0; position < SIZE; position += MIB) {
        await image.write(disk.subarray(position, position + MIB), { position })
      }
      await image.close()
      await holds(name, disk)
    }
    // @ts-expect-error: the option is missing
    expect(await failure(() => create(at('no.luks'), { format: 'luks', size: SIZE }))).toMatchObject({
      field: 'encrypt',
    })
    const options = { format: 'luks', size: 2 ** 53 - 1, encrypt } as const
    expect((await failure(() => create(at('no.luks'), options))).code).toMatch(/EFBIG|ERR_QCOW2_LIMIT/)
    expect(existsSync(at('no.luks'))).toBe(false)
  })

  it.each(['qcow2', 'raw', 'luks'] as const satisfies readonly TargetFormat[])('is copied to %s and back', async to => {
    made('source.luks')
    const shape = to === 'raw' ? {} : { create: { encrypt } }
    await convert(at('source.luks'), at('copy'), { to, secret: SECRET, ...shape, overwrite: true })
    const formats = { formatA: 'luks', formatB: to, secretA: SECRET, secretB: SECRET } as const
    expect(await compare(at('source.luks'), at('copy'), formats)).toMatchObject({ identical: true })
    // Into one that exists and holds something else.
    made('onto.luks')
    {
      await using image = await open(at('onto.luks'), { flags: 'r+', secret: SECRET })
      await image.write(Buffer.alloc(SIZE, 9), { position: 0 })
    }
    await convert(at('copy'), at('onto.luks'), { from: to, to: 'luks', secret: SECRET, existingTarget: true })
    await holds('onto.luks', disk)
  })

  it('is no image until it is complete, and nothing is left of a failure', async () => {
    made('source.luks')
    truncateSync(at('source.luks'), 100_000)
    expect(await failure(() => open(at('source.luks')))).toMatchObject({ code: 'ERR_QCOW2_CORRUPT' })
    made('locked.luks')
    const attempt = () => convert(at('locked.luks'), at('none.luks'), { to: 'luks', create: { encrypt } })
    expect(await failure(attempt)).toMatchObject({ code: 'ERR_QCOW2_BAD_SECRET' })
    expect(existsSync(at('none.luks'))).toBe(false)
    const refused = [
      { to: 'luks', create: { encrypt }, compress: true },
      { to: 'luks', create: { encrypt, clusterSize: 4096 } },
      { to: 'luks', create: { encrypt: { ...encrypt, cipherMode: 'ctr' } } },
      { to: 'luks' },
    ] as const
    for (const options of refused) {
      const call = () => convert(at('disk.raw'), at('none.luks'), { from: 'raw', ...options })
      expect(await failure(call)).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    }
  })

  it('lies below an overlay, and takes what is committed', async () => {
    made('base.luks')
    const overlay = { backingFile: 'base.luks', backingFormat: 'luks', secret: SECRET, size: SIZE + MIB } as const
    {
      await using top = await create(at('top.qcow2'), overlay)
      await top.write(Buffer.alloc(5000, 3), { position: 1000 })
    }
    const expected = Buffer.concat([disk, Buffer.alloc(MIB)])
    expected.fill(3, 1000, 6000)
    expect((await ours(at('top.qcow2'))).equals(expected)).toBe(true)
    const options = `driver=qcow2,file.filename=${at('top.qcow2')},backing.driver=luks,backing.key-secret=s,backing.file.filename=${at('base.luks')}`
    expect(theirs(options).equals(expected)).toBe(true)
    await commit(at('top.qcow2'), { secret: SECRET, references: 'allow' })
    await holds('base.luks', expected)
  })

  it('gets an overlay while it is in use', async () => {
    made('running.luks')
    const expected = Buffer.concat([Buffer.alloc(5000, 3), disk.subarray(5000)])
    await using image = await open(at('running.luks'), { flags: 'r+', secret: SECRET })
    await image.createOverlay(at('running.qcow2'))
    await image.write(expected.subarray(0, 5000), { position: 0 })
    await image.close()
    await holds('running.luks', disk)
    expect((await ours(at('running.qcow2'))).equals(expected)).toBe(true)
  })

  it('is cloned to while it is in use', async () => {
    made('live.luks')
    await using image = await open(at('live.luks'), { flags: 'r+', secret: SECRET })
    await image.clone(at('clone.luks'), { to: 'luks', create: { encrypt } })
    await holds('clone.luks', disk)
  })

  it('is as large as was measured', async () => {
    const options = { to: 'luks', create: { encrypt } } as const
    const { bytesRead } = await convert(at('disk.raw'), at('measured.luks'), { from: 'raw', ...options })
    expect(bytesRead).toBeGreaterThan(0)
    const size = statSync(at('measured.luks')).size
    expect(await measure({ size: SIZE }, options)).toEqual({ required: size, fullyAllocated: size })
    expect(await measure(at('disk.raw'), { from: 'raw', ...options })).toEqual({ required: size, fullyAllocated: size })
  })

  it('has extents that are all data', async () => {
    made('sparse.luks')
    await using image = await open(at('sparse.luks'), { secret: SECRET })
    const extents: MapEntry[] = []
    for await (const extent of image.map()) extents.push(extent)
    expect(extents).toMatchObject([{ start: 0, length: SIZE, zero: false, data: true }])
  })
})

describe.skipIf(!haveCryptsetup)('what cryptsetup makes', () => {
  const pbkdf2 = ['--pbkdf', 'pbkdf2', '--pbkdf-force-iterations', '1000']
  const argon2 = ['--pbkdf', 'argon2id', '--pbkdf-memory', '65536', '--pbkdf-force-iterations', '4']

  it('version 2 is read and written', async () => {
    writeFileSync(at('two.luks'), Buffer.alloc(16 * MIB + SIZE))
    cryptsetup('luksFormat', '--type', 'luks2', '--sector-size', '4096', ...argon2, at('two.luks'))
    {
      await using image = await open(at('two.luks'), { flags: 'r+', secret: SECRET })
      expect((await image.info()).luks).toMatchObject({ version: 2, sectorSize: 4096, slots: [{ slot: 0 }] })
      await image.write(disk, { position: 0 })
    }
    expect((await ours(at('two.luks'))).equals(disk)).toBe(true)
    expect(readFileSync(at('two.luks')).includes(MARKER)).toBe(false)
    cryptsetup('open', '--test-passphrase', at('two.luks'))
    await convert(at('two.luks'), at('two.raw'), { to: 'raw', secret: SECRET })
    expect(readFileSync(at('two.raw')).equals(disk)).toBe(true)
  })

  it.each(['luks1', 'luks2'])('a header in a file of its own: %s', async version => {
    const [file, header] = [at(`${version}.data`), at(`${version}.header`)]
    writeFileSync(file, Buffer.alloc(SIZE, 7))
    const cost = version === 'luks1' ? pbkdf2.slice(2) : pbkdf2
    cryptsetup('luksFormat', '--type', version, ...cost, '--header', header, file)
    {
      await using image = await open({ file, header }, { flags: 'r+', secret: SECRET })
      expect((await image.info()).luks).toMatchObject({ detachedHeader: true, payloadOffset: 0 })
      await image.write(disk, { position: 0 })
    }
    expect((await ours({ file, header })).equals(disk)).toBe(true)
    await convert({ file, header }, at('attached.luks'), {
      to: 'luks',
      secret: SECRET,
      create: { encrypt },
      overwrite: true,
    })
    await holds('attached.luks', disk)
    // Neither file may become the target.
    for (const target of [file, header]) {
      const call = () => convert({ file, header }, target, { to: 'raw', secret: SECRET, overwrite: true })
      expect(await failure(call)).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    }
    expect(await failure(() => open({ file, header }, { format: 'qcow2' }))).toMatchObject({ field: 'header' })
    expect(await failure(() => open(header, { secret: SECRET }))).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
      field: 'payload-offset',
    })
    copyFileSync(file, at('same'))
    expect(await failure(() => open({ file: at('same'), header: at('same') }))).toMatchObject({
      code: 'ERR_QCOW2_CHAIN',
    })
  })
})
