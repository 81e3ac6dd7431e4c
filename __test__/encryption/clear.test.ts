/**
 * Compressed clusters in an encrypted image are stored in clear: other writers make them (`write -c` of qemu-io). They are read, become
 * encrypted clusters where they are written to, and nothing here makes one.
 */

import { copyFileSync, writeFileSync } from 'node:fs'
import { beforeAll, expect, it } from 'vitest'
import { compact, convert, open, rebase } from '../../dist/index.js'
import { failure } from '../api/fixtures.js'
import { qcow2 } from '../cli/run.js'
import { describeWithQemu, ok, qemuImg, qemuIo } from '../interop/qemu.js'
import { encryptedDisks, MIB, marked, object, put, SECRET } from './disks.js'

const { folder, at, described, theirs, ours } = encryptedDisks()
const CLUSTER = 4096

/** Clusters that `check` counts as compressed. */
function compressed(name: string): number {
  const text = ok(qemuImg('check', '--output=json', ...object(), '--image-opts', described(name)))
  return (JSON.parse(text) as { 'compressed-clusters'?: number })['compressed-clusters'] ?? 0
}

describeWithQemu.each([
  ['luks', 'encrypt.iter-time=10,'],
  ['aes', ''],
] as const)('compressed clusters in clear under %s', (format, more) => {
  const name = `${format}.qcow2`
  const secret = { secret: SECRET, allowWeak: true } as const
  let disk: Buffer

  beforeAll(() => {
    const options = `encrypt.format=${format},encrypt.key-secret=s,${more}cluster_size=4k`
    ok(qemuImg('create', '-q', ...object(), '-f', 'qcow2', '-o', options, at(name), '1M'))
    // What is discarded leaves room in front of compressed data.
    const clusters = Array.from({ length: 20 }, (_, n) => `write -c -P ${n + 1} ${(40 + n) * CLUSTER} ${CLUSTER}`)
    const writes = [`write -P 77 0 ${40 * CLUSTER}`, ...clusters, `write -P 78 ${80 * CLUSTER} ${CLUSTER}`]
    ok(qemuIo(...object(), ...writes.flatMap(each => ['-c', each]), '--image-opts', described(name)))
    disk = theirs(name)
    expect(compressed(name)).toBe(20)
  })

  it('are read with the secret alone', async () => {
    expect((await ours(name)).equals(disk)).toBe(true)
    await using locked = await open(at(name))
    const missing = { code: 'ERR_QCOW2_BAD_SECRET', field: 'secret', path: at(name) }
    expect(await failure(() => locked.read(Buffer.alloc(512), { position: 40 * CLUSTER }))).toMatchObject(missing)
    await convert(at(name), at('plain.raw'), { to: 'raw', secret: SECRET, overwrite: true })
    ok(qemuImg('compare', ...object(), '--image-opts', described(name), `driver=raw,file.filename=${at('plain.raw')}`))
  })

  it('become encrypted clusters where they are written to, and stay where they are', async () => {
    copyFileSync(at(name), at('written.qcow2'))
    const now = Buffer.from(disk)
    {
      await using image = await open(at('written.qcow2'), { flags: 'r+', discard: 'unmap', secret })
      await put(image, now, 41 * CLUSTER + 100, marked(50))
      await put(image, now, 43 * CLUSTER, marked(2 * CLUSTER))
      await image.writeZeroes(50 * CLUSTER + 1, 700)
      now.fill(0, 50 * CLUSTER + 1, 50 * CLUSTER + 701)
      await image.discard(0, 30 * CLUSTER)
      now.fill(0, 0, 30 * CLUSTER)
      await image.snapshots.create('all')
    }
    expect(compressed('written.qcow2')).toBe(16)
    const { movedClusters } = await compact(at('written.qcow2'), { mode: 'rewrite', secret })
    expect(movedClusters).toBeGreaterThan(0)
    expect(compressed('written.qcow2')).toBe(16)
    expect(theirs('written.qcow2').equals(now)).toBe(true)
    expect((await ours('written.qcow2')).equals(now)).toBe(true)
    // A copy has none.
    const encrypt = { secret: SECRET, iterTime: 5 }
    await convert(at('written.qcow2'), at('copy.qcow2'), {
      to: 'qcow2',
      secret: SECRET,
      overwrite: true,
      create: { encrypt },
    })
    expect(compressed('copy.qcow2')).toBe(0)
    expect(theirs('copy.qcow2').equals(now)).toBe(true)
  })

  it('are made by no call', async () => {
    const source = at('source.raw')
    writeFileSync(source, Buffer.alloc(MIB, 3))
    copyFileSync(at(name), at('same.qcow2'))
    const before = theirs(name)
    const encrypt = { secret: SECRET, ...(format === 'aes' ? { format, allowWeak: true } : { iterTime: 5 }) } as const
    const create = { encrypt }
    const argument = { code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'compress' }
    const unsupported = { code: 'ERR_QCOW2_UNSUPPORTED_FEATURE' }
    const from = { from: 'raw', to: 'qcow2', compress: true } as const
    expect(await failure(() => convert(source, at('no.qcow2'), { ...from, create }))).toMatchObject(argument)
    expect(
      await failure(() => convert(source, at('same.qcow2'), { ...from, secret, existingTarget: true })),
    ).toMatchObject(argument)
    {
      await using image = await open(at('same.qcow2'), { flags: 'r+', secret })
      const write = { position: 0, compressed: true } as const
      expect(await failure(() => image.write(Buffer.alloc(CLUSTER), write))).toMatchObject(unsupported)
      const clone = { to: 'qcow2', compress: true, create } as const
      expect(await failure(() => image.clone(at('no.qcow2'), clone))).toMatchObject(argument)
    }
    const squeezed = { secret, compress: true } as const
    expect(await failure(() => rebase(at('same.qcow2'), null, squeezed))).toMatchObject({
      ...unsupported,
      field: 'compress',
    })
    const options = `${described('same.qcow2')},encrypt.allow-weak=on`
    const line = ['rebase', ...object(), '-c', '-b', '', '--image-opts', options]
    const { code, stderr } = await qcow2(line, folder)
    expect([code, stderr]).toEqual([1, expect.stringContaining('cannot hold compressed clusters')])
    expect(theirs('same.qcow2').equals(before)).toBe(true)
    expect(compressed('same.qcow2')).toBe(20)
  })
})
