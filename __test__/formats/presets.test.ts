/** What products take: the presets of formats other than VMDK, whose own tests are with it. */

import { readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { type CreateOptions, compare, convert, create, open } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { failure, writeRaw } from '../api/fixtures.js'
import { asQemuImg, qcow2, workspace } from '../cli/run.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20
const source = writeRaw(at('source.raw'), 21 * MIB + 512, [[0, 70_000]])

const made = async (name: string, options: CreateOptions): Promise<Buffer> => {
  await (await create(at(name), { overwrite: true, ...options })).close()
  return readFileSync(at(name))
}

describe('azure', () => {
  it('is a fixed VHD of whole MiB', async () => {
    for (const [size, whole] of [
      [20 * MIB, 20 * MIB],
      [20 * MIB - MIB + 512, 20 * MIB],
      [21 * MIB + 1024, 22 * MIB],
    ] as const) {
      const bytes = await made('azure.vhd', { format: 'vpc', size, preset: 'azure' })
      expect(bytes.length).toBe(whole + 512)
      const footer = bytes.subarray(whole)
      expect([footer.toString('latin1', 0, 8), footer.readUInt32BE(60)]).toEqual(['conectix', 2])
      expect([footer.readBigUInt64BE(40), footer.readBigUInt64BE(48)]).toEqual([BigInt(whole), BigInt(whole)])
      expect(['win ', 'qem2']).toContain(footer.toString('latin1', 28, 32))
    }
    await convert(source, at('azure.vhd'), { from: 'raw', to: 'vpc', create: { preset: 'azure' }, overwrite: true })
    expect(statSync(at('azure.vhd')).size).toBe(22 * MIB + 512)
    expect(await compare(source, at('azure.vhd'), { formatA: 'raw', formatB: 'vpc' })).toMatchObject({
      identical: true,
    })
  })

  it('has 20 MiB to 32 TiB', async () => {
    for (const size of [0, 512, 19 * MIB, 32 * 2 ** 40 + 512]) {
      const error = await failure(() => create(at('no.vhd'), { format: 'vpc', size, preset: 'azure' }))
      expect(error, `${size}`).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'size' })
      expect(error.message).toContain('20 MiB to 32 TiB')
    }
  })
})

it('xenserver is a dynamic VHD of whole blocks', async () => {
  const bytes = await made('xen.vhd', { format: 'vpc', size: 21 * MIB + 512, preset: 'xenserver' })
  expect([bytes.readUInt32BE(60), bytes.readBigUInt64BE(48)]).toEqual([3, BigInt(22 * MIB)])
  expect([bytes.readUInt32BE(512 + 28), bytes.readUInt32BE(512 + 32)]).toEqual([11, 2 * MIB])
})

it('hyper-v is a dynamic VHDX with blocks of 32 MiB', async () => {
  await made('hyper-v.vhdx', { format: 'vhdx', size: 40 * MIB, preset: 'hyper-v' })
  await using image = await open(at('hyper-v.vhdx'))
  expect([image.virtualSize, image.clusterSize]).toEqual([40 * MIB, 32 * MIB])
  expect(statSync(at('hyper-v.vhdx')).size).toBeLessThan(16 * MIB)
  await made('other.vhdx', { format: 'vhdx', size: 40 * MIB, preset: 'hyper-v', blockSize: MIB })
  await using other = await open(at('other.vhdx'))
  expect(other.clusterSize).toBe(MIB)
})

it('virtualbox is a dynamic VDI', async () => {
  const bytes = await made('box.vdi', { format: 'vdi', size: 3 * MIB, preset: 'virtualbox' })
  expect([bytes.readUInt32LE(0x4c), bytes.length]).toEqual([1, 1024])
})

it('is for its own format', async () => {
  for (const [format, preset] of [
    ['vpc', 'hyper-v'],
    ['vhdx', 'azure'],
    ['vdi', 'esxi'],
    ['qcow2', 'azure'],
  ]) {
    const error = await failure(() => create(at('no'), { format, size: 20 * MIB, preset } as never))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'preset' })
  }
})

it('by the command line', async () => {
  const run = (line: string) => asQemuImg(line.split(' '), folder)
  expect(await run('create -q -f vpc -o preset=azure cli.vhd 21M')).toMatchObject({ code: 0, stderr: '' })
  expect(statSync(at('cli.vhd')).size).toBe(21 * MIB + 512)
  expect(await run('convert -f raw -O vhdx -o preset=hyper-v source.raw cli.vhdx')).toMatchObject({ code: 0 })
  expect((await run('create -f vpc -o preset=azure cli.vhd 1M')).stderr).toContain('20 MiB to 32 TiB')
  expect(await run('create -f vpc -o preset=esxi cli.vhd 21M')).toMatchObject({ code: 1 })
  expect((await qcow2(['create', '-f', 'vdi', '-o', 'help'], folder)).stdout).toContain(
    'What a product takes: virtualbox',
  )
})

it('a new VHDX has sectors of 4096 bytes where that is asked for', async () => {
  await made('4k.vhdx', { format: 'vhdx', size: 3 * MIB + 512, logicalSectorSize: 4096 })
  {
    await using image = await open(at('4k.vhdx'), { flags: 'r+' })
    expect(image.virtualSize).toBe(3 * MIB + 4096)
    await image.write(Buffer.alloc(700, 5), { position: 1000 })
    const { buffer } = await image.read(Buffer.alloc(1024), { position: 900 })
    expect(buffer.equals(Buffer.alloc(1024).fill(5, 100, 800))).toBe(true)
  }
  expect(
    await asQemuImg('create -q -f vhdx -o logical_sector_size=4096 cli4k.vhdx 3M'.split(' '), folder),
  ).toMatchObject({ code: 0 })
  const refused = await asQemuImg('create -q -f vhdx -o logical_sector_size=1024 no.vhdx 3M'.split(' '), folder)
  expect(refused).toMatchObject({ code: 1, stderr: expect.stringContaining('512 or 4096') })
  const error = await failure(() =>
    create(at('no.vhdx'), { format: 'vhdx', size: MIB, logicalSectorSize: 1024 as never }),
  )
  expect(error).toMatchObject({ field: 'logicalSectorSize' })
})
