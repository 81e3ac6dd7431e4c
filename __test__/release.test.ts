import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'

const PLATFORMS = [
  'linux-x64-gnu',
  'linux-x64-musl',
  'linux-arm64-gnu',
  'linux-arm64-musl',
  'darwin-x64',
  'darwin-arm64',
  'win32-x64-msvc',
  'win32-arm64-msvc',
]
const { version }: { version: string } = JSON.parse(readFileSync('package.json', 'utf8'))

/** The first bytes of a shared library for `platform`, as far as its format and machine are concerned. */
function binaryFor(platform: string): Buffer {
  const bytes = Buffer.alloc(512)
  const arm = platform.includes('arm64')
  if (platform.startsWith('linux')) {
    bytes.write('\x7fELF', 'latin1')
    bytes.writeUInt16LE(arm ? 0xb7 : 0x3e, 18)
    bytes.write(platform.endsWith('gnu') ? 'libc.so.6' : 'libc.so', 300)
  } else if (platform.startsWith('darwin')) {
    bytes.writeUInt32LE(0xfeedfacf, 0)
    bytes.writeUInt32LE(arm ? 0x0100000c : 0x01000007, 4)
  } else {
    bytes.write('MZ')
    bytes.writeUInt32LE(0x80, 0x3c)
    bytes.write('PE', 0x80)
    bytes.writeUInt16LE(arm ? 0xaa64 : 0x8664, 0x84)
  }
  return bytes
}

let folder: string

function file(path: string, content: string | Buffer) {
  mkdirSync(join(folder, path, '..'), { recursive: true })
  writeFileSync(join(folder, path), content)
}

const binary = (platform: string) => `npm/${platform}/qcow2.${platform}.node`

function gate() {
  const { status, stderr, stdout } = spawnSync(process.execPath, ['.ci/check-release.mjs', folder], {
    encoding: 'utf8',
  })
  return { status, stderr, stdout }
}

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'qcow2-release-'))
  const optionalDependencies = Object.fromEntries(PLATFORMS.map(name => [`qcow2-${name}`, version]))
  file('root/package.json', JSON.stringify({ name: 'qcow2', version, optionalDependencies }))
  for (const name of ['index.js', 'index.mjs', 'index.d.ts', 'cli.js', 'command-line.js']) file(`root/dist/${name}`, '')
  for (const platform of PLATFORMS) {
    file(`npm/${platform}/package.json`, JSON.stringify({ name: `qcow2-${platform}`, version }))
    file(`npm/${platform}/THIRD-PARTY-LICENSES.txt`, '')
    file(binary(platform), binaryFor(platform))
  }
  file('qcow2.cdx.json', '{}')
})

afterEach(() => rmSync(folder, { recursive: true }))

describe('the release gate', () => {
  test('accepts a complete set', () => {
    expect(gate()).toEqual({ status: 0, stderr: '', stdout: 'release: complete\n' })
  })

  test.each(PLATFORMS)('refuses a set without %s', platform => {
    rmSync(join(folder, 'npm', platform), { recursive: true })
    const { status, stderr } = gate()
    expect(status).toBe(1)
    expect(stderr).toContain(join('npm', platform, 'package.json is missing'))
  })

  test('refuses an addon without the licences of what is in it, and a set without its bill of materials', () => {
    rmSync(join(folder, 'npm/linux-x64-gnu/THIRD-PARTY-LICENSES.txt'))
    rmSync(join(folder, 'qcow2.cdx.json'))
    const { status, stderr } = gate()
    expect(status).toBe(1)
    expect(stderr).toContain('qcow2-linux-x64-gnu has no THIRD-PARTY-LICENSES.txt')
    expect(stderr).toContain('qcow2.cdx.json, the bill of materials, is missing')
  })

  test.each(PLATFORMS)('refuses %s without its binary', platform => {
    rmSync(join(folder, binary(platform)))
    const { status, stderr } = gate()
    expect(status).toBe(1)
    expect(stderr).toContain(`qcow2-${platform} has no qcow2.${platform}.node`)
  })

  test.each(PLATFORMS)('refuses another platform’s binary as %s', platform => {
    const other = PLATFORMS[(PLATFORMS.indexOf(platform) + 1) % PLATFORMS.length] ?? ''
    file(binary(platform), binaryFor(other))
    const { status, stderr } = gate()
    expect(status).toBe(1)
    expect(stderr).toContain(`is built for ${other}`)
  })

  test('refuses a platform package of another version', () => {
    file('npm/darwin-x64/package.json', JSON.stringify({ name: 'qcow2-darwin-x64', version: '0.0.1' }))
    const { status, stderr } = gate()
    expect(status).toBe(1)
    expect(stderr).toContain(`qcow2-darwin-x64 is version 0.0.1, the root ${version}`)
  })

  test('refuses a root that does not ask for a platform', () => {
    const optionalDependencies = Object.fromEntries(PLATFORMS.slice(1).map(name => [`qcow2-${name}`, version]))
    file('root/package.json', JSON.stringify({ name: 'qcow2', version, optionalDependencies }))
    const { status, stderr } = gate()
    expect(status).toBe(1)
    expect(stderr).toContain(`qcow2 does not ask for qcow2-${PLATFORMS[0]}`)
  })

  test('refuses what is cut short', () => {
    file(binary('linux-x64-gnu'), Buffer.from('\x7fELF', 'latin1'))
    const { status, stderr } = gate()
    expect(status).toBe(1)
    expect(stderr).toContain('is built for no platform that is known here')
  })
})
