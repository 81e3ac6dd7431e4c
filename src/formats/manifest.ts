/**
 * Manifests of appliances: a line for each file with its digest, as `SHA256(disk.vmdk)= 0123…`. Source: the OVF specification (DSP0243),
 * section "Distribution" (6.2). No file is opened here.
 */

import { Qcow2Error } from '../errors.js'

/** Digests of manifests, by the name that a line has: what Node calls each, and its bytes. */
const ALGORITHMS = {
  SHA1: { name: 'sha1', length: 20 },
  SHA256: { name: 'sha256', length: 32 },
  SHA512: { name: 'sha512', length: 64 },
} as const

/** A digest that a manifest has. */
export type ManifestAlgorithm = keyof typeof ALGORITHMS

/** One line of a manifest. */
export interface ManifestEntry {
  readonly file: string
  readonly algorithm: ManifestAlgorithm
  /** In lower case. */
  readonly digest: string
}

/** Longest manifest, in bytes, that is read. */
export const MAX_MANIFEST = 1 << 20
/** An appliance has no more files. */
const MAX_LINES = 3000

const LINE = /^(SHA1|SHA256|SHA512)\s*\((.+)\)\s*=\s*([0-9a-f]+)$/i

/** What Node calls a digest. */
export const hashName = (algorithm: ManifestAlgorithm): string => ALGORITHMS[algorithm].name

/** The name of the manifest that belongs to a descriptor, which is beside it. */
export const manifestOf = (descriptor: string): string => descriptor.replace(/\.ovf$/i, '.mf')

/** The name of the manifest beside a descriptor, by the path of that. */
export const manifestBeside = (path: string | undefined): string => manifestOf(/[^/\\]*$/.exec(path ?? '')?.[0] ?? '')

/**
 * The lines of a manifest.
 *
 * @throws Qcow2Error `ERR_QCOW2_LIMIT` for one that is too long, `ERR_QCOW2_INVALID_HEADER` for a line that is none, that names a file elsewhere,
 *   or one a second time
 */
export function readManifest(bytes: Buffer, name: string): readonly ManifestEntry[] {
  const refused = (code: 'ERR_QCOW2_LIMIT' | 'ERR_QCOW2_INVALID_HEADER', why: string): Qcow2Error =>
    new Qcow2Error(code, `the manifest '${name}' ${why}`, { field: 'manifest' })
  if (bytes.length > MAX_MANIFEST) throw refused('ERR_QCOW2_LIMIT', `has more than ${MAX_MANIFEST} bytes`)
  const lines = bytes
    .toString('utf8')
    .replace(/^\uFEFF/, '')
    .split(/\r?\n/)
  if (lines.length > MAX_LINES) throw refused('ERR_QCOW2_LIMIT', `has more than ${MAX_LINES} lines`)
  const seen = new Set<string>()
  return lines.flatMap((text, index) => {
    if (text.trim() === '') return []
    const entry = readLine(text.trim())
    const wrong =
      typeof entry === 'string' ? entry : seen.has(keyOf(entry)) ? `'${entry.file}' was there already` : undefined
    if (typeof entry === 'string' || wrong !== undefined) {
      throw refused('ERR_QCOW2_INVALID_HEADER', `is damaged in line ${index + 1}: ${wrong}`)
    }
    seen.add(keyOf(entry))
    return [entry]
  })
}

const keyOf = ({ algorithm, file }: ManifestEntry): string => `${algorithm} ${file}`

/** A line, or what is wrong with it. */
function readLine(line: string): ManifestEntry | string {
  const [, word = '', file = '', digits = ''] = LINE.exec(line) ?? []
  if (word === '') return 'it is no digest of a file (SHA1, SHA256 or SHA512)'
  const algorithm = word.toUpperCase() as ManifestAlgorithm
  if (/[/\\:\0]/.test(file) || file === '.' || file === '..') return `'${file}' is no file beside it`
  const { length } = ALGORITHMS[algorithm]
  if (digits.length !== 2 * length) return `a digest ${algorithm} has ${2 * length} digits, not ${digits.length}`
  return { file, algorithm, digest: digits.toLowerCase() }
}

/** The manifest among the names of an archive's files: that of its descriptor. */
export function manifestIn(names: readonly string[]): string | undefined {
  const descriptor = descriptorIn(names)
  return descriptor === undefined ? undefined : names.find(name => name === manifestOf(descriptor))
}

/** The descriptor among them. */
export const descriptorIn = (names: readonly string[]): string | undefined => names.find(name => /\.ovf$/i.test(name))
