/** QAPI documents as qemu-img prints them: its order of fields, four spaces, every character beyond ASCII escaped. */

export type Json = string | number | boolean | readonly Json[] | { readonly [key: string]: Json | undefined }

/**
 * The order in which qemu-img writes fields, which is the order of its hash table and the same in every run. One list
 * serves all documents: within each of them it gives QEMU's order.
 */
const FIELD_ORDER = [
  'write-zeroes-alignment',
  'request-alignment',
  'min-mem-alignment',
  'max-hw-transfer',
  'discard-alignment',
  'opt-mem-alignment',
  'max-iov',
  'max-hw-iov',
  'limits',
  'ivgen-alg',
  'compat',
  'icount',
  'flags',
  'vm-clock-nsec',
  'detached-header',
  'image-end-offset',
  'name',
  'active',
  'compressed-clusters',
  'hash-alg',
  'backing-image',
  'iters',
  'compression-type',
  'compressed',
  'lazy-refcounts',
  'date-sec',
  'bitmaps',
  'cipher-alg',
  'refcount-bits',
  'uuid',
  'total-clusters',
  'extent-size-hint',
  'corruptions',
  'data-file',
  'ivgen-hash-alg',
  'corruptions-fixed',
  'check-errors',
  'children',
  'backing-filename-format',
  'date-nsec',
  'granularity',
  'required',
  'leaks',
  'snapshots',
  'key-offset',
  'leaks-fixed',
  'allocated-clusters',
  'virtual-size',
  'filename',
  'cluster-size',
  'fully-allocated',
  'format',
  'encrypt',
  'actual-size',
  'format-specific',
  'data-file-raw',
  'full-backing-filename',
  'cipher-mode',
  'stripes',
  'slots',
  'vm-clock-sec',
  'payload-offset',
  'encrypted',
  'type',
  'master-key-iters',
  'backing-filename',
  'corrupt',
  'fragmented-clusters',
  'id',
  'vm-state-size',
  'info',
  'dirty-flag',
  'extended-l2',
  'data',
] as const

const RANK: ReadonlyMap<string, number> = new Map(FIELD_ORDER.map((name, index) => [name, index]))

/** The set fields of an object, in QEMU's order; what QEMU does not know comes last. */
export function fields(object: { readonly [key: string]: Json | undefined }): [string, Json][] {
  const present = Object.entries(object).filter((entry): entry is [string, Json] => entry[1] !== undefined)
  const rank = (name: string): number => RANK.get(name) ?? FIELD_ORDER.length
  return present.sort(([a], [b]) => rank(a) - rank(b))
}

/** A document, without a final newline. */
export function toJson(value: Json, depth = 0): string {
  if (typeof value !== 'object') return typeof value === 'string' ? quote(value) : String(value)
  const open = '    '.repeat(depth + 1)
  const lines = isList(value)
    ? value.map(item => open + toJson(item, depth + 1))
    : fields(value).map(([name, item]) => `${open}${quote(name)}: ${toJson(item, depth + 1)}`)
  const [left, right] = isList(value) ? '[]' : '{}'
  return `${left}\n${lines.length > 0 ? `${lines.join(',\n')}\n` : ''}${'    '.repeat(depth)}${right}`
}

export const isList = (value: Json): value is readonly Json[] => Array.isArray(value)

const SHORT_ESCAPES: Readonly<Record<string, string>> = {
  '"': '\\"',
  '\\': '\\\\',
  '\b': '\\b',
  '\f': '\\f',
  '\n': '\\n',
  '\r': '\\r',
  '\t': '\\t',
}

/** UTF-16 units, not code points: JSON writes what lies beyond the first plane as a pair. */
const quote = (text: string): string => `"${text.replace(/["\\]|[^ -~]/g, escapeUnit)}"`

const escapeUnit = (unit: string): string =>
  SHORT_ESCAPES[unit] ?? `\\u${unit.charCodeAt(0).toString(16).toUpperCase().padStart(4, '0')}`
