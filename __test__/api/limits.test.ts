/** Bounds on what an image may claim. */

import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, convert, create, inspect, type Limits, open } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { failure, temporaryFolder } from './fixtures.js'

const folder = temporaryFolder()
const path = join(folder, 'disk.qcow2')

beforeAll(async () => {
  // An L1 table of 2048 entries, 16 KiB.
  await (await create(path, { size: 2 ** 40 })).close()
})

const tight: [string, Limits, RegExp][] = [
  ['the virtual size', { maxVirtualSize: 2 ** 40 - 1 }, /size of 1099511627776 exceeds the limit of 1099511627775/],
  ['the metadata', { maxMetadataBytes: 16383 }, /16384 exceeds the limit of 16383/],
]

describe.each(tight)('%s', (_, limits, message) => {
  it('is bounded for open, check and convert', async () => {
    for (const call of [
      () => open(path, { limits }),
      () => check(path, { limits }),
      () => convert(path, join(folder, 'out'), { to: 'raw', limits }),
    ]) {
      const error = await failure(call)
      expect(error).toMatchObject({ code: 'ERR_QCOW2_LIMIT', path })
      expect(error.message).toMatch(message)
    }
  })

  it('is a finding of an inspection', async () => {
    const { findings, safe } = await inspect(path, { limits })
    expect(safe).toBe(false)
    expect(findings.map(({ code }) => code)).toContain('LIMIT')
    expect(findings.map(finding => finding.message).join()).toMatch(message)
  })
})

it('what is just within the limits opens', async () => {
  const image = await open(path, { limits: { maxVirtualSize: 2n ** 40n, maxMetadataBytes: 65536 } })
  expect(image.virtualSize).toBe(2 ** 40)
  await image.close()
})

it('a check that needs more memory than allowed says so', async () => {
  expect((await failure(() => check(path, { limits: { maxMemory: 1 } }))).code).toBe('ERR_QCOW2_LIMIT')
})

it('a disk beyond 2^53 - 1 bytes is an error, never a rounded number', async () => {
  // The smallest header there is: version 3, 2 MiB clusters, a size that no number holds.
  const header = Buffer.alloc(4096)
  header.write('QFI\xfb', 'latin1')
  header.writeUInt32BE(3, 4)
  header.writeUInt32BE(21, 20)
  header.writeBigUInt64BE(2n ** 53n, 24)
  header.writeUInt32BE(16384, 36)
  header.writeBigUInt64BE(0x400000n, 40)
  header.writeBigUInt64BE(0x200000n, 48)
  header.writeUInt32BE(1, 56)
  header.writeUInt32BE(4, 96)
  header.writeUInt32BE(104, 100)
  const huge = join(folder, 'huge.qcow2')
  writeFileSync(huge, Buffer.concat([header, Buffer.alloc(0x420000)]))
  const error = await failure(() => open(huge))
  expect(error).toMatchObject({ code: 'ERR_QCOW2_LIMIT', path: huge })
  expect(error.message).toContain('9007199254740992')
  header.writeBigUInt64BE(2n ** 53n - 512n, 24)
  writeFileSync(huge, Buffer.concat([header, Buffer.alloc(0x420000)]))
  await using image = await open(huge)
  expect(image.virtualSize).toBe(2 ** 53 - 512)
  expect((await image.read(Buffer.alloc(1024), { position: 2 ** 53 - 1024 })).bytesRead).toBe(512)
})
