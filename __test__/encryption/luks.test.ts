/** Encrypted qcow2 images: what QEMU makes is read and changed here, what is made here is read and checked there. */

import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { inspect as show } from 'node:util'
import { expect, it } from 'vitest'
import {
  check,
  commit,
  compact,
  compare,
  convert,
  create,
  type EncryptedLayer,
  type Image,
  inspect,
  open,
  rebase,
  type Secrets,
} from '../../dist/index.js'
import { failure, pattern, temporaryFolder } from '../api/fixtures.js'
import { describeWithQemu, ok, qemuImg, qemuIo } from '../interop/qemu.js'

const SECRET = 'a secret that is long enough'
const MIB = 1 << 20
/** Nothing that compresses, repeats or is zero. */
const MARKER = Buffer.from('PLAIN-MARKER-0123456789-abcdefgh')
const marked = (length: number): Buffer => Buffer.alloc(length, MARKER)

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
/** Weak derivation: these images hold nothing that is worth a second. */
const encrypt = { secret: SECRET, iterTime: 5 } as const

const object = (secret = SECRET, id = 's'): string[] => ['--object', `secret,id=${id},data=${secret}`]
const described = (name: string, more = ''): string =>
  `driver=qcow2,encrypt.key-secret=s,file.filename=${at(name)}${more}`

/** The disk as qemu-img reads it. */
function theirs(options: string, secrets: readonly string[] = object()): Buffer {
  const target = at('theirs.raw')
  ok(qemuImg('convert', ...secrets, '--image-opts', options, '-O', 'raw', target))
  return readFileSync(target)
}

async function ours(path: string, secret: Secrets = SECRET): Promise<Buffer> {
  await using image = await open(path, { secret, references: 'allow' })
  const bytes = Buffer.alloc(image.virtualSize)
  await image.read(bytes, { position: 0 })
  return bytes
}

/** Both read the same, QEMU finds nothing wrong, and no plain byte of the marker is in the file. */
async function holds(name: string, disk: Buffer): Promise<void> {
  expect((await ours(at(name))).equals(disk), `${name}: read here`).toBe(true)
  ok(qemuImg('check', ...object(), '--image-opts', described(name)))
  expect(theirs(described(name)).equals(disk), `${name}: read by qemu-img`).toBe(true)
  expect((await check(at(name))).corruptions).toBe(0)
  expect(readFileSync(at(name)).includes(MARKER), `${name}: a plain marker`).toBe(false)
}

function made(name: string, size: string, more = ''): void {
  const options = `encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10${more}`
  ok(qemuImg('create', '-q', ...object(), '-f', 'qcow2', '-o', options, at(name), size))
}

const put = (image: Image, bytes: Buffer, position: number, disk: Buffer): Promise<unknown> => {
  bytes.copy(disk, position)
  return image.write(bytes, { position })
}

describeWithQemu('LUKS in qcow2', () => {
  it('reads what QEMU wrote, and QEMU what is written into it', async () => {
    made('theirs.qcow2', '8M')
    const writes = ['write -P 7 0 1M', 'write -P 9 3M 70k', 'write -z 100k 30k', 'write -P 3 8388096 512']
    ok(qemuIo(...object(), ...writes.flatMap(each => ['-c', each]), '--image-opts', described('theirs.qcow2')))
    const disk = theirs(described('theirs.qcow2'))
    expect((await ours(at('theirs.qcow2'))).equals(disk)).toBe(true)
    {
      await using image = await open(at('theirs.qcow2'), { flags: 'r+', secret: SECRET })
      await put(image, marked(100_000), 2 * MIB + 700, disk)
      await put(image, marked(3), 5, disk)
      await image.writeZeroes(4096, 5000)
      disk.fill(0, 4096, 9096)
    }
    await holds('theirs.qcow2', disk)
  })

  it.each([
    {},
    { clusterSize: 512 },
    { clusterSize: 2 * MIB },
    { version: 2 },
    { extendedL2: true },
    { preallocation: 'metadata' },
    { preallocation: 'falloc' },
    { preallocation: 'full' },
  ] as const)('makes, grows, snapshots and compacts %j', async shape => {
    const name = 'ours.qcow2'
    const disk = Buffer.alloc(6 * MIB)
    {
      await using image = await create(at(name), { ...shape, size: 4 * MIB, encrypt, overwrite: true })
      await put(image, marked(70_000), 0, disk)
      await put(image, marked(1000), 3 * MIB + 300, disk)
      await image.snapshots.create('before')
      await put(image, pattern(0, 5000), 1000, disk)
      await put(image, marked(65_536), 65_536, disk)
      if (!('version' in shape)) {
        await image.truncate(6 * MIB)
        await put(image, marked(5000), 5 * MIB, disk)
      }
    }
    const end = 'version' in shape ? disk.subarray(0, 4 * MIB) : disk
    await holds(name, end)
    await compact(at(name), { mode: 'rewrite', zeroes: true, secret: SECRET })
    await holds(name, end)
    await using before = await open(at(name), { secret: SECRET, snapshot: 'before' })
    const bytes = Buffer.alloc(70_000)
    await before.read(bytes, { position: 0 })
    expect(bytes.equals(marked(70_000))).toBe(true)
  })

  it('refuses what is weak unless it is asked for', async () => {
    const weak = { ...encrypt, cipherMode: 'cbc', ivgenAlg: 'plain64' } as const
    expect(await failure(() => create(at('weak.qcow2'), { size: MIB, encrypt: weak }))).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
      field: 'cipher-mode',
    })
    await using made = await create(at('weak.qcow2'), { size: MIB, encrypt: { ...weak, allowWeak: true } })
    expect((await made.info()).encrypted).toBe(true)
  })

  it('converts to and from every shape', async () => {
    const disk = Buffer.alloc(3 * MIB)
    marked(MIB).copy(disk, 512)
    writeFileSync(at('plain.raw'), disk)
    await convert(at('plain.raw'), at('a.qcow2'), { from: 'raw', to: 'qcow2', create: { encrypt } })
    await holds('a.qcow2', disk)
    const create = { encrypt: { ...encrypt, cipherAlg: 'aes-128', hashAlg: 'sha512' }, clusterSize: 4096 } as const
    await convert(at('a.qcow2'), at('b.qcow2'), { to: 'qcow2', secret: SECRET, create })
    await holds('b.qcow2', disk)
    await convert(at('b.qcow2'), at('back.raw'), { to: 'raw', secret: SECRET })
    expect(readFileSync(at('back.raw')).equals(disk)).toBe(true)
    const compared = await compare(at('a.qcow2'), at('b.qcow2'), { secretA: SECRET, secretB: SECRET })
    expect(compared.identical).toBe(true)
    await convert(at('plain.raw'), at('b.qcow2'), { from: 'raw', to: 'qcow2', secret: SECRET, existingTarget: true })
    await holds('b.qcow2', disk)
    const compressed = { from: 'raw', to: 'qcow2', compress: true, create: { encrypt } } as const
    expect(await failure(() => convert(at('plain.raw'), at('c.qcow2'), compressed))).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
      field: 'compress',
    })
  })

  it.each([
    ['aes-128', 'cbc', 'essiv', 'sha1'],
    ['serpent-256', 'xts', 'plain64', 'sha256'],
    ['serpent-128', 'cbc', 'essiv', 'ripemd160'],
    ['twofish-256', 'xts', 'plain64', 'sha384'],
  ] as const)('takes %s-%s-%s with %s from QEMU and gives it', async (cipherAlg, cipherMode, ivgenAlg, hashAlg) => {
    const names = { cipherAlg, cipherMode, ivgenAlg, hashAlg, ivgenHashAlg: 'sha256' } as const
    const disk = Buffer.alloc(MIB)
    {
      await using image = await create(at('given.qcow2'), {
        size: MIB,
        overwrite: true,
        encrypt: { ...encrypt, ...names, allowWeak: true },
      })
      await put(image, marked(200_000), 65_000, disk)
    }
    await holds('given.qcow2', disk)
    const essiv = ivgenAlg === 'essiv' ? ',encrypt.ivgen-hash-alg=sha256' : ''
    made(
      'taken.qcow2',
      '1M',
      `,encrypt.cipher-alg=${cipherAlg},encrypt.cipher-mode=${cipherMode},encrypt.ivgen-alg=${ivgenAlg}` +
        `,encrypt.hash-alg=${hashAlg}${essiv}`,
    )
    ok(qemuIo(...object(), '-c', 'write -P 5 100k 70k', '--image-opts', described('taken.qcow2')))
    const read = await ours(at('taken.qcow2'))
    expect(read.equals(theirs(described('taken.qcow2')))).toBe(true)
  })

  it('keeps guest data in an external data file encrypted as well', async () => {
    const disk = Buffer.alloc(2 * MIB)
    {
      await using image = await create(at('data.qcow2'), { size: 2 * MIB, encrypt, dataFile: at('data.raw') })
      await put(image, marked(300_000), 70_000, disk)
    }
    expect(theirs(described('data.qcow2')).equals(disk)).toBe(true)
    expect((await ours(at('data.qcow2'))).equals(disk)).toBe(true)
    expect(readFileSync(at('data.raw')).includes(MARKER)).toBe(false)
  })

  it('opens each layer of a chain with its own secret, and commits and rebases between them', async () => {
    const disk = Buffer.alloc(2 * MIB)
    {
      await using base = await create(at('base.qcow2'), {
        size: 2 * MIB,
        encrypt: { ...encrypt, secret: 'of the base' },
      })
      await put(base, marked(150_000), 0, disk)
    }
    const asked: EncryptedLayer[] = []
    const secret: Secrets = layer => {
      asked.push(layer)
      return layer.path === at('base.qcow2') ? 'of the base' : SECRET
    }
    await using top = await create(at('top.qcow2'), {
      backingFile: 'base.qcow2',
      backingFormat: 'qcow2',
      encrypt,
      secret,
      references: 'allow',
    })
    await top.close()
    {
      await using image = await open(at('top.qcow2'), { flags: 'r+', secret, references: 'allow' })
      await put(image, marked(10), 100_001, disk)
      await put(image, marked(5000), MIB, disk)
      await image.clone(at('copy.qcow2'), { to: 'qcow2', create: { encrypt } })
      await image.createOverlay(at('upper.qcow2'), { create: { encrypt } })
      await put(image, marked(7), 20, disk)
    }
    expect(asked.map(({ depth, encryption }) => [depth, encryption])).toEqual([
      [1, 'luks'],
      [0, 'luks'],
      [1, 'luks'],
    ])
    expect((await ours(at('upper.qcow2'), secret)).equals(disk)).toBe(true)
    await commit(at('upper.qcow2'), { secret, references: 'allow' })
    expect((await ours(at('top.qcow2'), secret)).equals(disk)).toBe(true)
    const backing = ',backing.encrypt.key-secret=b'
    expect(theirs(described('top.qcow2', backing), [...object(), ...object('of the base', 'b')]).equals(disk)).toBe(
      true,
    )
    await rebase(at('top.qcow2'), null, { secret, references: 'allow' })
    await holds('top.qcow2', disk)
    for (const name of ['base.qcow2', 'top.qcow2', 'upper.qcow2', 'copy.qcow2']) {
      expect(readFileSync(at(name)).includes(MARKER), name).toBe(false)
    }
  })

  it('needs the secret for guest data alone, and says so', async () => {
    made('closed.qcow2', '1M')
    await using image = await open(at('closed.qcow2'), { flags: 'r+' })
    expect((await image.info()).encrypted).toBe(true)
    await image.snapshots.create('empty')
    await image.truncate(2 * MIB)
    const missing = { code: 'ERR_QCOW2_BAD_SECRET', field: 'secret', path: at('closed.qcow2') }
    expect(await failure(() => image.write(marked(512), { position: 0 }))).toMatchObject(missing)
    await image.close()
    expect(await failure(() => open(at('closed.qcow2'), { secret: 'no' }))).toMatchObject({
      code: 'ERR_QCOW2_BAD_SECRET',
    })
    ok(qemuIo(...object(), '-c', 'write -P 5 0 64k', '--image-opts', described('closed.qcow2')))
    await using again = await open(at('closed.qcow2'))
    expect(await failure(() => again.read(Buffer.alloc(512), { position: 0 }))).toMatchObject(missing)
    expect((await check(at('closed.qcow2'))).corruptions).toBe(0)
    expect((await inspect(at('closed.qcow2'))).encryption).toBe('luks')
  })

  it('takes a secret as bytes, from a file and from a promise, and shows it nowhere', async () => {
    made('kinds.qcow2', '1M')
    writeFileSync(at('secret'), SECRET)
    const kinds: Secrets[] = [Buffer.from(SECRET), { file: at('secret') }, () => Promise.resolve(SECRET)]
    for (const secret of kinds) {
      await using image = await open(at('kinds.qcow2'), { secret })
      expect(show(image)).not.toContain(SECRET)
      expect(show(await image.info(), { depth: 9 })).not.toContain(SECRET)
    }
    const thrown = new Error('no secret today')
    const ended = await open(at('kinds.qcow2'), { secret: () => Promise.reject(thrown) }).catch(
      (error: unknown) => error,
    )
    expect(ended).toBe(thrown)
    expect(await failure(() => open(at('kinds.qcow2'), { secret: { file: at('gone') } }))).toMatchObject({
      code: 'ENOENT',
      path: at('gone'),
    })
    const wrong = await failure(() => open(at('kinds.qcow2'), { secret: `${SECRET}?` }))
    expect(show(wrong)).not.toContain(SECRET)
  })

  it('ends a key derivation with the signal', async () => {
    const controller = new AbortController()
    const making = create(at('slow.qcow2'), {
      size: MIB,
      encrypt: { secret: SECRET, iterTime: 60_000 },
      signal: controller.signal,
    }).catch((error: unknown) => error)
    setTimeout(() => controller.abort(), 100)
    const begin = performance.now()
    expect(await making).toMatchObject({ name: 'AbortError' })
    expect(performance.now() - begin).toBeLessThan(10_000)
  })
})
