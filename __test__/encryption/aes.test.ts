/** Legacy AES in qcow2: read as any image, written where that is allowed. QEMU makes such images and judges ours. */

import { readFileSync, writeFileSync } from 'node:fs'
import { expect, it } from 'vitest'
import { commit, compact, convert, create, measure, open, rebase } from '../../dist/index.js'
import { failure, pattern } from '../api/fixtures.js'
import { qcow2 } from '../cli/run.js'
import { describeWithQemu, ok, qemuImg, qemuIo } from '../interop/qemu.js'
import { encryptedDisks, hasMark, MIB, marked, object, put, SECRET } from './disks.js'

const { folder, at, described, theirs, ours, holds } = encryptedDisks()
const encrypt = { format: 'aes', secret: SECRET, allowWeak: true } as const
const secret = { secret: SECRET, allowWeak: true } as const
const OPTIONS = 'encrypt.format=aes,encrypt.key-secret=s'

describeWithQemu('legacy AES in qcow2', () => {
  it.each([
    {},
    { clusterSize: 512 },
    { clusterSize: 2 * MIB },
    { version: 2, clusterSize: 4096 },
    { version: 2, preallocation: 'metadata' },
    { extendedL2: true },
    { preallocation: 'falloc' },
    { preallocation: 'full', clusterSize: 16384 },
  ] as const)('makes, writes, resizes, snapshots and compacts %j', async shape => {
    const name = 'ours.qcow2'
    const disk = Buffer.alloc(6 * MIB)
    let end = disk
    {
      await using image = await create(at(name), { ...shape, size: 4 * MIB, encrypt, overwrite: true })
      await put(image, disk, 0, marked(70_000))
      await put(image, disk, 3 * MIB + 300, marked(1000))
      await put(image, disk, 2 * MIB, Buffer.alloc(200_000))
      await image.snapshots.create('before')
      await put(image, disk, 1000, pattern(0, 5000))
      await put(image, disk, 65_536, marked(65_536))
      await image.writeZeroes(100_000, 70_000)
      disk.fill(0, 100_000, 170_000)
      if (!('version' in shape)) {
        await image.truncate(6 * MIB)
        await put(image, disk, 5 * MIB, marked(5000))
        await image.truncate(5 * MIB + 3 * 512, { shrink: true })
        end = disk.subarray(0, 5 * MIB + 3 * 512)
      } else end = disk.subarray(0, 4 * MIB)
    }
    await holds(name, end)
    const { zeroClusters } = await compact(at(name), { mode: 'rewrite', zeroes: true, secret })
    expect(zeroClusters).toBeGreaterThan('clusterSize' in shape && shape.clusterSize === 2 * MIB ? -1 : 0)
    await holds(name, end)
    await using before = await open(at(name), { secret: SECRET, snapshot: 'before' })
    const bytes = Buffer.alloc(70_000)
    await before.read(bytes, { position: 0 })
    expect(bytes.equals(marked(70_000))).toBe(true)
  })

  it('writes into what QEMU made, where that is allowed', async () => {
    ok(qemuImg('create', '-q', ...object(), '-f', 'qcow2', '-o', OPTIONS, at('theirs.qcow2'), '4M'))
    const writes = ['write -P 7 0 1M', 'write -P 9 3M 70k', 'write -z 100k 30k']
    ok(qemuIo(...object(), ...writes.flatMap(each => ['-c', each]), '--image-opts', described('theirs.qcow2')))
    const disk = theirs('theirs.qcow2')
    expect((await ours('theirs.qcow2')).equals(disk)).toBe(true)
    const before = readFileSync(at('theirs.qcow2'))
    for (const refused of [SECRET, { secret: SECRET, allowWeak: false }]) {
      expect(await failure(() => open(at('theirs.qcow2'), { flags: 'r+', secret: refused }))).toMatchObject({
        code: 'ERR_QCOW2_UNSUPPORTED_FEATURE',
        field: 'crypt_method',
        path: at('theirs.qcow2'),
      })
    }
    expect(readFileSync(at('theirs.qcow2')).equals(before)).toBe(true)
    {
      await using image = await open(at('theirs.qcow2'), { flags: 'r+', discard: 'unmap', secret })
      await put(image, disk, 2 * MIB + 700, marked(100_000))
      await put(image, disk, 5, marked(3))
      // Parts of one sector at the same time.
      await Promise.all(Array.from({ length: 64 }, (_, n) => put(image, disk, 3000 + 40 * n, marked(40))))
      await image.discard(0, 65_536)
      disk.fill(0, 0, 65_536)
    }
    await holds('theirs.qcow2', disk)
  })

  it('moves VM state as it is stored', async () => {
    ok(qemuImg('create', '-q', ...object(), '-f', 'qcow2', '-o', `${OPTIONS},cluster_size=4k`, at('vm.qcow2'), '1M'))
    const io = (...commands: string[]): string =>
      ok(qemuIo(...object(), ...commands.flatMap(each => ['-c', each]), '--image-opts', described('vm.qcow2')))
    io('write -P 7 0 200k', 'write -b -P 9 0 40k')
    const disk = theirs('vm.qcow2')
    {
      await using image = await open(at('vm.qcow2'), { flags: 'r+', discard: 'unmap', secret })
      await image.discard(0, 160 * 1024)
      disk.fill(0, 0, 160 * 1024)
    }
    const { movedClusters } = await compact(at('vm.qcow2'), { mode: 'rewrite', secret })
    expect(movedClusters).toBeGreaterThan(10)
    expect(io('read -b -P 9 0 40k')).not.toMatch(/failed/)
    await holds('vm.qcow2', disk)
  })

  it('needs no secret where no guest data is touched', async () => {
    ok(qemuImg('create', '-q', ...object(), '-f', 'qcow2', '-o', OPTIONS, at('locked.qcow2'), '1M'))
    await using image = await open(at('locked.qcow2'), { flags: 'r+' })
    await image.snapshots.create('empty')
    await image.truncate(2 * MIB)
    const missing = { code: 'ERR_QCOW2_BAD_SECRET', field: 'secret', path: at('locked.qcow2') }
    expect(await failure(() => image.write(marked(512), { position: 0 }))).toMatchObject(missing)
    await image.close()
    await holds('locked.qcow2', Buffer.alloc(2 * MIB))
  })

  it('is converted to and from, cloned, committed and rebased', async () => {
    const disk = Buffer.alloc(3 * MIB)
    marked(MIB + 100).copy(disk, 512)
    writeFileSync(at('plain.raw'), disk)
    await convert(at('plain.raw'), at('a.qcow2'), { from: 'raw', to: 'qcow2', create: { encrypt } })
    await holds('a.qcow2', disk)
    const luks = { secret: SECRET, iterTime: 5 }
    await convert(at('a.qcow2'), at('luks.qcow2'), { to: 'qcow2', secret: SECRET, create: { encrypt: luks } })
    await holds('luks.qcow2', disk)
    const dataFile = at('data.raw')
    await convert(at('luks.qcow2'), at('b.qcow2'), { to: 'qcow2', secret: SECRET, create: { encrypt, dataFile } })
    expect(theirs('b.qcow2').equals(disk)).toBe(true)
    expect(hasMark(dataFile)).toBe(false)
    await convert(at('plain.raw'), at('a.qcow2'), { from: 'raw', to: 'qcow2', secret, existingTarget: true })
    await holds('a.qcow2', disk)
    const shape = { backingFile: 'a.qcow2', backingFormat: 'qcow2', encrypt } as const
    {
      await using top = await create(at('top.qcow2'), { ...shape, secret, references: 'allow' })
      await put(top, disk, 5000, marked(10))
      await put(top, disk, MIB - 3, marked(5000))
      await top.clone(at('copy.qcow2'), { to: 'qcow2', create: { encrypt } })
      await holds('copy.qcow2', disk)
      await top.createOverlay(at('upper.qcow2'), { create: { encrypt } })
      await put(top, disk, 20, marked(7))
    }
    expect((await ours('upper.qcow2')).equals(disk)).toBe(true)
    await commit(at('upper.qcow2'), { secret, references: 'allow' })
    const backing = ',backing.encrypt.key-secret=s'
    expect(theirs('top.qcow2', backing).equals(disk)).toBe(true)
    await rebase(at('top.qcow2'), null, { secret, references: 'allow' })
    await holds('top.qcow2', disk)
    for (const name of ['a.qcow2', 'upper.qcow2']) expect(hasMark(at(name)), name).toBe(false)
  })

  it('is refused without the word that allows it, and with what it has no choice of', async () => {
    const refused = { code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'encrypt.format' }
    const { allowWeak: _, ...unsaid } = encrypt
    for (const weak of [unsaid, { ...unsaid, allowWeak: false }, { ...encrypt, cipherAlg: 'aes-128' as const }]) {
      expect(await failure(() => create(at('no.qcow2'), { size: MIB, encrypt: weak }))).toMatchObject(refused)
    }
    const compressed = { from: 'raw', to: 'qcow2', compress: true, create: { encrypt } } as const
    expect(await failure(() => convert(at('plain.raw'), at('no.qcow2'), compressed))).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
      field: 'compress',
    })
    const plain = await measure(at('plain.raw'), { from: 'raw', to: 'qcow2' })
    const weak = await measure(at('plain.raw'), { from: 'raw', to: 'qcow2', create: { encrypt } })
    expect(weak.required).toBe(plain.required)
  })

  it('has its words on the command line', async () => {
    const disk = Buffer.alloc(2 * MIB)
    marked(100_000).copy(disk, 4000)
    writeFileSync(at('disk.raw'), disk)
    const run = async (...words: string[]): Promise<string> => {
      const { code, stdout, stderr } = await qcow2(words, folder)
      expect({ code, stderr }, words.join(' ')).toEqual({ code: 0, stderr: '' })
      return stdout
    }
    const made = await qcow2(['create', ...object(), '-f', 'qcow2', '-o', OPTIONS, 'cli.qcow2', '1M'], folder)
    expect([made.code, made.stderr]).toEqual([1, expect.stringContaining('add encrypt.allow-weak=on')])
    const options = `${OPTIONS},encrypt.allow-weak=on`
    expect(await run('create', ...object(), '-f', 'qcow2', '-o', options, 'cli.qcow2', '1M')).toContain(
      'encrypt.format=aes encrypt.key-secret=s',
    )
    await holds('cli.qcow2', Buffer.alloc(MIB))
    await run('convert', ...object(), '-f', 'raw', '-O', 'qcow2', '-o', options, 'disk.raw', 'cli.qcow2')
    await holds('cli.qcow2', disk)
    await run('create', '-f', 'qcow2', '-b', 'cli.qcow2', '-F', 'qcow2', '-u', 'over.qcow2', '2M')
    const over = (word: string): string =>
      `driver=qcow2,backing.encrypt.key-secret=s${word},file.filename=${at('over.qcow2')}`
    {
      await using image = await open(at('over.qcow2'), { flags: 'r+', references: 'allow', secret: SECRET })
      await put(image, disk, MIB, Buffer.alloc(3000, 5))
    }
    const refused = await qcow2(['commit', ...object(), '--image-opts', over('')], folder)
    expect([refused.code, refused.stderr]).toEqual([1, expect.stringContaining('allowWeak')])
    await run('commit', ...object(), '--image-opts', over(',backing.encrypt.allow-weak=on'))
    await holds('cli.qcow2', disk)
  })
})
