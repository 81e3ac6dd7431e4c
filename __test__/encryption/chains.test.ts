/** Chains whose layers have secrets of their own: what a layer that stays closed hides, and who keeps which key. */

import { existsSync, readFileSync } from 'node:fs'
import { beforeAll, expect, it } from 'vitest'
import { commit, convert, create, type EncryptedLayer, type Image, open, type Secrets } from '../../dist/index.js'
import { failure, pattern } from '../api/fixtures.js'
import { describeWithQemu } from '../interop/qemu.js'
import { encryptedDisks, hasMark, MIB, marked, object, put } from './disks.js'

const { at, theirs } = encryptedDisks()
const CLUSTER = 65_536
const NAMES = ['top', 'middle', 'base'] as const
const SECRETS = new Map(NAMES.map(name => [at(`${name}.qcow2`), `the secret of the ${name}`]))
const encryptOf = (name: string) =>
  name === 'middle'
    ? ({ format: 'aes', secret: `the secret of the ${name}`, allowWeak: true } as const)
    : ({ secret: `the secret of the ${name}`, iterTime: 5 } as const)

/** The secrets of all layers but those that are closed. */
const allBut =
  (...closed: readonly string[]): Secrets =>
  ({ path }: EncryptedLayer) =>
    path === undefined || closed.some(name => path === at(`${name}.qcow2`)) ? undefined : SECRETS.get(path)

const references = 'allow' as const
const open3 = (secret: Secrets, flags: 'r' | 'r+' = 'r'): Promise<Image> =>
  open(at('top.qcow2'), { secret, references, flags })
const bytesAt = async (image: Image, position: number, length = CLUSTER): Promise<Buffer> =>
  (await image.read(Buffer.alloc(length), { position })).buffer

describeWithQemu('a chain of secrets', () => {
  const disk = Buffer.alloc(2 * MIB)
  const locked = { code: 'ERR_QCOW2_BAD_SECRET', field: 'secret', path: at('middle.qcow2') }
  // Clusters of each layer; the others are nobody's.
  const OF = { base: [0, 1, 2, 3], middle: [2, 3, 4, 5], top: [3, 5, 6, 7] } as const

  beforeAll(async () => {
    for (const name of [...NAMES].reverse()) {
      const below = NAMES[NAMES.indexOf(name) + 1]
      const shape = below === undefined ? {} : { backingFile: `${below}.qcow2`, backingFormat: 'qcow2' as const }
      const options = { ...shape, size: disk.length, encrypt: encryptOf(name), secret: allBut(), references }
      await using image = await create(at(`${name}.qcow2`), options)
      for (const n of OF[name]) await put(image, disk, n * CLUSTER, pattern(n * 1000 + name.length, CLUSTER))
    }
  })

  it('is read by both with all of them', async () => {
    await using image = await open3(allBut())
    expect((await bytesAt(image, 0, disk.length)).equals(disk)).toBe(true)
    const more = ',backing.encrypt.key-secret=m,backing.backing.encrypt.key-secret=b'
    const [top, middle, base] = NAMES.map(name => `the secret of the ${name}`)
    const objects = [...object(top), ...object(middle, 'm'), ...object(base, 'b')]
    expect(theirs('top.qcow2', more, objects).equals(disk)).toBe(true)
  })

  it('hides what the closed layer has, and nothing else', async () => {
    await using image = await open3(allBut('middle'))
    for (const n of [0, 1, 3, 5, 6, 7, 8]) {
      expect((await bytesAt(image, n * CLUSTER)).equals(disk.subarray(n * CLUSTER, (n + 1) * CLUSTER)), `${n}`).toBe(
        true,
      )
    }
    for (const n of [2, 4]) expect(await failure(() => bytesAt(image, n * CLUSTER, 512))).toMatchObject(locked)
    // A read of both is one of the closed one.
    expect(await failure(() => bytesAt(image, 3 * CLUSTER - 512, 1024))).toMatchObject(locked)
    expect((await image.chain()).map(({ encrypted }) => encrypted)).toEqual([true, true, true])
    let mapped = 0
    for await (const { length } of image.map()) mapped += length
    expect(mapped).toBe(disk.length)
    expect(await failure(() => convert(at('top.qcow2'), at('no.raw'), { to: 'raw', references }))).toMatchObject({
      code: 'ERR_QCOW2_BAD_SECRET',
    })
    const half = { to: 'raw', references, secret: allBut('middle') } as const
    expect(await failure(() => convert(at('top.qcow2'), at('no.raw'), half))).toMatchObject(locked)
    expect(existsSync(at('no.raw'))).toBe(false)
    const wrong: Secrets = ({ path }) => (path === at('base.qcow2') ? 'no' : SECRETS.get(path ?? ''))
    expect(await failure(() => open3(wrong))).toMatchObject({
      code: 'ERR_QCOW2_BAD_SECRET',
      path: at('base.qcow2'),
    })
  })

  it('is written to where the closed layer is not needed', async () => {
    const before = NAMES.slice(1).map(name => readFileSync(at(`${name}.qcow2`)))
    {
      await using image = await open3(allBut('middle'), 'r+')
      await put(image, disk, 4 * CLUSTER, pattern(99, CLUSTER))
      await put(image, disk, 6 * CLUSTER + 100, marked(1000))
      await put(image, disk, CLUSTER + 5, marked(20))
      // What surrounds the bytes is in the closed layer.
      expect(await failure(() => image.write(marked(100), { position: 2 * CLUSTER + 7 }))).toMatchObject(locked)
      await image.snapshots.create('one')
      expect(await failure(() => image.write(marked(100), { position: 2 * CLUSTER + 7 }))).toMatchObject(locked)
      await put(image, disk, 4 * CLUSTER + 1, marked(10))
      await image.snapshots.delete('one')
    }
    const into = { secret: allBut('middle'), references }
    expect(await failure(() => commit(at('top.qcow2'), into))).toMatchObject(locked)
    const after = NAMES.slice(1).map(name => readFileSync(at(`${name}.qcow2`)))
    expect(after.every((bytes, n) => bytes.equals(before[n] ?? Buffer.alloc(0)))).toBe(true)
    await using image = await open3(allBut())
    expect((await bytesAt(image, 0, disk.length)).equals(disk)).toBe(true)
  })

  it('keeps its keys through snapshots, another size, clones, overlays and compaction', async () => {
    await using image = await open3(allBut(), 'r+')
    const frozen = Buffer.from(disk)
    const holds = async (what: string): Promise<void> => {
      expect((await bytesAt(image, 0, disk.length)).equals(disk), what).toBe(true)
    }
    await image.snapshots.create('kept')
    await put(image, disk, 3 * CLUSTER + 1, marked(CLUSTER))
    await holds('beside a snapshot')
    await image.snapshots.apply('kept')
    frozen.copy(disk)
    await holds('applied')
    await put(image, disk, 5 * CLUSTER, marked(300))
    await image.snapshots.delete('kept')
    await image.truncate(disk.length + CLUSTER)
    await image.truncate(disk.length, { shrink: true })
    await holds('of another size')
    await image.compact({ mode: 'rewrite' })
    await holds('compacted')
    await image.clone(at('copy.qcow2'), { to: 'qcow2', create: { encrypt: encryptOf('copy') } })
    expect(theirs('copy.qcow2', '', object('the secret of the copy')).equals(disk)).toBe(true)
    await image.createOverlay(at('upper.qcow2'), { create: { encrypt: encryptOf('upper') } })
    SECRETS.set(at('upper.qcow2'), 'the secret of the upper')
    await put(image, disk, 2 * CLUSTER + 9, marked(100))
    await put(image, disk, 9 * CLUSTER, marked(100))
    await holds('under an overlay')
    await image.close()
    await using again = await open(at('upper.qcow2'), { secret: allBut(), references })
    expect((await bytesAt(again, 0, disk.length)).equals(disk)).toBe(true)
    for (const name of ['top', 'middle', 'base', 'upper', 'copy'])
      expect(hasMark(at(`${name}.qcow2`)), name).toBe(false)
  })
})
