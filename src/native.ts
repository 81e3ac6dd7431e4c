/**
 * The addon: found, loaded, and typed. The one module that loads it.
 *
 * Looked for in this order: the file that `NAPI_RS_NATIVE_LIBRARY_PATH` names, the local build beside the compiled
 * library, the platform's own package (`qcow2-linux-x64-gnu` and so on), which npm installs as an optional dependency.
 */

import { existsSync } from 'node:fs'
import { dirname, isAbsolute, join, resolve } from 'node:path'
import { Qcow2Error } from './errors.js'
import type {
  NativeAmendChanges,
  NativeBacking,
  NativeCloneOrder,
  NativeCommitOrder,
  NativeConvertJob,
  NativeFailure,
  NativeFileOptions,
  NativeKeyOrder,
  NativeKeyRemovalOrder,
  NativeLayerOptions,
  NativeLimits,
  NativeLock,
  NativeNbdConnect,
  NativeNbdOrder,
  NativeOverlayOrder,
  NativeSecret,
  NativeShape,
  NativeSourceFailure,
  NativeSourceOptions,
  NativeSpoolOptions,
  NativeStreamOrder,
  NativeWriting,
} from './native-objects.js'
import type { Plan } from './snapshot/types.js'

export type * from './native-objects.js'

/**
 * The addon's functions. Names and paths are strings that have every byte: see `text.ts`. Those that take a `request` number return at once; what comes of it is delivered under that
 * number (`support/requests.ts`). Arguments are checked here in TypeScript: the addon trusts them.
 */
export interface Addon {
  start(deliver: (count: number, others: readonly unknown[] | undefined) => void, numbers: Uint32Array): void
  /** Calls `deliver` with what is done. True: call this again in the next round of the event loop, nothing wakes the thread before. */
  look(deliver: (count: number, others: readonly unknown[] | undefined) => void): boolean
  /** Tells the number of the spool. The job ends what waits for its bytes, whenever it is cancelled. */
  openSpool(request: number, job: number, folder: string, options: NativeSpoolOptions): void
  /** One at a time. */
  feedSpool(request: number, spool: number, buffer: Uint8Array, offset: number, length: number): void
  endSpool(spool: number): void
  /** Fills the buffer with bytes that have come. */
  readSpool(request: number, spool: number, buffer: Uint8Array, position: number): void
  /** Bytes; `wanted` is 1 where somebody waits for what did not come. */
  spoolProgress(spool: number): [came: number, stored: number, peak: number, wanted: number]
  /** The number of a new file: what comes, or a part of it. */
  spooledFile(spool: number, offset: number | undefined, length: number | undefined): number
  /** Ends all work and closes all images, now. Nothing is delivered any more. */
  stop(): void
  openFile(request: number, path: string, options: NativeFileOptions): void
  /** Absent on Windows. */
  openDescriptor?(request: number, descriptor: number, options: NativeFileOptions): void
  /** The URI of an export, or why its name is none. */
  nbdLocation(name: string): string | NativeFailure
  /** The job ends the connection, whenever it is cancelled. */
  openNbd(request: number, job: number, name: string, options: NativeNbdConnect): void
  /** A place where questions to one object come, as many as `concurrency` at once; its number. */
  startSource(concurrency: number): number
  /** Opens what is asked there as a file. */
  openSource(request: number, source: number, options: NativeSourceOptions): void
  /** Waits for questions; nothing where no more come. */
  nextQuestions(request: number, source: number): void
  answerBytes(source: number, id: number, bytes: Uint8Array): void
  answerDone(source: number, id: number): void
  /** Of each run where it ends, and whether it is zero (0 or 1). */
  answerExtents(source: number, id: number, runs: Float64Array): void
  answerFailed(source: number, id: number, failure: NativeSourceFailure): void
  /** What stands on it is being closed: who waits does so for some seconds only. */
  closeSource(source: number): void
  /** Gives up all who wait. */
  cancelSource(source: number): void
  listNbd(request: number, job: number, name: string, options: NativeNbdConnect): void
  /** `format` is QEMU's name of it. */
  openLayer(request: number, file: number, format: string, options: NativeLayerOptions): void
  /** `format` is a compression's. Where the file does not say how much it holds, all of it is read. */
  openStream(request: number, job: number, file: number, format: string, options: NativeLayerOptions): void
  inspectStream(request: number, file: number, format: string, limits: NativeLimits | undefined): void
  unlockLayer(request: number, job: number, layer: number, secret: NativeSecret): void
  /** Tells the new secret's key slot. */
  addKey(request: number, job: number, image: number, order: NativeKeyOrder): void
  /** Tells the key slots that are free now. */
  removeKeys(request: number, job: number, image: number, order: NativeKeyRemovalOrder): void
  setDataFile(request: number, layer: number, file: number, lock: NativeLock | undefined): void
  /** The layer has another number then. */
  attachExtents(request: number, layer: number, files: readonly number[], lock: NativeLock | undefined): void
  /** The top layer is read only without `write`. */
  assemble(request: number, layers: readonly number[], write: NativeWriting | undefined): void
  release(request: number, number: number): void
  /** True: `look` is to be called in the next round of the event loop. */
  read(
    request: number,
    image: number,
    buffer: Uint8Array,
    offset: number,
    length: number,
    position: number,
    watch?: number,
  ): boolean
  /** Of the state of a virtual machine, behind the disk. */
  readVmState(request: number, image: number, buffer: Uint8Array, position: number): void
  writeVmState(request: number, image: number, buffer: Uint8Array, position: number): void
  /** As `read`. `watch`, here and below, is the number by which the request is cancelled. */
  write(
    request: number,
    image: number,
    buffer: Uint8Array,
    offset: number,
    length: number,
    position: number,
    compressed: boolean,
    watch?: number,
  ): boolean
  writeZeroes(
    request: number,
    image: number,
    position: number,
    length: number,
    unmap: boolean,
    watch: number | undefined,
  ): void
  discard(request: number, image: number, position: number, length: number, watch: number | undefined): void
  flush(request: number, image: number): void
  /** Tells the disk's size afterwards. */
  resize(
    request: number,
    job: number,
    image: number,
    size: number,
    shrink: boolean,
    preallocation: string | undefined,
  ): void
  extents(request: number, image: number, start: number, length: number, watch: number | undefined): void
  layersInfo(request: number, image: number): void
  inspectFile(request: number, file: number, format: string, limits: NativeLimits | undefined): void
  inspectPrefix(request: number, bytes: Buffer, format: string, limits: NativeLimits | undefined): void
  /** Reads an OVF descriptor. */
  readOvf(request: number, bytes: Buffer): void
  amendImage(request: number, job: number, image: number, changes: NativeAmendChanges): void
  createOverlay(request: number, job: number, image: number, path: string, order: NativeOverlayOrder): void
  commitImage(request: number, job: number, above: number, base: number, order: NativeCommitOrder): void
  rebaseImage(
    request: number,
    job: number,
    image: number,
    next: number | undefined,
    backing: NativeBacking | undefined,
    compress: boolean,
    detectZeroes: boolean,
    concurrency: number | undefined,
  ): void
  setBackingFile(request: number, job: number, image: number, backing: NativeBacking | undefined): void
  checkImage(
    request: number,
    job: number,
    image: number,
    readers: number | undefined,
    maxFindings: number,
    repair: 'leaks' | 'all' | undefined,
  ): void
  createImage(
    request: number,
    job: number,
    path: string,
    size: number,
    shape: NativeShape,
    overwrite: boolean,
    inUse: readonly string[],
  ): void
  convertImage(request: number, job: number, images: readonly number[], path: string, order: NativeConvertJob): void
  /** Tells a `NativePlannedStream`. */
  planStream(request: number, job: number, images: readonly number[], order: NativeStreamOrder): void
  readStream(request: number, stream: number, buffer: Uint8Array, position: number, watch?: number): void
  /** Makes the target and takes the point in time; tells the clone's number. */
  beginClone(request: number, job: number, image: number, path: string, order: NativeCloneOrder): void
  /** Copies the rest. The clone's number is gone, however it ends. */
  runClone(request: number, job: number, clone: number, concurrency: number | undefined): void
  compactImage(request: number, job: number, image: number, rewrite: boolean, zeroes: boolean, dryRun: boolean): void
  compareImages(request: number, job: number, a: number, b: number, strict: boolean, workers: number | undefined): void
  measureImage(request: number, job: number, image: number | undefined, size: number, shape: NativeShape): void
  /** `granularity` 0 is the default. */
  addBitmap(request: number, image: number, name: string, granularity: number, enabled: boolean): void
  removeBitmap(request: number, image: number, name: string): void
  removeAllBitmaps(request: number, image: number): void
  clearBitmap(request: number, image: number, name: string): void
  enableBitmap(request: number, image: number, name: string, enabled: boolean): void
  mergeBitmaps(
    request: number,
    image: number,
    target: string,
    sources: readonly { readonly image: number; readonly name: string }[],
    watch: number | undefined,
  ): void
  /** Start and length in turn. */
  bitmapExtents(request: number, image: number, name: string): void
  /** The snapshot table of an image: a `SnapshotTable`. */
  snapshotTable(request: number, image: number): void
  /** The snapshots of a layer, in the table's order. */
  layerSnapshots(request: number, layer: number): void
  /** Executes a snapshot plan; tells the disk's size afterwards. */
  executePlan(request: number, image: number, plan: Plan, watch: number | undefined): void
  startNbd(request: number, order: NativeNbdOrder): void
  /** Delivered when the server has ended. */
  awaitNbd(request: number, server: number): void
  endNbd(server: number): void
  nbdConnections(server: number): number
  /** The number of a place to which connections come that are to be encrypted; `release` ends it. */
  startTls(): number
  /** The next one: a `NativeTlsConnection`, or undefined where no more come. */
  nextTls(request: number, tls: number): void
  /** Whether one of the requests that are waited for keeps the event loop alive. Taken back when it was delivered. */
  referenceRequest(holds: boolean): void
  cancelRequest(watch: number): void
  /** Forgets a request that could be cancelled; tells how many bytes it has done. */
  endRequest(watch: number): number
  cancelJob(job: number): void
  /** The steps are those since the last call: `Progress.steps`. */
  jobProgress(job: number): [current: number, total: number, ...steps: number[]]
  /** Forgets a job that has delivered what it had to say. */
  endJob(job: number): void
  /** How many jobs run at the same time, from now on as many as given. */
  maxJobs(most: number | undefined): number
}

interface Packages {
  /** Loads whatever can be required from that place. */
  readonly load: (name: string) => unknown
  readonly addons: Readonly<Record<string, () => unknown>>
}

/**
 * The platform packages, seen from a file. Their names are written out for what traces imports (nft), which knows a `createRequire` by
 * the very words here. Bundlers leave them alone, as they must: an addon does not fit into a script.
 */
function packagesFrom(file: string): Packages {
  const module = require('node:module') as typeof import('node:module')
  const packaged = module.createRequire(file)
  return {
    load: name => packaged(name),
    addons: {
      'linux-x64-gnu': () => packaged('qcow2-linux-x64-gnu'),
      'linux-x64-musl': () => packaged('qcow2-linux-x64-musl'),
      'linux-arm64-gnu': () => packaged('qcow2-linux-arm64-gnu'),
      'linux-arm64-musl': () => packaged('qcow2-linux-arm64-musl'),
      'darwin-x64': () => packaged('qcow2-darwin-x64'),
      'darwin-arm64': () => packaged('qcow2-darwin-arm64'),
      'win32-x64-msvc': () => packaged('qcow2-win32-x64-msvc'),
      'win32-arm64-msvc': () => packaged('qcow2-win32-arm64-msvc'),
    },
  }
}

/**
 * The same as files of the folders beside this package: ncc takes those that are there into the bundle's folder, and puts their place there
 * for `__dirname`, which a module of the ES kind does not have.
 */
const filesBeside = (load: (file: string) => unknown): Packages['addons'] => ({
  'linux-x64-gnu': () => load(`${__dirname}/../../qcow2-linux-x64-gnu/qcow2.linux-x64-gnu.node`),
  'linux-x64-musl': () => load(`${__dirname}/../../qcow2-linux-x64-musl/qcow2.linux-x64-musl.node`),
  'linux-arm64-gnu': () => load(`${__dirname}/../../qcow2-linux-arm64-gnu/qcow2.linux-arm64-gnu.node`),
  'linux-arm64-musl': () => load(`${__dirname}/../../qcow2-linux-arm64-musl/qcow2.linux-arm64-musl.node`),
  'darwin-x64': () => load(`${__dirname}/../../qcow2-darwin-x64/qcow2.darwin-x64.node`),
  'darwin-arm64': () => load(`${__dirname}/../../qcow2-darwin-arm64/qcow2.darwin-arm64.node`),
  'win32-x64-msvc': () => load(`${__dirname}/../../qcow2-win32-x64-msvc/qcow2.win32-x64-msvc.node`),
  'win32-arm64-msvc': () => load(`${__dirname}/../../qcow2-win32-arm64-msvc/qcow2.win32-arm64-msvc.node`),
})

/*
 * The syntax of this file stays that of ES2020: what ncc reads with knows no newer one, and then finds no addon.
 */

/**
 * The files from which the addon is looked for: this one; where a bundler took it into a script that does not know its own place, the
 * script that was started, then the working folder.
 */
function places(): readonly string[] {
  if (typeof __filename === 'string' && isAbsolute(__filename) && existsSync(__filename)) return [__filename]
  const started = process.argv[1]
  return [...(started === undefined ? [] : [resolve(started)]), resolve('here.js')]
}

function load(): Addon {
  const from = places().map(file => ({ folder: dirname(file), ...packagesFrom(file) }))
  const explicit = process.env['NAPI_RS_NATIVE_LIBRARY_PATH']
  if (explicit) {
    const loaded = attempt(() => from[0]?.load(explicit))
    if ('addon' in loaded) return loaded.addon
    throw failed(`${explicit} (NAPI_RS_NATIVE_LIBRARY_PATH)`, loaded.error)
  }
  const platform = `${process.platform}-${process.arch}`
  let broken: Qcow2Error | undefined
  let wanted: readonly string[] = []
  for (const { folder, load, addons } of from) {
    // On Linux the one for the C library that is there loads, the other is not installed or fails.
    const suffixes = Object.keys(addons).filter(suffix => `${suffix}-`.startsWith(`${platform}-`))
    if (suffixes.length === 0) throw noSuchPlatform(platform, Object.keys(addons))
    wanted = suffixes.map(suffix => `qcow2-${suffix}`)
    const beside = filesBeside(load)
    const local = suffixes.map(suffix => join(folder, `qcow2.${suffix}.node`))
    const ways: readonly (readonly [name: string, read: () => unknown])[] = [
      ...local.map(file => [file, () => load(file)] as const),
      ...suffixes.map(suffix => [`qcow2-${suffix}`, () => addons[suffix]?.()] as const),
      ...suffixes.map(suffix => [`qcow2.${suffix}.node`, () => beside[suffix]?.()] as const),
    ]
    for (const [name, read] of ways) {
      const loaded = attempt(read)
      if ('addon' in loaded) return loaded.addon
      if (broken === undefined && !isMissing(loaded.error, name)) broken = failed(name, loaded.error)
    }
  }
  throw broken ?? notInstalled(wanted.join(' or '))
}

function attempt(read: () => unknown): { readonly addon: Addon } | { readonly error: unknown } {
  try {
    return { addon: read() as Addon }
  } catch (error) {
    return { error }
  }
}

const noSuchPlatform = (platform: string, suffixes: readonly string[]): Qcow2Error => {
  const known = new Set(suffixes.map(suffix => suffix.replace(/-(gnu|musl|msvc)$/, '')))
  return new Qcow2Error(
    'ERR_QCOW2_ADDON_MISSING',
    `qcow2 has no addon for ${platform}; it has one for ${[...known].join(', ')}`,
  )
}

const isMissing = (error: unknown, name: string): boolean =>
  error instanceof ReferenceError ||
  (error instanceof Error && 'code' in error && error.code === 'MODULE_NOT_FOUND' && error.message.includes(name))

const failed = (name: string, cause: unknown): Qcow2Error => {
  const reason = cause instanceof Error ? cause.message : String(cause)
  return new Qcow2Error('ERR_QCOW2_ADDON_MISSING', `the addon ${name} cannot be loaded: ${reason}`, { cause })
}

const notInstalled = (name: string): Qcow2Error =>
  new Qcow2Error(
    'ERR_QCOW2_ADDON_MISSING',
    `the package ${name} with the addon for this platform is not installed. npm installs it with qcow2 unless optional ` +
      'dependencies are left out (--omit=optional), or node_modules came from another platform: run npm install here. In a bundle, ' +
      'keep qcow2 external, or lay its .node file beside the script',
  )

export const native: Addon = load()
