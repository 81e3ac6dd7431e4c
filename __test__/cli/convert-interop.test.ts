import { statSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { makeImages } from './images.js'
import { describeWithQemu, execute, haveQemu, qcow2, workspace } from './run.js'

const folder = workspace()
// A check finds what is wrong with these two; what they read as is the matter of the check's own tests.
const images = haveQemu ? makeImages(folder).filter(name => !/leaks|corrupt/.test(name)) : []

const ok = { code: 0, stderr: '' }
const qemu = (...args: string[]) => execute('qemu-img', args, folder)
let count = 0
const target = (extension: string) => `converted-${count++}.${extension}`

/** Converts, and lets QEMU judge what came out of it. */
async function converted(args: readonly string[], source: string, format: 'qcow2' | 'raw'): Promise<string> {
  const out = target(format)
  expect(await qcow2(['convert', ...args, '-O', format, source, out], folder)).toEqual({
    ...ok,
    signal: null,
    stdout: '',
  })
  if (format === 'qcow2') expect(await qemu('check', out)).toMatchObject(ok)
  return out
}

describeWithQemu('converted images in the eyes of QEMU', () => {
  const shapes: readonly (readonly [args: readonly string[], format: 'qcow2' | 'raw'])[] = [
    [[], 'raw'],
    [[], 'qcow2'],
    [['-c', '-m', '2'], 'qcow2'],
    [['-c', '-o', 'compression_type=zstd,cluster_size=2M'], 'qcow2'],
    [['-c', '--level=12', '--window=small', '-o', 'compat=0.10,cluster_size=4k'], 'qcow2'],
    [['-S', '0', '-o', 'extended_l2=on,refcount_bits=1'], 'qcow2'],
  ]
  for (const image of images) {
    it.concurrent(`${image} reads the same in every format`, async () => {
      for (const [args, format] of shapes) {
        const out = await converted(args, image, format)
        expect(await qemu('compare', image, out), args.join(' ')).toMatchObject({
          ...ok,
          stdout: 'Images are identical.\n',
        })
      }
    })
  }

  it('-p prints the steps that qemu-img prints, however quick the job is', async () => {
    await qemu('create', '-f', 'qcow2', 'parts.qcow2', '64M')
    await execute('qemu-io', ['-c', 'write 0 1M', '-c', 'write 2M 5M', '-c', 'write 32M 1M', 'parts.qcow2'], folder)
    await qemu('create', '-f', 'qcow2', 'full.qcow2', '101M')
    await execute('qemu-io', ['-c', 'write 0 101M', 'full.qcow2'], folder)
    await qemu('create', '-f', 'qcow2', 'empty.qcow2', '1G')
    for (const source of ['parts.qcow2', 'full.qcow2', 'empty.qcow2']) {
      for (const format of ['qcow2', 'raw']) {
        const { stdout } = await qemu('convert', '-p', '-O', format, source, target(format))
        const ours = await qcow2(['convert', '-p', '-O', format, source, target(format)], folder)
        expect(ours, `${source} ${format}`).toEqual({ ...ok, signal: null, stdout })
      }
    }
  })

  it('a snapshot, by its id or its name', async () => {
    for (const [ours, theirs] of [
      ['first', 'first'],
      ['2', '2'],
      ['snapshot.id=1', '1'],
      ['snapshot.id=1,snapshot.name=first', '1'],
      ['snapshot.name=a-rather-long-name-for-a-snapshot', '2'],
    ] as const) {
      const out = await converted(['-l', ours], 'snapshots.qcow2', 'raw')
      const expected = target('raw')
      await qemu('convert', '-l', theirs, '-O', 'raw', 'snapshots.qcow2', expected)
      expect(await qemu('compare', '-f', 'raw', '-F', 'raw', out, expected)).toMatchObject(ok)
    }
    const mismatch = await qcow2(
      ['convert', '-l', 'snapshot.id=1,snapshot.name=other', 'snapshots.qcow2', 'x.raw'],
      folder,
    )
    expect(mismatch).toMatchObject({ code: 1, stderr: "qcow2: Failed to load snapshot: Can't find snapshot '1'\n" })
  })

  it('an overlay onto its base holds what the overlay holds', async () => {
    const out = `sub/${target('qcow2')}`
    const args = ['convert', '-O', 'qcow2', '-B', '../data.qcow2', '-F', 'qcow2', 'sub/overlay.qcow2', out]
    expect(await qcow2(args, folder)).toMatchObject(ok)
    expect(await qemu('compare', 'sub/overlay.qcow2', out)).toMatchObject(ok)
    const info = JSON.parse((await qemu('info', '--output=json', out)).stdout)
    expect(info).toMatchObject({ 'backing-filename': '../data.qcow2', 'backing-filename-format': 'qcow2' })
    const whole = await converted([], 'sub/overlay.qcow2', 'qcow2')
    expect(statSync(join(folder, out)).size).toBeLessThan(statSync(join(folder, whole)).size)
  })

  it('a raw disk onto any image is written as a whole', async () => {
    const raw = await converted([], 'data.qcow2', 'raw')
    const out = target('qcow2')
    const args = ['convert', '-f', 'raw', '-O', 'qcow2', '-B', 'compressed.qcow2', '-F', 'qcow2', raw, out]
    expect(await qcow2(args, folder)).toMatchObject(ok)
    expect(await qemu('compare', '-f', 'raw', raw, out)).toMatchObject(ok)
    const info = JSON.parse((await qemu('info', '--output=json', out)).stdout)
    expect(info).toMatchObject({ 'backing-filename': 'compressed.qcow2' })
  })

  it('an existing raw target is written in place', async () => {
    await execute('sh', ['-c', 'head -c 67108864 /dev/zero | tr "\\0" x > there.raw'], folder)
    const { ino } = statSync(join(folder, 'there.raw'))
    expect(await qcow2(['convert', '-n', '-O', 'raw', 'data.qcow2', 'there.raw'], folder)).toMatchObject(ok)
    expect(await qemu('compare', '-F', 'raw', 'data.qcow2', 'there.raw')).toMatchObject(ok)
    expect(statSync(join(folder, 'there.raw')).ino).toBe(ino)
  })

  /** What a map says, wherever it lies in the file. */
  async function mapOf(out: string): Promise<(readonly [start: number, kind: string])[]> {
    const map: Record<string, unknown>[] = JSON.parse((await qemu('map', '--output=json', out)).stdout)
    const kinds = map.map(({ start, depth, zero, data, compressed }) => {
      return [Number(start), JSON.stringify({ depth, zero, data, compressed })] as const
    })
    return kinds.filter(([, kind], index) => kind !== kinds[index - 1]?.[1])
  }

  /** What qemu-img makes of the same source is mapped as ours is. */
  async function sameMap(args: readonly string[], make?: (out: string) => Promise<unknown>): Promise<void> {
    const [ours, theirs] = [target('qcow2'), target('qcow2')]
    for (const out of [ours, theirs]) {
      const command = ['convert', '-O', 'qcow2', ...args, out]
      await make?.(out)
      expect(await (out === ours ? qcow2(command, folder) : qemu(...command)), args.join(' ')).toMatchObject(ok)
    }
    expect(await mapOf(ours), args.join(' ')).toEqual(await mapOf(theirs))
    expect(await qemu('compare', ours, theirs)).toMatchObject(ok)
  }

  it('zeroes are looked for in blocks of -S, and in clusters with -c', async () => {
    await qemu('create', '-q', '-f', 'qcow2', '-o', 'cluster_size=1k', 'scattered.qcow2', '1M')
    const writes = ['-P 0 0 64k', '0 1k', '8k 1k', '17k 1k', '-P 0 65k 1k', '99k 30k', '200k 512']
    const commands = writes.flatMap(write => ['-c', `write -q ${write}`])
    await execute('qemu-io', ['-f', 'qcow2', ...commands, 'scattered.qcow2'], folder)
    for (const size of ['512', '2k', '4k', '8k']) {
      for (const compress of [[], ['-c']]) {
        await sameMap([...compress, '-S', size, '-o', 'cluster_size=1k', 'scattered.qcow2'])
      }
    }
    await sameMap(['-o', 'cluster_size=512', 'scattered.qcow2'])
  })

  it('version 2 over a backing file is written in full where it must read as zeroes', async () => {
    await qemu('create', '-q', '-f', 'qcow2', 'zeroes.qcow2', '4M')
    for (const options of ['compat=0.10', 'compat=1.1']) {
      const backing = ['-b', 'zeroes.qcow2', '-F', 'qcow2']
      const make = (out: string) => qemu('create', '-q', '-f', 'qcow2', '-o', options, ...backing, out, '4M')
      await sameMap(['-n', 'zeroes.qcow2'], make)
      await sameMap(['-n', 'zeroes.qcow2'], out => qemu('create', '-q', '-f', 'qcow2', '-o', options, out, '4M'))
    }
  })

  it('says in the same words what it cannot do', async () => {
    for (const args of [
      ['-l', 'nothing', 'snapshots.qcow2', 'x.raw'],
      ['-O', 'qcow2', 'data.qcow2', 'no-such-folder/x.qcow2'],
      ['-O', 'qcow2', '-o', 'cluster_size=1000', 'data.qcow2', 'x.qcow2'],
      ['-O', 'foo', 'data.qcow2', 'x.foo'],
      ['-O', 'qcow2', '-o', 'foo=bar', 'data.qcow2', 'x.qcow2'],
      ['-O', 'raw', '-B', 'data.qcow2', 'data.qcow2', 'x.raw'],
    ]) {
      const [ours, theirs] = [await qcow2(['convert', ...args], folder), await qemu('convert', ...args)]
      const words = ours.stderr.replace(/^qcow2:/, 'qemu-img:')
      expect({ ...ours, stderr: words }).toEqual(theirs)
    }
  })
})
