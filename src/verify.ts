/** Appliances against their manifests: the one job that reads the bytes of files in JavaScript, which Node's own digests take. */

import { archiveError } from './backing/appliance.js'
import { partOf, withFileBytes } from './backing/file-bytes.js'
import { decide, type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { Qcow2Error } from './errors.js'
import {
  descriptorIn,
  hashName,
  MAX_MANIFEST,
  type ManifestAlgorithm,
  type ManifestEntry,
  manifestBeside,
  manifestIn,
  manifestOf,
  readManifest,
} from './formats/manifest.js'
import { isOva, isOvf, type Member, members } from './formats/ova.js'
import type { FileBytes } from './formats/sizes.js'
import { ABORTABLE, type Abortable, readOptions, throwIfAborted } from './options.js'
import { type FileLocated, type ImageSource, isFile, openFile, release, toLocated } from './source.js'
import { shown } from './text.js'

/** Options of {@link verifyManifest}. */
export interface VerifyOptions extends Abortable {
  /** What a descriptor by itself (`.ovf`) may pull in: its manifest and the files that this lists (`kind: 'extent'`). Default `'deny'`. */
  references?: ReferencePolicy | undefined
}

/** A file that a manifest lists. */
export interface VerifiedFile {
  /** The file, as the manifest names it. */
  readonly name: string
  /** Of the digest. */
  readonly algorithm: ManifestAlgorithm
  /** The digest in the manifest, in hexadecimal. */
  readonly expected: string
  /** The digest of the file; absent where there is no such file. */
  readonly actual?: string
  /** Whether it is there and has its digest. */
  readonly state: 'ok' | 'mismatch' | 'missing'
}

/** What {@link verifyManifest} found. */
export interface VerifyResult {
  /** The appliance or descriptor, as it was opened. */
  readonly filename: string
  /** The bytes of `filename`, where they are not UTF-8. */
  readonly filenameBytes?: Buffer
  /** The name of the manifest. */
  readonly manifest: string
  /** Each file that the manifest lists is there, and has its digest. */
  readonly ok: boolean
  /** What the manifest lists, in its order. */
  readonly files: readonly VerifiedFile[]
  /** Files of an archive that the manifest says nothing about, but for itself and its certificate. */
  readonly unlisted: readonly string[]
}

const VERIFY = { ...ABORTABLE, references: referencePolicy } as const

/** Bytes that are read at once. */
const CHUNK = 1 << 20

/** The files that a manifest is about. */
interface Files {
  /** The name of the manifest. */
  readonly manifest: string
  /** Runs `work` on the bytes of a file; undefined where there is none of that name. */
  readonly read: <T>(name: string, work: (bytes: FileBytes) => Promise<T>) => Promise<T | undefined>
  readonly names: readonly string[]
}

/**
 * Compares the files of an appliance (`.ova`), or those beside a descriptor (`.ovf`), with the digests in its manifest (`.mf`). A digest that differs
 * and a file that is missing are results, not errors. Nothing says who wrote the manifest: a certificate is not looked at.
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_FORMAT_UNKNOWN` for what is no appliance, or one without a manifest (field `manifest`);
 *   `ERR_QCOW2_INVALID_HEADER` and `ERR_QCOW2_LIMIT` for a manifest that is damaged or too long; `ERR_QCOW2_REFERENCE_DENIED`; the system's code
 */
export async function verifyManifest(source: ImageSource, options?: VerifyOptions): Promise<VerifyResult> {
  const located = toLocated(source, 'source')
  const { signal, references: policy = 'deny' } = readOptions(options, 'verifyManifest', VERIFY)
  throwIfAborted(signal)
  const { file, head, path } = await openFile(located, {}, signal)
  await release(file)
  const name = path === undefined ? '' : `${path}: `
  if (!isFile(located) || !(isOva(head) || isOvf(head))) {
    throw new Qcow2Error('ERR_QCOW2_FORMAT_UNKNOWN', `${name}no appliance, which would have a manifest`, { path })
  }
  return await withFileBytes(located, async bytes => {
    const files = isOva(head) ? await archived(bytes, path) : beside(path, policy, signal)
    const text = await files.read(files.manifest, each => each.at(0, MAX_MANIFEST + 1))
    if (text === undefined) {
      const message = `${name}the appliance has no manifest ('${files.manifest}')`
      throw new Qcow2Error('ERR_QCOW2_FORMAT_UNKNOWN', message, { path, field: 'manifest' })
    }
    const entries = readManifest(text, files.manifest)
    const found: VerifiedFile[] = []
    for (const entry of entries) found.push(await verified(entry, files, signal))
    const listed = new Set([files.manifest, ...entries.map(entry => entry.file)])
    return {
      ...shown('filename', path ?? ''),
      manifest: files.manifest,
      ok: found.every(({ state }) => state === 'ok'),
      files: found,
      unlisted: files.names.filter(each => !listed.has(each) && !/\.cert$/i.test(each)),
    }
  })
}

async function verified(
  { file, algorithm, digest }: ManifestEntry,
  { read }: Files,
  signal: AbortSignal | undefined,
): Promise<VerifiedFile> {
  const said = { name: file, algorithm, expected: digest }
  const actual = await read(file, bytes => digestOf(bytes, algorithm, signal))
  if (actual === undefined) return { ...said, state: 'missing' }
  return { ...said, actual, state: actual === digest ? 'ok' : 'mismatch' }
}

/** Loads what makes digests only now: nothing else needs it. */
async function digestOf(
  bytes: FileBytes,
  algorithm: ManifestAlgorithm,
  signal: AbortSignal | undefined,
): Promise<string> {
  const { createHash } = require('node:crypto') as typeof import('node:crypto')
  const hash = createHash(hashName(algorithm))
  for (let position = 0; ; ) {
    throwIfAborted(signal)
    const chunk = await bytes.at(position, CHUNK)
    hash.update(chunk)
    position += chunk.length
    if (chunk.length < CHUNK) return hash.digest('hex')
  }
}

/** The members of an archive. One that stands there twice is the last of these, as a program that unpacks them has it. */
async function archived(bytes: FileBytes, path: string | undefined): Promise<Files> {
  const found = await members(bytes).catch((error: unknown) => {
    throw error instanceof RangeError ? archiveError(error, path) : error
  })
  const byName = new Map<string, Member>(found.map(member => [member.name, member]))
  const names = [...byName.keys()]
  return {
    manifest: manifestIn(names) ?? manifestOf(descriptorIn(names) ?? '.ovf'),
    names,
    read: async (name, work) => {
      const member = byName.get(name)
      return member && (await work(partOf(bytes, member)))
    },
  }
}

/** The files in a descriptor's folder. */
function beside(path: string | undefined, policy: ReferencePolicy, signal: AbortSignal | undefined): Files {
  return {
    manifest: manifestBeside(path),
    names: [],
    read: async (filename, work) => {
      const located = await decide(policy, 'extent', { filename }, path, path, signal)
      if (located === undefined || !isFile(located)) {
        const message = `the file '${filename}' is not read: references has to give a file for it`
        throw new Qcow2Error('ERR_QCOW2_REFERENCE_DENIED', message, { path, field: 'references' })
      }
      return await withFile(located, work, signal)
    },
  }
}

async function withFile<T>(
  located: FileLocated,
  work: (bytes: FileBytes) => Promise<T>,
  signal: AbortSignal | undefined,
): Promise<T | undefined> {
  const file = await openFile(located, {}, signal).catch((error: unknown) => {
    if (error instanceof Qcow2Error && error.code === 'ENOENT') return undefined
    throw error
  })
  if (file === undefined) return undefined
  await release(file.file)
  return await withFileBytes(located, work)
}
