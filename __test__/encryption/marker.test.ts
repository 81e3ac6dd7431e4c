/**
 * A mark is written along every path of an encrypted image, by the API and by the command line, and looked for in all files that came of
 * it: also in clusters that nothing refers to any more. It is never there.
 */

import { execFileSync, spawnSync } from 'node:child_process'
import { copyFileSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, expect, it } from 'vitest'
import { check, commit, compact, convert, create, open, rebase } from '../../dist/index.js'
import { failure } from '../api/fixtures.js'
import { qcow2 } from '../cli/run.js'
import { describeWithQemu, ok, qemuImg } from '../interop/qemu.js'
import { encryptedDisks, hasMark, MIB, marked, object, put, SECRET } from './disks.js'

const { folder, at, described, ours, holds } = encryptedDisks()
const encrypt = { secret: SECRET, iterTime: 5 } as const
const references = 'allow' as const

/** Names of the files that have the mark, among those of encrypted images. */
function marks(directory: string): string[] {
  const files = readdirSync(directory, { recursive: true, withFileTypes: true }).filter(file => file.isFile())
  const names = files.map(file => join(file.parentPath, file.name))
  return names.filter(name => !/plain|theirs\.raw/.test(name) && hasMark(name))
}

const mounted: string[] = []
afterAll(() => {
  for (const path of mounted) execFileSync('umount', [path])
})

/** A file system of this many bytes; undefined where none can be mounted. */
function smallFileSystem(bytes: number): string | undefined {
  const path = at('small')
  mkdirSync(path)
  if (process.platform !== 'linux') return undefined
  if (spawnSync('mount', ['-t', 'tmpfs', '-o', `size=${bytes}`, 'tmpfs', path]).status !== 0) return undefined
  mounted.push(path)
  return path
}

describeWithQemu('a mark', () => {
  it('is found where nothing is encrypted', async () => {
    await using image = await create(at('plain.qcow2'), { size: MIB })
    await put(image, Buffer.alloc(MIB), 70_001, marked(3000, 70_001))
    await image.close()
    expect(hasMark(at('plain.qcow2'))).toBe(true)
  })

  it.each([
    { clusterSize: 4096 },
    { preallocation: 'metadata' },
    { preallocation: 'falloc', extendedL2: true },
    { preallocation: 'full', clusterSize: 16_384 },
  ] as const)('leaves no trace of a guest in %j', async shape => {
    const c = 'clusterSize' in shape ? shape.clusterSize : 65_536
    const size = 40 * c
    const disk = Buffer.alloc(size)
    const mark = (position: number, length: number): [number, Buffer] => [position, marked(length, position)]
    await using image = await create(at('guest.qcow2'), { ...shape, size, encrypt, overwrite: true })
    await put(image, disk, ...mark(0, 2 * c))
    await put(image, disk, ...mark(4 * c + 100, 700))
    await image.snapshots.create('one')
    await put(image, disk, ...mark(c + 7, 20))
    await image.writeZeroes(c, c, { unmap: true })
    disk.fill(0, c, 2 * c)
    await image.bitmaps.add('dirty', { granularity: 4096 })
    await put(image, disk, ...mark(c + 512, 512))
    await image.snapshots.create('two')
    const frozen = Buffer.from(disk)
    const cloned = image.clone(at('clone.qcow2'), { to: 'qcow2', overwrite: true, create: { ...shape, encrypt } })
    await Promise.all([put(image, disk, ...mark(6 * c, 5 * c)), put(image, disk, ...mark(20 * c + 9, c))])
    await cloned
    await image.snapshots.delete('one')
    await image.truncate(size + 4 * c, { preallocation: shape.preallocation ?? 'off' })
    await image.truncate(size, { shrink: true })
    await put(image, disk, ...mark(size - c - 3, c))
    await image.bitmaps.remove('dirty')
    await image.snapshots.apply('two')
    frozen.copy(disk)
    await put(image, disk, ...mark(9 * c + 1, 3 * c))
    // A process dies here: what is in the file is all that there is.
    copyFileSync(at('guest.qcow2'), at('crashed.qcow2'))
    await image.snapshots.delete('two')
    await image.compact({ mode: 'rewrite', zeroes: true })
    await image.close()
    await holds('guest.qcow2', disk)
    await check(at('crashed.qcow2'), { repair: 'all' })
    await ours('crashed.qcow2')
    await convert(at('guest.qcow2'), at('converted.qcow2'), {
      to: 'qcow2',
      secret: SECRET,
      overwrite: true,
      create: { ...shape, encrypt },
    })
    await holds('converted.qcow2', disk)
    expect(marks(folder)).toEqual([])
  })

  it('leaves no trace along a chain', async () => {
    const disk = Buffer.alloc(3 * MIB)
    marked(2 * MIB).copy(disk)
    writeFileSync(at('plain.raw'), disk)
    const shape = { backingFile: at('plain.raw'), backingFormat: 'raw', encrypt, references } as const
    {
      await using top = await create(at('top.qcow2'), shape)
      await put(top, disk, 100, Buffer.alloc(10, 1))
      await put(top, disk, MIB - 5, Buffer.alloc(10, 2))
      await top.writeZeroes(MIB + 5, 70_000)
      disk.fill(0, MIB + 5, MIB + 70_005)
      await top.createOverlay(at('upper.qcow2'), { create: { encrypt } })
      await put(top, disk, 300_001, marked(100_000, 300_001))
      await top.writeZeroes(400_000, 1000)
      disk.fill(0, 400_000, 401_000)
    }
    await commit(at('upper.qcow2'), { secret: SECRET, references })
    await rebase(at('top.qcow2'), null, { secret: SECRET, references })
    await compact(at('top.qcow2'), { mode: 'rewrite', zeroes: true, secret: SECRET })
    await holds('top.qcow2', disk)
    expect(marks(folder)).toEqual([])
  })

  it('leaves no trace by the command line', async () => {
    const disk = Buffer.alloc(2 * MIB)
    marked(MIB, 4096).copy(disk, 4096)
    writeFileSync(at('plain.raw'), disk)
    const LUKS = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=5'
    const top = ['--image-opts', `${described('cli-top.qcow2')},backing.encrypt.key-secret=s`]
    const lines = [
      ['convert', ...object(), '-f', 'raw', '-O', 'qcow2', '-o', LUKS, at('plain.raw'), at('cli.qcow2')],
      ['snapshot', '-c', 'one', at('cli.qcow2')],
      [
        'create',
        ...object(),
        '-f',
        'qcow2',
        '-u',
        '-o',
        LUKS,
        '-b',
        'cli.qcow2',
        '-F',
        'qcow2',
        at('cli-top.qcow2'),
        '2M',
      ],
      ['rebase', ...object(), '-b', '', ...top],
      ['resize', ...object(), '--shrink', '--image-opts', described('cli-top.qcow2'), '1M'],
      ['compact', ...object(), '--rewrite', '--zeroes', '--image-opts', described('cli-top.qcow2')],
      ['snapshot', '-a', 'one', at('cli.qcow2')],
      ['snapshot', '-d', 'one', at('cli.qcow2')],
      ['check', '-r', 'all', at('cli.qcow2')],
    ]
    for (const line of lines) {
      const { code, stderr } = await qcow2(line, folder)
      expect({ code, stderr }, line.join(' ')).toEqual({ code: 0, stderr: '' })
    }
    await holds('cli.qcow2', disk)
    await holds('cli-top.qcow2', disk.subarray(0, MIB))
    expect(marks(folder)).toEqual([])
  })

  const small = smallFileSystem(4 * MIB + MIB / 2)
  if (small === undefined) process.stderr.write('SKIPPED (no tmpfs can be mounted): a mark on a full disk\n')

  it.skipIf(small === undefined)('leaves no trace on a full disk', async () => {
    const path = join(small ?? '', 'full.qcow2')
    const disk = Buffer.alloc(8 * MIB)
    {
      await using image = await create(path, { size: disk.length, clusterSize: 16_384, encrypt })
      let full = 0
      for (let at = 0; full < 5 && at < disk.length; at += 100_000) {
        const bytes = marked(50_000, at)
        const error = await image.write(bytes, { position: at }).then(
          () => undefined,
          (reason: unknown) => reason,
        )
        if (error === undefined) bytes.copy(disk, at)
        else full += 1
        if (error !== undefined) expect(error).toMatchObject({ code: 'ENOSPC' })
      }
      expect(full).toBe(5)
      const copy = { to: 'qcow2', create: { encrypt } } as const
      expect(await failure(() => image.clone(join(small ?? '', 'copy.qcow2'), copy))).toMatchObject({ code: 'ENOSPC' })
    }
    // What failed may be there or not; the rest is.
    await using again = await open(path, { secret: SECRET })
    const bytes = (await again.read(Buffer.alloc(disk.length), { position: 0 })).buffer
    for (let at = 0; at < disk.length; at += 100_000) {
      if (disk[at] !== 0) expect(bytes.subarray(at, at + 50_000).equals(disk.subarray(at, at + 50_000))).toBe(true)
    }
    ok(qemuImg('check', ...object(), '--image-opts', `driver=qcow2,encrypt.key-secret=s,file.filename=${path}`))
    expect(readFileSync(path).length).toBeGreaterThan(3 * MIB)
    expect(marks(small ?? '')).toEqual([])
  })
})
