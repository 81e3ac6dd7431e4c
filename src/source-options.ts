/** Options of calls that read a disk: of which format it is, what it may pull in, what opens it. */

import { SHARING, type SharingOptions } from './access.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { invalidArgument } from './errors.js'
import { DEFAULT_FORMAT, type Format, type StreamFormat } from './formats/table.js'
import { type Limits, limits, name, type Reader } from './options.js'
import { type Secrets, secrets } from './secret.js'
import { format, sourceFormat } from './source.js'
import type { Name } from './text.js'

/** What `convert` and `measure` read. */
export interface SourceOptions extends SharingOptions {
  /** Format of the source. Default: by its magic; raw, which has none, must be said. */
  from?: Format | undefined
  /** What the source may pull in. Default `'deny'`. */
  references?: ReferencePolicy | undefined
  /** What opens encrypted layers of the source; of a convert with `existingTarget`, of the target too. */
  secret?: Secrets | undefined
  /** Read this internal snapshot, by id or name. */
  snapshot?: Name | undefined
  /** What the image may claim before it is refused. */
  limits?: Limits | undefined
}

/** The table entries of {@link SourceOptions}. */
export const SOURCE = {
  ...SHARING,
  from: format,
  references: referencePolicy,
  secret: secrets,
  snapshot: name,
  limits,
} as const

/** What `convert` reads. */
export type SourceFormat = Format | StreamFormat

/** The format of a source, or of each of several. */
type ReadFormats = SourceFormat | readonly (SourceFormat | undefined)[]

/** Reads the `from` of a call that takes several sources. */
export const readFormats: Reader<ReadFormats> = (value, name) =>
  Array.isArray(value)
    ? value.map((each, index) => (each === undefined ? undefined : sourceFormat(each, `${name}[${index}]`)))
    : sourceFormat(value, name)

/** Each source has a format, where there is one for each. */
export function checkFormats(owner: string, from: ReadFormats | undefined, sources: number): void {
  if (sources === 0) throw invalidArgument('source', `${owner}: there must be a source`)
  if (Array.isArray(from) && from.length !== sources) {
    throw invalidArgument('from', `${owner}: from must have a format for each of the ${sources} sources`)
  }
}

/** What to write for a source that is of a format. */
export function fromAdvice(from: ReadFormats | undefined, index: number, sources: number, word: SourceFormat): string {
  if (sources === 1) return `from: '${word}'`
  const formats = Array.from({ length: sources }, (_, i) => {
    const given = typeof from === 'string' ? from : from?.[i]
    return `'${i === index ? word : (given ?? DEFAULT_FORMAT)}'`
  })
  return `from: [${formats.join(', ')}]`
}
