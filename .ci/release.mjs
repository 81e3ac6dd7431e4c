// What a release consists of: one platform package for each target, all of the root's version, each with the binary
// of its own platform. Used by pack.mjs, which builds the set, and check-release.mjs, which refuses a wrong one.
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { manifest } from './lib.mjs'

const ARCH = { x86_64: 'x64', aarch64: 'arm64' }

/** `x86_64-unknown-linux-gnu` -> what it is called in npm: `linux-x64-gnu`. */
function platformOf(triple) {
  const [cpu, , system, abi] = triple.split('-')
  const arch = ARCH[cpu]
  if (!arch) throw new Error(`napi.targets in package.json: no name for the processor of ${triple}`)
  if (system === 'darwin') return `darwin-${arch}`
  return `${{ linux: 'linux', windows: 'win32' }[system]}-${arch}-${abi}`
}

export const platforms = manifest.napi.targets.map(platformOf)
/** `linux-x64-gnu` -> `x86_64-unknown-linux-gnu`. */
export const tripleOf = platform => manifest.napi.targets[platforms.indexOf(platform)]
/** What is in a platform's package beside its manifest and its addon. */
export const NOTICES = 'THIRD-PARTY-LICENSES.txt'
/** What a release is made of, beside its packages. */
export const MATERIALS = 'qcow2.cdx.json'
export const packageName = platform => `${manifest.name}-${platform}`
export const binaryName = platform => `${manifest.napi.binaryName}.${platform}.node`

const MACHINES = {
  elf: { 62: 'x64', 183: 'arm64' },
  macho: { 16777223: 'x64', 16777228: 'arm64' },
  pe: { 34404: 'x64', 43620: 'arm64' },
}

/** The platform that a binary's own header names, such as `linux-x64-gnu`; undefined for anything else. */
export function platformOfBinary(bytes) {
  if (bytes.length < 64) return undefined
  if (bytes.readUInt32BE(0) === 0x7f454c46) {
    const arch = MACHINES.elf[bytes.readUInt16LE(18)]
    // The C library is named among the libraries that the loader must find.
    return arch && `linux-${arch}-${bytes.includes('libc.so.6\0') ? 'gnu' : 'musl'}`
  }
  if (bytes.readUInt32LE(0) === 0xfeedfacf) {
    const arch = MACHINES.macho[bytes.readUInt32LE(4)]
    return arch && `darwin-${arch}`
  }
  if (bytes.toString('latin1', 0, 2) === 'MZ') {
    const at = bytes.readUInt32LE(0x3c)
    if (at + 6 > bytes.length || bytes.toString('latin1', at, at + 4) !== 'PE\0\0') return undefined
    const arch = MACHINES.pe[bytes.readUInt16LE(at + 4)]
    return arch && `win32-${arch}-msvc`
  }
  return undefined
}

/**
 * Every reason not to publish what lies in `folder`: the root package in `root/`, platform packages in `npm/PLATFORM/`.
 * An empty list means that the set is complete and consistent.
 */
export function problemsOf(folder, wanted = platforms) {
  const problems = []
  const read = path => {
    if (existsSync(path)) return JSON.parse(readFileSync(path, 'utf8'))
    problems.push(`${path} is missing`)
    return undefined
  }
  const root = read(join(folder, 'root', 'package.json'))
  const version = root?.version
  if (root && version !== manifest.version) problems.push(`${root.name} is version ${version}, not ${manifest.version}`)
  for (const file of ['dist/index.js', 'dist/index.mjs', 'dist/index.d.ts', 'dist/cli.js', 'dist/command-line.js']) {
    if (root && !existsSync(join(folder, 'root', file))) problems.push(`${root.name} has no ${file}`)
  }
  for (const platform of platforms) {
    const name = packageName(platform)
    if (root && root.optionalDependencies?.[name] !== version) problems.push(`${root.name} does not ask for ${name}`)
  }
  for (const platform of wanted) {
    const at = join(folder, 'npm', platform)
    const found = read(join(at, 'package.json'))
    if (!found) continue
    if (found.name !== packageName(platform)) problems.push(`${at} holds ${found.name}`)
    if (found.version !== version) problems.push(`${found.name} is version ${found.version}, the root ${version}`)
    if (!existsSync(join(at, NOTICES))) problems.push(`${found.name} has no ${NOTICES}`)
    const binary = join(at, binaryName(platform))
    if (!existsSync(binary)) {
      problems.push(`${found.name} has no ${binaryName(platform)}`)
      continue
    }
    const actual = platformOfBinary(readFileSync(binary))
    if (actual !== platform) problems.push(`${binary} is built for ${actual ?? 'no platform that is known here'}`)
  }
  if (!existsSync(join(folder, MATERIALS))) problems.push(`${MATERIALS}, the bill of materials, is missing`)
  const strays = existsSync(join(folder, 'npm')) ? readdirSync(join(folder, 'npm')) : []
  for (const stray of strays.filter(name => !wanted.includes(name))) problems.push(`npm/${stray} is no target`)
  return problems
}
