/** Appliances and other images inside of files: read in place, and nothing of what lies around them. */

import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdirSync, readFileSync, renameSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { check, convert, create, inspect, open, probe, type Reference, verifyManifest } from 'qcow2'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { qcow2, workspace } from '../cli/run.js'
import { failure } from './fixtures.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const SIZE = 1 << 20
const DISK = Buffer.concat([Buffer.alloc(300_000, 7), Buffer.alloc(SIZE - 300_000)])
const LONG = `${'a-long-name-'.repeat(12)}.qcow2`

/** An archive of the members, in that order. */
function tar(name: string, members: readonly string[], ...options: readonly string[]): string {
  execFileSync('tar', ['-cf', at(name), ...options, '-C', folder, ...members])
  return at(name)
}

beforeAll(async () => {
  writeFileSync(at('disk.raw'), DISK)
  writeFileSync(at('machine.ovf'), '<Envelope/>')
  writeFileSync(at('machine.mf'), 'SHA256(machine.ovf)= 0')
  await convert(at('disk.raw'), at('disk1.qcow2'), { from: 'raw', to: 'qcow2', compress: true })
  await convert(at('disk.raw'), at(LONG), { from: 'raw', to: 'qcow2' })
})

describe('an appliance', () => {
  it.each(['ustar', 'gnu', 'pax'])('is opened as its disk, which lies in it: %s', async format => {
    const path = tar(`${format}.ova`, ['machine.ovf', 'machine.mf', 'disk1.qcow2'], `--format=${format}`)
    expect(await convert(path, at('back.raw'), { to: 'raw', overwrite: true })).toMatchObject({ virtualSize: SIZE })
    expect(readFileSync(at('back.raw')).equals(DISK)).toBe(true)
    expect(await check(path)).toMatchObject({ ok: true, format: 'qcow2' })
    await using image = await open(path)
    const start = Buffer.alloc(4)
    await image.read(start, { position: 0 })
    expect(start).toEqual(Buffer.alloc(4, 7))
  })

  it.each(['gnu', 'pax'])('has members with long names: %s', async format => {
    const path = tar(`long-${format}.ova`, ['machine.ovf', LONG], `--format=${format}`)
    const { detected, disks } = await inspect(path)
    expect(detected).toBe('ova')
    expect(disks).toMatchObject([{ name: LONG, format: 'qcow2', length: statSync(at(LONG)).size }])
    await (await open(path)).close()
  })

  it('with several disks says which there are, and each is opened by its place', async () => {
    const path = tar('two.ova', ['machine.ovf', 'disk1.qcow2', LONG])
    expect(await failure(() => open(path))).toMatchObject({
      code: 'ERR_QCOW2_FORMAT_UNKNOWN',
      path,
      message: expect.stringMatching(/has 2 disks, disk1\.qcow2 \(offset \d+, length \d+\), .*: say which/),
    })
    const { disks = [] } = await inspect(path)
    expect(disks).toHaveLength(2)
    for (const { offset, length } of disks) {
      await convert({ file: path, offset, length }, at('back.raw'), { to: 'raw', overwrite: true })
      expect(readFileSync(at('back.raw')).equals(DISK)).toBe(true)
      expect(await inspect({ file: path, offset, length })).toMatchObject({ format: 'qcow2', safe: true })
      expect(await probe({ file: path, offset, length })).toBe('qcow2')
    }
  })

  it('is only read, and stays as it is', async () => {
    const path = tar('read.ova', ['machine.ovf', 'disk1.qcow2'])
    const before = readFileSync(path)
    expect(await failure(() => open(path, { flags: 'r+' }))).toMatchObject({ code: 'ERR_QCOW2_READ_ONLY' })
    expect(readFileSync(path).equals(before)).toBe(true)
  })

  it('that is cut short, damaged or empty says where', async () => {
    const path = tar('whole.ova', ['machine.ovf', 'disk1.qcow2'])
    const bytes = readFileSync(path)
    const second = 1024
    const damaged = Buffer.from(bytes)
    damaged.writeUInt8(damaged.readUInt8(second) ^ 1, second)
    for (const [name, content, message] of [
      ['cut', bytes.subarray(0, 3000), "the member 'disk1.qcow2' at 1024 goes on behind the archive's end"],
      ['damaged', damaged, 'the archive has no header at 1024'],
      ['bare', bytes.subarray(0, 1024), 'the appliance has no disk image that is known'],
    ] as const) {
      writeFileSync(at(name), content)
      expect(await failure(() => open(at(name)))).toMatchObject({
        code: 'ERR_QCOW2_FORMAT_UNKNOWN',
        message: `${at(name)}: ${message}`,
      })
    }
    expect((await inspect(at('damaged'))).findings.at(-1)?.message).toContain('no header at 1024')
    writeFileSync(at('long.ovf'), `<Envelope>${' '.repeat(5 << 20)}</Envelope>`)
    const long = (await inspect(at('long.ovf'))).findings.at(-1)
    expect(long).toMatchObject({ code: 'LIMIT', message: expect.stringContaining('4194304') })
    const many = Buffer.concat([bytes.subarray(0, 1024), ...Array<Buffer>(1001).fill(bytes.subarray(0, 1024))])
    writeFileSync(at('many'), many)
    expect((await inspect(at('many'))).findings.at(-1)).toMatchObject({ code: 'LIMIT' })
    expect(await failure(() => open(at('many')))).toMatchObject({ code: 'ERR_QCOW2_LIMIT' })
  })

  it('is no appliance where the caller says that it is a disk, or where the descriptor is missing', async () => {
    const path = tar('plain.ova', ['machine.ovf', 'disk1.qcow2'])
    await using raw = await open(path, { format: 'raw' })
    expect(raw.virtualSize).toBe(statSync(path).size)
    expect(await failure(() => open(tar('other.tar', ['disk1.qcow2'])))).toMatchObject({
      code: 'ERR_QCOW2_FORMAT_UNKNOWN',
    })
  })

  it('is taken by the command line', async () => {
    const path = tar('shell.ova', ['machine.ovf', 'disk1.qcow2'])
    expect(await qcow2(['convert', '-O', 'raw', path, 'shell.raw'], folder)).toMatchObject({ code: 0, stderr: '' })
    expect(readFileSync(at('shell.raw')).equals(DISK)).toBe(true)
    const { code, stdout } = await qcow2(['info', path], folder)
    expect([code, stdout]).toEqual([0, expect.stringContaining('file format: qcow2\nvirtual size: 1 MiB')])
  })
})

describe("an appliance's descriptor", () => {
  const envelope = (disks: string, files = ''): string =>
    `<?xml version="1.0"?><ovf:Envelope xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"><ovf:References>
     <ovf:File ovf:id="f1" ovf:href="disk1.qcow2" ovf:size="77"/><ovf:File ovf:id="f2" ovf:href="disk%202.qcow2"/>${files}
     </ovf:References><ovf:DiskSection>${disks}</ovf:DiskSection></ovf:Envelope>`
  const FIRST = `<ovf:Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="1" ovf:capacityAllocationUnits="byte * 2^20"/>`
  const SECOND = `<ovf:Disk ovf:diskId="d2" ovf:fileRef="f2" ovf:capacity="1048576" ovf:format="http://qcow" ovf:populatedSize="5"/>`

  /** An appliance of two disks with that descriptor. */
  function appliance(name: string, text: string): string {
    writeFileSync(at('machine.ovf'), text)
    writeFileSync(at('disk 2.qcow2'), readFileSync(at('disk1.qcow2')))
    return tar(name, ['machine.ovf', 'disk1.qcow2', 'disk 2.qcow2'])
  }
  afterAll(() => writeFileSync(at('machine.ovf'), '<Envelope/>'))

  it('is shown with its disks, in its order', async () => {
    const path = appliance('listed.ova', envelope(SECOND + FIRST))
    const listed = [
      { diskId: 'd2', href: 'disk%202.qcow2', capacity: SIZE, format: 'http://qcow', populatedSize: 5 },
      { diskId: 'd1', href: 'disk1.qcow2', fileSize: 77, capacity: SIZE },
    ]
    const found = await inspect(path)
    expect(found).toMatchObject({ detected: 'ova', descriptor: listed })
    expect(found.disks?.map(({ name }) => name)).toEqual(['disk 2.qcow2', 'disk1.qcow2'])
    expect(await inspect(at('machine.ovf'))).toMatchObject({ detected: 'ovf', format: 'unknown', descriptor: listed })
    const [big] = (await inspect(path, { bigint: true })).descriptor ?? []
    expect(big?.capacity).toBe(BigInt(SIZE))
  })

  it('says which disk is meant where it names one; else the caller does', async () => {
    const one = appliance('one-listed.ova', envelope(SECOND))
    expect(await convert(one, at('back.raw'), { to: 'raw', overwrite: true })).toMatchObject({ virtualSize: SIZE })
    const both = appliance('both-listed.ova', envelope(SECOND + FIRST))
    expect((await failure(() => open(both))).message).toMatch(
      /has 2 disks, disk 2\.qcow2 .*, disk1\.qcow2 .*: say which/,
    )
    const source = { file: both, member: 'disk1.qcow2' }
    await convert(source, at('back.raw'), { to: 'raw', overwrite: true })
    expect(readFileSync(at('back.raw')).equals(DISK)).toBe(true)
    expect(await probe(source)).toBe('qcow2')
    const missing = await failure(() => open({ file: both, member: 'no.vmdk' }))
    expect(missing.message).toContain("has no disk 'no.vmdk': there is disk 2.qcow2, disk1.qcow2")
    const none = await failure(() => open({ file: at('disk1.qcow2'), member: 'x' }))
    expect(none).toMatchObject({ code: 'ERR_QCOW2_FORMAT_UNKNOWN', message: expect.stringContaining('no appliance') })
    expect(await failure(() => open({ file: both, member: 7 } as never))).toMatchObject({
      code: 'ERR_QCOW2_INVALID_ARGUMENT',
      field: 'member',
    })
  })

  it('by itself is its disk, in its folder and as the policy allows it', async () => {
    appliance('beside.ova', envelope(SECOND + FIRST))
    const path = at('machine.ovf')
    const source = { file: path, member: 'd1' }
    const references = 'allow'
    await convert(source, at('back.raw'), { to: 'raw', overwrite: true, references })
    expect(readFileSync(at('back.raw')).equals(DISK)).toBe(true)
    expect(await probe(source, { references })).toBe('qcow2')
    const asked: string[] = []
    const ask = ({ kind, filename }: Reference): string => {
      asked.push(`${kind} ${filename}`)
      return at(filename)
    }
    await (await open({ file: path, member: 'disk 2.qcow2' }, { references: ask })).close()
    expect(asked).toEqual(['extent disk 2.qcow2'])
    for (const denied of ['deny', 'layer'] as const) {
      expect(await failure(() => open(source, { references: denied }))).toMatchObject({
        code: 'ERR_QCOW2_REFERENCE_DENIED',
      })
    }
    expect((await failure(() => open(path, { references }))).message).toMatch(
      /has 2 disks, disk 2\.qcow2, disk1\.qcow2: say/,
    )
    const away = envelope(FIRST.replace('f1', 'f3'), '<ovf:File ovf:id="f3" ovf:href="..%2Fdisk1.qcow2"/>')
    writeFileSync(path, away)
    expect(await failure(() => open(path, { references }))).toMatchObject({
      code: 'ERR_QCOW2_REFERENCE_DENIED',
      message: expect.stringContaining('names another place'),
    })
    writeFileSync(path, away.replace('..%2F', 'no-'))
    expect((await failure(() => open(path, { references }))).message).toContain("the disk 'no-disk1.qcow2' of '")
  })

  it('is listed by the command line, where a disk of several is chosen', async () => {
    const path = appliance('chosen.ova', envelope(SECOND + FIRST))
    const plain = await qcow2(['info', path], folder)
    expect(plain).toMatchObject({ code: 0, stderr: '' })
    expect(plain.stdout).toMatch(/^image: \S*\nfile format: ova\ndisk size: .*disk id: d2\n.*file: disk1\.qcow2\n/s)
    const disk = { populated: true, present: true, capacity: SIZE, 'image-format': 'qcow2' }
    const length = statSync(at('disk1.qcow2')).size
    const disks = [
      { ...disk, 'disk-id': 'd2', file: 'disk 2.qcow2', 'populated-size': 5, format: 'http://qcow' },
      { ...disk, 'disk-id': 'd1', file: 'disk1.qcow2', 'file-size': length },
    ]
    for (const file of [path, 'machine.ovf']) {
      const all = JSON.parse((await qcow2(['info', '--output=json', file], folder)).stdout)
      expect(all).toMatchObject({ format: file === path ? 'ova' : 'ovf', appliance: { disks } })
      const one = await qcow2(['info', '--output=json', '--member', 'd1', file], folder)
      expect(JSON.parse(one.stdout)).toMatchObject({ format: 'qcow2', 'virtual-size': SIZE, appliance: { disks } })
      const several = await qcow2(['map', file], folder)
      expect(several).toMatchObject({ code: 1, stderr: expect.stringContaining('has 2 disks, disk 2.qcow2') })
      expect(several.stderr).toContain('--member NAME')
      const same = await qcow2(['compare', '--member', 'd1', '--member=disk 2.qcow2', file, file], folder)
      expect(same).toMatchObject({ code: 0, stdout: 'Images are identical.\n' })
      const described = ['check', '--image-opts', `driver=qcow2,file.filename=${file},file.member=d1`]
      expect(await qcow2(described, folder)).toMatchObject({ code: 0, stdout: expect.stringMatching(/^No errors/) })
      const copy = ['convert', '--member', 'disk1.qcow2', '-O', 'raw', file, 'chosen.raw']
      expect(await qcow2(copy, folder)).toMatchObject({ code: 0, stderr: '' })
      expect(readFileSync(at('chosen.raw')).equals(DISK)).toBe(true)
    }
    const dd = ['dd', '--member=d1', 'bs=1M', `if=${path}`, 'of=dd.raw']
    expect(await qcow2(dd, folder)).toMatchObject({ code: 0 })
    expect(readFileSync(at('dd.raw')).equals(DISK)).toBe(true)
    expect(await qcow2(['measure', '--member=d1', '-O', 'raw', path], folder)).toMatchObject({ code: 0 })
    const missing = await qcow2(['map', '--member=d9', path], folder)
    expect(missing.stderr).toContain("has no disk 'd9': there is disk 2.qcow2, disk1.qcow2")
    const twice = await qcow2(['map', '--member=a', '--member=b', path], folder)
    expect(twice).toMatchObject({ code: 1, stderr: expect.stringContaining('--member is given 2 times') })
  })

  it('that is damaged is a finding, and hides no disk', async () => {
    const path = appliance('damaged.ova', '<!DOCTYPE x [<!ENTITY a "b">]><Envelope><File href="&a;"/></Envelope>')
    const found = await inspect(path)
    expect(found.findings.at(-1)).toMatchObject({ code: 'HEADER_INVALID', message: expect.stringContaining('OVF') })
    expect(found.disks).toHaveLength(2)
    expect((await inspect(at('machine.ovf'))).findings.at(-1)?.message).toContain('OVF')
  })
})

describe("an appliance's manifest", () => {
  const digest = (algorithm: string, name: string): string =>
    `${algorithm}(${name})= ${createHash(algorithm)
      .update(readFileSync(at(name)))
      .digest('hex')}`
  const pack = (name: string, ...lines: string[]): string => {
    writeFileSync(at('machine.mf'), `${lines.join('\r\n')}\n`)
    return tar(name, ['machine.ovf', 'machine.mf', 'disk1.qcow2'])
  }

  it('is compared with the files, in the archive and beside a descriptor', async () => {
    const path = pack('good.ova', digest('SHA1', 'machine.ovf'), digest('SHA512', 'disk1.qcow2'))
    expect(await inspect(path)).toMatchObject({ manifest: 'machine.mf' })
    const files = [
      { name: 'machine.ovf', algorithm: 'SHA1', state: 'ok' },
      { name: 'disk1.qcow2', algorithm: 'SHA512', state: 'ok' },
    ]
    const good = { manifest: 'machine.mf', ok: true, files, unlisted: [] }
    expect(await verifyManifest(path)).toMatchObject({ filename: path, ...good })
    expect(await verifyManifest(at('machine.ovf'), { references: 'allow' })).toMatchObject(good)
    expect(await failure(() => verifyManifest(at('machine.ovf')))).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    const bytes = readFileSync(path)
    const [{ offset = 0 } = {}] = (await inspect(path)).disks ?? []
    writeFileSync(at('bad.ova'), bytes.fill(bytes.readUInt8(offset + 99) ^ 1, offset + 99, offset + 100))
    const bad = await qcow2(['check', '--manifest', '--output=json', 'bad.ova'], folder)
    expect(bad).toMatchObject({ code: 2, stderr: expect.stringContaining('ERROR disk1.qcow2: SHA512 is ') })
    expect(JSON.parse(bad.stdout)).toMatchObject({ corruptions: 1, files: [{ state: 'ok' }, { state: 'mismatch' }] })
    expect(await qcow2(['check', '--manifest', 'machine.ovf'], folder)).toMatchObject({ code: 0, stderr: '' })
    const lost = pack('lost.ova', digest('SHA256', 'disk1.qcow2').replace('disk1', 'disk7'))
    expect(await verifyManifest(lost)).toMatchObject({
      ok: false,
      files: [{ state: 'missing' }],
      unlisted: ['machine.ovf', 'disk1.qcow2'],
    })
    const without = tar('without.ova', ['machine.ovf', 'disk1.qcow2'])
    expect(await inspect(without)).not.toHaveProperty('manifest')
    expect(await qcow2(['check', '--manifest', without], folder)).toMatchObject({ code: 63 })
  })

  it('that is damaged or absurd is an error', async () => {
    const line = digest('SHA256', 'disk1.qcow2')
    for (const [text, code, message] of [
      [line.replace('disk1', '../disk1'), 'ERR_QCOW2_INVALID_HEADER', "line 1: '../disk1.qcow2' is no file beside it"],
      [`${line}\n${line}`, 'ERR_QCOW2_INVALID_HEADER', 'line 2: '],
      [`${line}0`, 'ERR_QCOW2_INVALID_HEADER', 'has 64 digits, not 65'],
      ['MD5(disk1.qcow2)= 00', 'ERR_QCOW2_INVALID_HEADER', 'no digest of a file'],
      ['\n'.repeat(4000), 'ERR_QCOW2_LIMIT', '3000 lines'],
      [' '.repeat(2 << 20), 'ERR_QCOW2_LIMIT', '1048576 bytes'],
    ] as const) {
      const found = await failure(() => verifyManifest(pack('absurd.ova', text)))
      expect(found).toMatchObject({ code, field: 'manifest', message: expect.stringContaining(message) })
    }
    expect(await failure(() => verifyManifest(at('disk1.qcow2')))).toMatchObject({ code: 'ERR_QCOW2_FORMAT_UNKNOWN' })
  })
})

describe('an image in a file', () => {
  it('names nothing that lies around it', async () => {
    const inner = at('inner.qcow2')
    await (await create(inner, { size: SIZE })).close()
    const bytes = readFileSync(inner)
    writeFileSync(at('around'), Buffer.concat([Buffer.alloc(777, 1), bytes, Buffer.alloc(5000, 2)]))
    const source = { file: at('around'), offset: 777, length: bytes.length }
    expect(await check(source)).toMatchObject({ ok: true })
    // A raw disk ends where the part does.
    await using raw = await open({ ...source, length: 512 }, { format: 'raw' })
    expect(raw.virtualSize).toBe(512)
    for (const bad of [
      { ...source, offset: -1 },
      { ...source, length: 0.5 },
    ]) {
      expect(await failure(() => open(bad))).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
    }
  })

  it('finds what it names beside the file that it is in', async () => {
    mkdirSync(at('kept'))
    await (await create(at('base.qcow2'), { size: SIZE })).close()
    await (await create(at('top.qcow2'), { backingFile: 'base.qcow2', backingFormat: 'qcow2' })).close()
    const path = tar('kept/chain.ova', ['machine.ovf', 'top.qcow2'])
    expect(await failure(() => open(path))).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    renameSync(at('base.qcow2'), at('kept/base.qcow2'))
    await (await open(path, { references: 'allow' })).close()
  })
})
