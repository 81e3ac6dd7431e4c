/** Who decides what an image may pull in. */

import { invalidArgument, Qcow2Error } from '../errors.js'
import type { Format } from '../formats/table.js'
import type { NativeNamedFile } from '../native.js'
import type { Reader } from '../options.js'
import { type ImageSource, type Located, toLocated } from '../source.js'
import { answer } from '../support/signals.js'
import { shown, shownText } from '../text.js'
import { describe } from '../units.js'
import { type FileName, readDataFileName, readExtentName, readFileName } from './filename.js'

/** A file that an image names. */
export interface Reference {
  /** What the image takes the file for. */
  readonly kind: 'backing' | 'data-file' | 'extent'
  /** The name exactly as the image has it: not resolved, not trusted. Of a parent that a `vdi` image knows by its UUID alone: `uuid:` and that. */
  readonly filename: string
  /** The bytes of `filename`, where they are not UTF-8: it then has replacement characters. */
  readonly filenameBytes?: Buffer
  /** The format that the image claims for it, if any. A data file is always raw. An extent is a part of the image. */
  readonly format?: string
  /** The file that names it, as it was opened. */
  readonly from: string
  /** The bytes of `from`, where they are not UTF-8. */
  readonly fromBytes?: Buffer
}

/**
 * What an image may pull in:
 *
 * - `'deny'` (the default): an image that names a backing file or a data file is refused
 * - `'layer'`: the image is opened alone. What only a backing file has reads as zeroes, and reading what is in an external data file or
 *   an extent fails. For tools that look at one layer; `convert` refuses it
 * - `'allow'`: names are followed as QEMU follows them: a backing file's from the directory of the image that names it, a data
 *   file's from the working directory of the process. Never `json:` descriptions or protocols (`nbd:`, `http:`). An extent (`vmdk`, `parallels`) has a
 *   plain name, of a file in the directory of the image: QEMU follows any; so has a disk that an OVF descriptor lists. A UUID (`vdi`) names no
 *   file
 * - a function: called for every reference, returns what to open instead, or `null` to refuse
 */
export type ReferencePolicy =
  | 'deny'
  | 'layer'
  | 'allow'
  | ((reference: Reference) => ImageSource | null | Promise<ImageSource | null>)

export const referencePolicy: Reader<ReferencePolicy> = (value, name) => {
  if (value === 'deny' || value === 'layer' || value === 'allow') return value
  if (typeof value === 'function') return value as ReferencePolicy
  throw invalidArgument(name, `${name} must be 'deny', 'layer', 'allow' or a function, not ${describe(value)}`)
}

/** The file below an image that the caller has for it, whatever name the image stores. */
export interface Below {
  readonly path: string
  readonly format: Format | undefined
}

/** The file below the image at a path; undefined where the caller has none. */
export type BelowOf = (path: string) => Below | undefined

/** Policies that follow names as `'allow'` does, but for images that the caller has the file below of. */
const following = new WeakMap<ReferencePolicy & object, BelowOf>()

/** As `'allow'`, but for the images that `belowOf` knows. It knows paths with all their bytes (`text.ts`). */
export function allowBut(belowOf: BelowOf): ReferencePolicy {
  const policy = (): null => null
  following.set(policy, belowOf)
  return policy
}

/** What the caller has below an image. */
export const belowIn = (policy: ReferencePolicy, path: string | undefined): Below | undefined =>
  typeof policy === 'function' && path !== undefined ? following.get(policy)?.(path) : undefined

interface Kind {
  readonly name: string
  /** What the formats call the field. */
  readonly field: string
  /** Reads a name, which may start from the directory of the image at `from`. */
  readonly read: (name: string, from: string | undefined) => FileName
}

/** What an image can name. */
export const KINDS: Readonly<Record<Reference['kind'], Kind>> = {
  backing: { name: 'backing file', field: 'backing_file', read: readFileName },
  'data-file': { name: 'external data file', field: 'external data file name', read: readDataFileName },
  extent: { name: 'extent', field: 'extent', read: readExtentName },
}

/** `backing file 'base.qcow2'` */
export const nameOf = ({ kind, filename }: Pick<Reference, 'kind' | 'filename'>): string =>
  `${KINDS[kind].name} '${filename}'`

/** What to open for a reference; undefined for nothing (`'layer'`). */
export async function decide(
  policy: ReferencePolicy,
  kind: Reference['kind'],
  named: NativeNamedFile,
  path: string | undefined,
  /** The path whose directory a relative name of a backing file or an extent starts from. */
  folder: string | undefined,
  signal: AbortSignal | undefined,
): Promise<(Located & { readonly format?: Format | undefined }) | undefined> {
  if (policy === 'layer') return undefined
  const below = kind === 'backing' ? belowIn(policy, path) : undefined
  if (below !== undefined) return below
  const { filename, format } = named
  const reference: Reference = {
    kind,
    ...shown('filename', filename),
    ...shown('from', path ?? ''),
    ...(format !== undefined && { format: shownText(format) }),
  }
  if (policy === 'deny') {
    const hint = "pass references: 'allow', 'layer' or a function that says what to open"
    throw denied(reference, path, `nothing that an image names is opened unless the caller allows it: ${hint}`)
  }
  if (policy === 'allow' || (typeof policy === 'function' && following.has(policy))) {
    const name = KINDS[kind].read(filename, folder)
    if ('refused' in name) throw denied(reference, path, `its name cannot be followed: ${name.refused}`)
    return { path: name.path }
  }
  const source = await answer(() => policy(reference), signal)
  if (source === null) throw denied(reference, path, 'the resolver refused it')
  return toLocated(source, 'the source that references returned')
}

function denied(reference: Reference, path: string | undefined, reason: string): Qcow2Error {
  const { field } = KINDS[reference.kind]
  const message = `${path === undefined ? '' : `${path}: `}the ${nameOf(reference)} was not opened: ${reason}`
  return new Qcow2Error('ERR_QCOW2_REFERENCE_DENIED', message, { path, field })
}
