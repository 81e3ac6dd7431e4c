/** The addon, typed. The one module that has it loaded. */

import { loadAddon } from './addon.js'
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
  /**
   * Null: the buffer is filled, and the number is free again. True: `look` is to be called in the next round of the event loop. Never null
   * with `watch`.
   */
  read(
    request: number,
    image: number,
    buffer: Uint8Array,
    offset: number,
    length: number,
    position: number,
    watch?: number,
  ): boolean | null
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

function load(): Addon {
  const loaded = loadAddon()
  if ('addon' in loaded) return loaded.addon as Addon
  const { message, cause } = loaded
  throw new Qcow2Error('ERR_QCOW2_ADDON_MISSING', message, { cause })
}

export const native: Addon = load()
