/** Images of formats that are recognised and not read: `info` and `inspect` say what they are, with QEMU's names and sizes. */

import { copyFileSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { inspect, probe } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { ok, qemuImg } from '../interop/qemu.js'
import { describeWithQemu, qcow2, workspace } from './run.js'

const folder = workspace()
const MIB = 2 ** 20

/** Format, options, and the size that is asked for. */
const made: readonly (readonly [format: string, options: string, size: number])[] = [['qed', '', 6 * MIB]]

describeWithQemu('images of other formats', () => {
  it.each(made)('%s %s has its name and size', async (format, options, size) => {
    const name = `${format}-${options.replaceAll(/\W/g, '-')}.img`
    const path = join(folder, name)
    const chosen = options === '' ? [] : ['-o', options]
    ok(qemuImg('create', '-q', '-f', format, ...chosen, path, String(size)))
    const theirs = JSON.parse(ok(qemuImg('info', '--output=json', path)))
    const { code, stdout, stderr } = await qcow2(['info', '--output=json', name], folder)
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' })
    const ours = JSON.parse(stdout)
    expect(ours.format).toBe(theirs.format)
    expect(ours['virtual-size']).toBe(theirs['virtual-size'])
    expect(ours['actual-size']).toBe(statSync(path).blocks * 512)
    const human = await qcow2(['info', name], folder)
    expect(human.code).toBe(0)
    expect(human.stdout).toContain(`file format: ${theirs.format}\nvirtual size: `)
    expect(human.stdout).toContain(`(${theirs['virtual-size']} bytes)`)
    expect(await inspect(path)).toMatchObject({
      format: 'unknown',
      detected: theirs.format,
      virtualSize: theirs['virtual-size'],
      safe: false,
    })
    // The format is said: the same.
    expect((await qcow2(['info', '-f', format, '--output=json', name], folder)).stdout).toBe(stdout)
  })

  it('a backing file of such a format ends the listing of a chain', async () => {
    ok(qemuImg('create', '-q', '-f', 'qed', join(folder, 'base.qed'), '4M'))
    ok(qemuImg('create', '-q', '-f', 'qcow2', '-b', 'base.qed', '-F', 'qed', join(folder, 'top.qcow2')))
    const { code, stdout } = await qcow2(['info', '--backing-chain', '--output=json', 'top.qcow2'], folder)
    expect(code).toBe(0)
    expect(JSON.parse(stdout).map((each: { format: string }) => each.format)).toEqual(['qcow2', 'qed'])
  })
})

describe('structures of other formats', () => {
  const trailer = (magic: string, put: (bytes: Buffer) => void): string => {
    const path = join(folder, `${magic}.trailer`)
    const bytes = Buffer.alloc(4096 + 512)
    bytes.write(magic, 4096, 'latin1')
    put(bytes.subarray(4096))
    writeFileSync(path, bytes)
    return path
  }

  it('are found at the end of a file by inspect, which is raw to a reader', async () => {
    const dmg = trailer('koly', bytes => bytes.writeBigUInt64BE(77n, 492))
    expect(await inspect(dmg)).toMatchObject({ detected: 'dmg', virtualSize: 77 * 512 })
    const vpc = trailer('conectix', bytes => {
      bytes.write('win ', 28, 'latin1')
      bytes.writeBigUInt64BE(4096n, 48)
    })
    expect(await inspect(vpc)).toMatchObject({ detected: 'vpc', virtualSize: 4096 })
    expect([await probe(dmg), await probe(vpc)]).toEqual(['raw', 'raw'])
  })

  it.each([
    ['bochs', 'Bochs Virtual HD Image', (b: Buffer) => b.writeBigUInt64LE(1024n, b.writeUInt32LE(0x20000, 64) + 20)],
    ['cloop', '#!/bin/sh\n#V2.0 Format\nmodprobe cloop', (b: Buffer) => b.writeUInt32BE(2, b.writeUInt32BE(512, 128))],
  ] as const)('%s has its size', async (format, magic, put) => {
    const bytes = Buffer.alloc(512)
    bytes.write(magic, 'latin1')
    put(bytes)
    expect(await inspect(bytes)).toMatchObject({ detected: format, virtualSize: 1024 })
  })

  it('that are cut short have a name and no size', async () => {
    for (const magic of ['QED\0']) {
      const { detected, virtualSize } = await inspect(Buffer.from(magic, 'latin1'))
      expect([typeof detected, virtualSize], magic).toEqual(['string', 0])
    }
  })
})

describe('a disk that is out of proportion', () => {
  beforeAll(async () => {
    await qcow2(['create', '-f', 'qcow2', '-o', 'cluster_size=2M', 'claim.qcow2', '500T'], folder)
  })

  it('is a finding of its own', async () => {
    const path = join(folder, 'claim.qcow2')
    const found = await inspect(path)
    expect([found.safe, found.findings.map(({ code }) => code)]).toEqual([false, ['VIRTUAL_SIZE']])
    const tight = await inspect(path, { limits: { maxVirtualSize: 2 ** 40 } })
    expect(tight.findings.map(({ code }) => code)).toEqual(['LIMIT'])
    copyFileSync(path, `${path}.large`)
    truncateSync(`${path}.large`, 2 ** 40)
    expect((await inspect(`${path}.large`)).safe).toBe(true)
  })
})
