/** What to say to somebody who gives a call an option that it does not have, though another call, or another name, does. */

/** By call, then by the option that was given: what was probably meant. */
const MEANT: Readonly<Record<string, Readonly<Record<string, string>>>> = {
  open: {
    mode: "flags: 'r' is for reading, 'r+' for reading and writing",
    readOnly: "flags: 'r' is for reading, 'r+' for reading and writing",
    readonly: "flags: 'r' is for reading, 'r+' for reading and writing",
    write: "flags: 'r' is for reading, 'r+' for reading and writing",
    writable: "flags: 'r' is for reading, 'r+' for reading and writing",
    from: "open takes 'format' for the image's format",
    size: 'create makes a disk of a size, Image.truncate changes it',
    concurrency: 'a handle has no threads of its own: it is an option of jobs such as convert',
  },
  create: {
    to: "create takes 'format' for the new image's format",
    force: "create takes 'overwrite' to replace an existing file",
    flags: 'what create makes is open for writing',
  },
  convert: {
    format: "convert takes 'to' for the target's format and 'from' for the source's",
    force: "convert takes 'overwrite' to replace an existing file",
    size: "the target has the size of the source: 'start' and 'length' copy a part, Image.truncate gives another size",
    level: "it belongs into 'compress': { level: … }",
    window: "it belongs into 'compress': { window: … }",
    type: "it belongs into 'compress': { type: … }",
    compression: "convert takes 'compress'",
    encrypt: "it belongs into 'create': { encrypt: … }",
    cache: 'convert reads through the page cache and makes the target durable where it says so',
  },
  'Image.clone': {
    format: "Image.clone takes 'to' for the copy's format",
    force: "Image.clone takes 'overwrite' to replace an existing file",
    level: "it belongs into 'compress': { level: … }",
    window: "it belongs into 'compress': { window: … }",
    type: "it belongs into 'compress': { type: … }",
    compression: "Image.clone takes 'compress'",
  },
  createQcow2Stream: {
    format: "createQcow2Stream takes 'to' for the stream's format and 'from' for the source's",
    end: 'a stream goes to its end: destroy() ends it earlier',
    highWaterMark: 'a stream reads whole chunks of 1 MiB, some of them ahead',
    level: "it belongs into 'compress': { level: … }",
    length: "a stream has the whole disk: 'start' is the first byte of the stream",
  },
  measure: {
    format: "measure takes 'to' for the target's format and 'from' for the source's",
    size: 'the size of a new disk is the first argument: measure({ size }, options)',
    compress: 'how far data shrinks is known only when it has been compressed',
  },
  compare: {
    secret: "compare takes 'secretA' and 'secretB' for the secrets of the two images",
    format: "compare takes 'formatA' and 'formatB' for the formats of the two images",
    from: "compare takes 'formatA' and 'formatB' for the formats of the two images",
    to: "compare takes 'formatA' and 'formatB' for the formats of the two images",
  },
  rebase: {
    format: "rebase takes 'backingFormat' for the format of the new backing file; the image itself is qcow2",
    backingFile: 'the new backing file is the second argument: rebase(image, backing, options)',
    force: "rebase takes 'unsafe' together with 'acknowledgeDataLoss'",
  },
  commit: { flags: 'commit opens what it needs for writing by itself' },
  'Image.truncate': {
    force: "Image.truncate takes 'shrink' for a smaller size",
    size: 'the size is the first argument',
  },
  amend: {
    clusterSize: 'only a new image has a choice: convert the image',
    extendedL2: 'only a new image has a choice: convert the image',
    compressionType: 'only a new image has a choice: convert the image',
    preallocation: 'only a new part of a disk is preallocated: see Image.truncate',
    compat: "amend takes 'version'",
    force: "amend takes 'shrink' for a smaller size",
  },
  check: {
    flags: "check takes 'repair' to change what it finds",
    fix: "check takes 'repair'",
    force: "check takes 'repair'",
  },
}

/** Calls that work on qcow2 images only, or tell the format themselves. */
const QCOW2_ONLY: ReadonlySet<string> = new Set(['amend', 'commit', 'compact'])

/** Which calls take an option. A name that means the same everywhere and that many take is not here. */
const TAKEN_BY: Readonly<Record<string, string>> = {
  flags: 'open',
  format: 'open and create',
  discard: 'open',
  lazyRefcounts: 'open, amend and the shape of a new image',
  l2CacheSize: 'open',
  cache: 'open, commit and rebase',
  detectZeroes: 'open and rebase',
  snapshot: 'open, convert and measure',
  forceShare: 'the calls that only read',
  overwrite: 'create, convert and Image.clone',
  from: 'convert and measure',
  to: 'convert, measure and Image.clone',
  compress: 'convert, Image.clone and rebase',
  salvage: 'convert',
  sparseSize: 'convert',
  existingTarget: 'convert',
  targetIsZero: 'convert',
  bitmaps: 'convert',
  base: 'convert and commit',
  rate: 'convert and commit',
  drop: 'commit',
  shrink: 'Image.truncate and amend',
  preallocation: 'Image.truncate and the shape of a new image',
  repair: 'check',
  strict: 'compare',
  formatA: 'compare',
  formatB: 'compare',
  unsafe: 'rebase',
  acknowledgeDataLoss: 'rebase',
  mode: 'compact',
  zeroes: 'compact',
  dryRun: 'compact',
  onPointInTime: 'Image.clone',
  unmap: 'Image.writeZeroes',
  compressed: 'Image.write',
  sparse: 'Image.createReadStream',
  granularity: 'Bitmaps.add',
  onProgress: 'calls that can take long',
  progressInterval: 'calls that can take long',
  concurrency: 'calls that can take long',
  references: 'calls that open an image',
  limits: 'calls that open an image',
  secret: 'calls that read guest data, and encrypt',
  secretA: 'compare',
  secretB: 'compare',
  encrypt: 'the shape of a new image',
}

/** What belongs into `create`, where a call has that, and what into `limits`. */
const NESTED: Readonly<Record<string, ReadonlySet<string>>> = {
  create: new Set(
    (
      'version clusterSize extendedL2 compressionType preallocation refcountBits lazyRefcounts backingFile backingFormat dataFile dataFileRaw ' +
      'keepDataFile encrypt preset subformat static forceSize blockSize logSize blockStateZero logicalSectorSize adapterType ' +
      'hardwareVersion toolsVersion compat6 zeroedGrain'
    ).split(' '),
  ),
  limits: new Set('maxVirtualSize maxMetadataBytes maxSnapshots maxBitmaps maxChainDepth maxMemory'.split(' ')),
}

/** What was meant by an option that the call does not have; undefined where that is not known. `known` are those that it has. */
export function meantBy(option: string, owner: string, known: readonly string[]): string | undefined {
  const meant = Object.entries(MEANT).find(([call]) => call === owner)?.[1]
  const own = meant !== undefined && Object.hasOwn(meant, option) ? meant[option] : undefined
  if (own !== undefined) return own
  if (option === 'format' && QCOW2_ONLY.has(owner))
    return `${owner} is for qcow2 images only, which it knows by their magic`
  const inside = Object.keys(NESTED).find(name => known.includes(name) && NESTED[name]?.has(option))
  if (inside !== undefined) return `it belongs into '${inside}': { ${option}: … }`
  return undefined
}

/** Who takes the option, if anybody. */
export const takenBy = (option: string): string | undefined =>
  Object.hasOwn(TAKEN_BY, option) ? TAKEN_BY[option] : undefined
