/** Block devices: what is said of them, and what they refuse. They need root. */

import { execFileSync, spawnSync } from 'node:child_process'
import { closeSync, ftruncateSync, openSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { create, open } from 'qcow2'
import { afterEach, describe, expect, it } from 'vitest'
import { failure, temporaryFolder } from '../api/fixtures.js'
import { asQemuImg, qcow2 } from '../cli/run.js'

const folder = temporaryFolder()
const MIB = 2 ** 20
const devices: string[] = []

/** A device on a file of `length` bytes, full of old ones. */
function device(name: string, length: number, ...options: string[]): string {
  writeFileSync(join(folder, name), Buffer.alloc(length, 0xee))
  const found = execFileSync('losetup', ['--find', '--show', ...options, join(folder, name)], {
    encoding: 'utf8',
  }).trim()
  devices.push(found)
  return found
}

function detachAll(): void {
  for (const found of devices.splice(0)) execFileSync('losetup', ['--detach', found])
}

function losetupWorks(): boolean {
  const file = join(folder, 'probe')
  closeSync(openSync(file, 'w'))
  truncateSync(file, MIB)
  const probe = spawnSync('losetup', ['--find', '--show', file], { encoding: 'utf8' })
  if (probe.status !== 0) return false
  execFileSync('losetup', ['--detach', probe.stdout.trim()])
  return true
}

const possible = process.platform === 'linux' && losetupWorks()
if (!possible) process.stderr.write('SKIPPED (no loop devices): block devices\n')

describe.skipIf(!possible)('a block device', () => {
  afterEach(detachAll)

  it('is told as host_device', async () => {
    const path = device('a', MIB)
    const { stdout } = await qcow2(['info', '--output=json', '-f', 'raw', path], folder)
    expect(JSON.parse(stdout).children[0].info.format).toBe('host_device')
    await using image = await open(path, { format: 'raw' })
    expect((await image.info()).protocol).toBe('host_device')
    await using file = await open(join(folder, 'a'), { format: 'raw' })
    expect((await file.info()).protocol).toBe('file')
  })

  it('is not opened to write where it is read-only', async () => {
    const path = device('b', MIB, '--read-only')
    expect(await failure(() => open(path, { format: 'raw', flags: 'r+' }))).toMatchObject({
      code: 'EACCES',
      syscall: 'open',
      message: `EACCES: permission denied: the device is read-only, open '${path}'`,
      path,
    })
    await (await create(join(folder, 'source.qcow2'), { size: MIB })).close()
    // As qemu-img says it, and the same for every command that writes.
    const opening = `Could not open '${path}': The device is not writable: Permission denied`
    const creating = `Could not create '${path}': The device is not writable: Permission denied`
    for (const [line, said] of [
      [`resize -f raw ${path} 2M`, opening],
      [`snapshot -c s ${path}`, opening],
      [`amend -f qcow2 -o lazy_refcounts=on ${path}`, opening],
      [`bitmap --add ${path} b`, opening],
      [`check -f qcow2 -r all ${path}`, opening],
      [`convert -n -O raw source.qcow2 ${path}`, opening],
      [`convert -O qcow2 source.qcow2 ${path}`, `${path}: error while converting qcow2: ${creating}`],
      [`create -q -f qcow2 ${path} 1M`, `${path}: ${creating}`],
    ] as const) {
      const { code, stderr } = await asQemuImg(line.split(' '), folder)
      expect({ line, code, stderr }).toEqual({ line, code: 1, stderr: `qemu-img: ${said}\n` })
    }
    await (await open(path, { format: 'raw' })).close()
  })

  it('is not resized by way of its contents', async () => {
    const path = device('c', MIB)
    for (const args of [
      ['--shrink', path, '512k'],
      [path, '2M'],
    ]) {
      const refused = await qcow2(['resize', '-f', 'raw', ...args], folder)
      expect(refused).toMatchObject({ code: 1, stdout: '' })
      expect(refused.stderr).toContain('change the device itself')
    }
    const data = join(folder, 'c.qcow2')
    await (await create(data, { size: MIB / 2, dataFile: path, overwrite: true })).close()
    await using image = await open(data, { flags: 'r+', references: 'allow' })
    const error = await failure(() => image.truncate(8 * MIB))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', path })
    expect(error.message).toContain('extend the device first')
  })

  it('that is full says ENOSPC, and is noticed when it is extended', async () => {
    const path = device('d', MIB)
    await using image = await create(path, { size: 4 * MIB, overwrite: true })
    const bytes = Buffer.alloc(2 * MIB, 5)
    expect(await failure(() => image.write(bytes, { position: 0 }))).toMatchObject({ code: 'ENOSPC', path })
    const file = openSync(join(folder, 'd'), 'r+')
    ftruncateSync(file, 8 * MIB)
    closeSync(file)
    execFileSync('losetup', ['--set-capacity', path])
    await image.write(bytes, { position: 0 })
    expect((await image.check()).ok).toBe(true)
  })
})
