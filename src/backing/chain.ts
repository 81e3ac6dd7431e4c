/**
 * Opens an image layer by layer. What comes next is decided here, by the caller's policy; the addon opens one
 * file at a time and nothing that it names.
 */

import { type Access, lockFor, READING } from '../access.js'
import { AbortError, Qcow2Error } from '../errors.js'
import { isOva, isOvf } from '../formats/ova.js'
import { detectFormat } from '../formats/probe.js'
import {
  type Ability,
  can,
  DEFAULT_FORMAT,
  DETACHABLE_FORMAT,
  type Format,
  formatNamed,
  isFormat,
  isKnownByStart,
  isStream,
  PLAIN_FORMAT,
  type StreamFormat,
} from '../formats/table.js'
import type { NativeFile, NativeLayer, NativeLayerOptions, NativeSecret, NativeWriting } from '../native.js'
import { type ReadLimits, throwIfAborted } from '../options.js'
import { forget, type ReadSecrets } from '../secret.js'
import { findSnapshot } from '../snapshot/ids.js'
import type { SnapshotRecord } from '../snapshot/types.js'
import { handOver, isFile, type Located, openFile, release } from '../source.js'
import { runJob, type StartJob } from '../support/jobs.js'
import { isAborted, request } from '../support/requests.js'
import { canBeInexact, exactName, type Name } from '../text.js'
import { diskBeside, diskOf } from './appliance.js'
import { belowIn, decide, KINDS, nameOf, type ReferencePolicy } from './policy.js'
import { openStream, type StreamReading, streamOf, streamRefusal } from './streams.js'

const MAX_CHAIN_DEPTH = 200

/** How to open a chain. */
export interface ChainOptions {
  readonly format?: Format | StreamFormat | undefined
  /** How a compressed file is read, where the top file can be one. */
  readonly streams?: StreamReading | undefined
  /** What the top layer must be able to; its format is told by its magic then. */
  readonly needs?: Need | undefined
  /** How the caller says that the top file is raw, where that is not `format: 'raw'`. */
  readonly sayRaw?: string | undefined
  readonly references?: ReferencePolicy | undefined
  /** What opens encrypted layers; without it their data cannot be read. */
  readonly secret?: ReadSecrets | undefined
  /** Which of several images it is, for who gives the secrets. */
  readonly source?: number | undefined
  readonly snapshot?: Name | undefined
  readonly l2CacheSize?: number | undefined
  readonly limits?: ReadLimits | undefined
  readonly signal?: AbortSignal | undefined
  /** Default: for reading, locked where the system can. */
  readonly access?: Access | undefined
  /** The engine itself writes to the file: the image may be too damaged for anything else. */
  readonly forCheck?: boolean | undefined
  /** Open layers whose active L1 table is not whole: reading what it maps fails. */
  readonly salvage?: boolean | undefined
  /** The caller named what the top layer refers to: it is followed unless the policy is `'layer'`. */
  readonly trustTop?: boolean | undefined
  /** What the top layer refers to, where it has no name for it: the caller has one. */
  readonly below?: Located | undefined
  /** The layer at this depth and those below it become an image of their own, which `access` opens for writing like the top. */
  readonly base?: number | undefined
  /** Only look at the layers above `base`: they are not written to, although their top is opened for it. */
  readonly keepTop?: boolean | undefined
}

/** An open chain. The image is the addon's; the caller releases it. */
export interface Chain {
  readonly image: number
  /** The top file, as it was opened; undefined where only a descriptor is known. */
  readonly path: string | undefined
  /** The same from the root of the file system: the process may work in another directory later. */
  readonly absolutePath: string | undefined
  readonly virtualSize: number
  /** What an image that is made on the top layer stores to know it again, where its format has that. */
  readonly contentId: string | undefined
  /** The top layer's. */
  readonly format: Format
  /** The top layer's; undefined where it has no clusters. */
  readonly clusterSize: number | undefined
  readonly depth: number
  /** The top layer keeps its data in another file. */
  readonly hasDataFile: boolean
  readonly writable: boolean
  /** All files of the chain, data files too: equal strings are the same file. */
  readonly identities: readonly string[]
  /** The file of each layer, top first; undefined where the system has no identity for it. */
  readonly layers: readonly (string | undefined)[]
  /** The image of the layers from `base` on, where that was asked for; `image` then has those above it. */
  readonly base: number | undefined
  readonly access: Access
  readonly l2CacheSize: number | undefined
}

/** Opens the data of a layer, whose number is another then; the secret is overwritten. */
async function unlock(layer: number, secret: NativeSecret, signal: AbortSignal | undefined): Promise<number> {
  const start: StartJob = (number, job, addon) => addon.unlockLayer(number, job, layer, secret)
  try {
    return await runJob<number>('open', { signal }, start)
  } finally {
    forget(secret)
  }
}

/** Opens an image and what the policy lets it pull in. Nothing stays open on failure. */
export async function openChain(located: Located, options: ChainOptions): Promise<Chain> {
  const opening = new Opening(options)
  try {
    const top = await opening.layer(located, file => topFormat(file, options))
    let above = top
    while (above.next !== undefined) above = await opening.backing(above.next)
    opening.refuseUnused(above.path)
    throwIfAborted(options.signal)
    if (options.base !== undefined) opening.refuseShort(options.base, top.path)
    const layers = opening.takeLayers()
    // A repair writes to the file by itself: the image may be too damaged for anything else.
    const write = options.forCheck ? undefined : options.access?.write
    const [image, base] = await assemble(layers, options, write)
    // The base is released last.
    opening.handOver(base ?? image)
    return {
      image,
      base,
      path: top.path,
      absolutePath: top.absolutePath,
      virtualSize: top.opened.virtualSize,
      contentId: top.opened.contentId,
      format: top.format,
      clusterSize: top.opened.clusterSize,
      depth: layers.length,
      hasDataFile: top.opened.dataFile !== undefined,
      writable: options.access?.write !== undefined,
      identities: opening.identities,
      layers: opening.layerIdentities,
      access: options.access ?? READING,
      l2CacheSize: options.l2CacheSize,
    }
  } catch (error) {
    // A connection that the signal ended fails what waits for it.
    if (options.signal?.aborted && isAborted(error)) throw new AbortError(options.signal.reason)
    throw error
  } finally {
    await opening.end()
  }
}

/**
 * Opens a chain for `work` and closes it afterwards, however that ended. Closing stores bitmaps and makes all durable: an error of it
 * is the work's, unless that failed first.
 */
export async function withChain<T>(
  located: Located,
  options: ChainOptions,
  work: (chain: Chain) => Promise<T>,
): Promise<T> {
  const chain = await openChain(located, options)
  const close = async (): Promise<void> => {
    try {
      await release(chain.image)
    } finally {
      if (chain.base !== undefined) await release(chain.base)
    }
  }
  let result: T
  try {
    result = await work(chain)
  } catch (error) {
    // The error that led here is the one to report.
    await close().catch(() => {})
    throw error
  }
  await close()
  return result
}

/** What a chain is, once it opened; it is closed again. */
export const lookAtChain = (located: Located, options: ChainOptions): Promise<Omit<Chain, 'image'>> =>
  withChain(located, options, ({ image: _, ...chain }) => Promise.resolve(chain))

/** Makes an image of the layers; of those from `base` on, one of their own. */
async function assemble(
  layers: readonly number[],
  { base, keepTop }: ChainOptions,
  write: NativeWriting | undefined,
): Promise<[image: number, base: number | undefined]> {
  const of = (part: readonly number[], writing: NativeWriting | undefined): Promise<number> =>
    request<number>((number, addon) => addon.assemble(number, part, writing))
  if (base === undefined) return [await of(layers, write), undefined]
  const below = await of(layers.slice(base), write).catch(async (error: unknown) => {
    await Promise.all(layers.slice(0, base).map(release))
    throw error
  })
  try {
    return [await of(layers.slice(0, base), keepTop ? undefined : write), below]
  } catch (error) {
    await release(below)
    throw error
  }
}

/** An open layer, and what to open below it. */
interface OpenLayer {
  readonly path: string | undefined
  readonly absolutePath: string | undefined
  readonly format: Format
  readonly opened: NativeLayer
  readonly next: Next | undefined
}

/** A reference that the policy let through. */
interface Next {
  readonly located: Located
  readonly filename: string
  readonly format: string | undefined
  readonly from: string | undefined
}

class Opening {
  readonly #options: ChainOptions
  readonly #policy: ReferencePolicy
  readonly #access: Access
  readonly #files: number[] = []
  readonly #seen = new Set<string>()
  /** The file of each layer. */
  readonly layerIdentities: (string | undefined)[] = []
  #layers: number[] = []

  constructor(options: ChainOptions) {
    this.#options = options
    this.#policy = options.references ?? 'deny'
    this.#access = options.access ?? READING
  }

  /** Opens a file, and the layer that it is; asks the policy about what it names. */
  async layer(located: Located, formatOf: (file: NativeFile) => Format): Promise<OpenLayer> {
    throwIfAborted(this.#options.signal)
    // Only the top layer is written to, and the base of a commit.
    const depth = this.#layers.length
    const written = depth === 0 || depth === this.#options.base
    const access: Access = written ? this.#access : { ...this.#access, write: undefined }
    const file = await this.#lookInside(located, await this.#open(located, access), access)
    this.#refuseLoop(file)
    const { streams } = this.#options
    const stream = depth === 0 && streams !== undefined ? streamOf(this.#options.format, file) : undefined
    if (stream !== undefined && streams !== undefined) return this.#openStream(file, stream, streams)
    const header = located.header && (await this.#openHeader(located.header))
    const format = header === undefined ? formatOf(file) : DETACHABLE_FORMAT
    const alone = await this.#unlock(await this.#openLayer(file, format, access, header), file.path)
    this.#layers.push(alone.layer)
    this.layerIdentities.push(file.identity)
    this.#refuseHalf(alone, file, access)
    throwIfAborted(this.#options.signal)
    const opened = await this.#attachExtents(alone, file.path, folderPath(located, file.path), access)
    if (opened.dataFile !== undefined) await this.#attachDataFile(opened, file.path, access)
    const { path, absolutePath } = file
    return { path, absolutePath, format, opened, next: await this.#next(opened, path, folderPath(located, path)) }
  }

  /** The file of the disk that is meant, where the file that was opened is an appliance or the descriptor of one. */
  async #lookInside(located: Located, file: NativeFile, access: Access): Promise<NativeFile> {
    const { head, path } = file
    if (this.#layers.length === 0 && located.header === undefined && this.#mayLookInside()) {
      if (isOva(head)) return this.#open(await diskOf(located, path), access)
      if (isOvf(head)) {
        const beside = await diskBeside(located, path, { policy: this.#policyOfTop, signal: this.#options.signal })
        return this.#open(beside.located, access).catch((error: unknown) => {
          throw inReference(error, `the disk '${beside.filename}' of '${path}'`)
        })
      }
    }
    if (located.member === undefined) return file
    const message = `${path}: no appliance, which would have the disk '${located.member}'`
    throw new Qcow2Error('ERR_QCOW2_FORMAT_UNKNOWN', message, { path })
  }

  /** Opens the disk in a compressed file. */
  async #openStream(file: NativeFile, format: StreamFormat, streams: StreamReading): Promise<OpenLayer> {
    const { format: given, limits, snapshot } = this.#options
    if (snapshot !== undefined) throw withoutSnapshots(file, format)
    const opening = { named: given !== undefined, limits, access: this.#access, streams }
    const opened = await openStream(file, format, opening)
    this.#layers.push(opened.layer)
    this.layerIdentities.push(file.identity)
    const { path, absolutePath } = file
    return { path, absolutePath, format: PLAIN_FORMAT, opened, next: undefined }
  }

  /** Whether a file that begins as an appliance is none of the format that the caller says. A guest can write any bytes in front. */
  #mayLookInside(): boolean {
    const { format } = this.#options
    return !isFormat(format) || isKnownByStart(format)
  }

  /** Opens the next layer; a failure names both files. */
  async backing({ located, filename, format, from }: Next): Promise<OpenLayer> {
    const limit = this.#options.limits?.maxChainDepth ?? MAX_CHAIN_DEPTH
    const reference = nameOf({ kind: 'backing', filename })
    if (this.#layers.length >= limit) {
      const message = `the backing chain has more than ${limit} layers: the ${reference} of '${from}' is one too many`
      throw new Qcow2Error('ERR_QCOW2_CHAIN', message, { path: from, field: 'backing_file' })
    }
    try {
      return await this.layer(located, file => backingFormat(file, format))
    } catch (error) {
      throw inReference(error, `the ${reference} of '${from}'`)
    }
  }

  get identities(): readonly string[] {
    return [...this.#seen]
  }

  /** Refuses a chain that has no layer at the depth of the base. */
  refuseShort(base: number, path: string | undefined): void {
    if (this.#layers.length > base) return
    const message = `${path === undefined ? '' : `${path}: `}the image has no backing file`
    throw new Qcow2Error('ERR_QCOW2_CHAIN', message, { path, field: 'backing_file' })
  }

  /** Refuses a file that the caller has for below the last image, which names none. */
  refuseUnused(path: string | undefined): void {
    const below = belowIn(this.#policy, path)
    if (below === undefined) return
    const message = `${path}: the image is made on no other: '${below.path}' cannot lie below it`
    throw new Qcow2Error('ERR_QCOW2_CHAIN', message, { path, field: 'backing_file' })
  }

  takeLayers(): readonly number[] {
    const layers = this.#layers
    this.#layers = []
    return layers
  }

  /** The image that was made of the layers has their connections. */
  handOver(image: number): void {
    handOver(this.#files, image)
  }

  /** Gives up what is left: the files always (layers hold them themselves), the layers after a failure. */
  async end(): Promise<void> {
    await Promise.all([...this.takeLayers(), ...this.#files].map(release))
  }

  async #open(located: Located, { write, cache }: Access): Promise<NativeFile> {
    const file = await openFile(located, { writable: write !== undefined, cache }, this.#options.signal)
    this.#files.push(file.file)
    return file
  }

  /** Opens the file with a layer's header, which is not written to. */
  async #openHeader(located: Located): Promise<number> {
    const { format } = this.#options
    if (this.#layers.length === 0 && format !== undefined && format !== DETACHABLE_FORMAT) {
      const message = `a ${format} image has no header in a file of its own: ${DETACHABLE_FORMAT} images have`
      throw new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', message, { field: 'header' })
    }
    const file = await this.#open(located, { ...this.#access, write: undefined })
    this.#refuseLoop(file)
    return file.file
  }

  async #openLayer(file: NativeFile, format: Format, access: Access, header: number | undefined): Promise<NativeLayer> {
    const lock = lockFor(access)
    const { snapshot, l2CacheSize, limits, salvage } = this.#options
    const top = this.#layers.length === 0
    if (top && snapshot !== undefined && !can(format, 'snapshots')) throw withoutSnapshots(file, format)
    const options: NativeLayerOptions = { l2CacheSize, salvage, lock, header }
    if (limits !== undefined) options.limits = limits
    const open = (): Promise<NativeLayer> =>
      request((number, addon) => addon.openLayer(number, file.file, format, options))
    if (!top || snapshot === undefined) return open()
    options.snapshot = canBeInexact(snapshot) ? await idOf(snapshot, await open()) : exactName(snapshot)
    return open()
  }

  /** Opens the data of an encrypted layer, where there is a secret for it. */
  async #unlock(opened: NativeLayer, path: string | undefined): Promise<NativeLayer> {
    const { layer, encryption } = opened
    const { secret, source, signal } = this.#options
    if (encryption === undefined || secret === undefined) return opened
    const asked = { path, depth: this.#layers.length, encryption, ...(source !== undefined && { source }) }
    try {
      const own = await secret(asked)
      return own === undefined ? opened : { ...opened, layer: await unlock(layer, own, signal) }
    } catch (error) {
      await release(layer)
      throw error
    }
  }

  #refuseLoop({ identity, path }: NativeFile): void {
    if (identity === undefined) return
    if (this.#seen.has(identity)) {
      const message = `the backing chain contains ${path === undefined ? 'a file' : `'${path}'`} twice`
      throw new Qcow2Error('ERR_QCOW2_CHAIN', message, { path, field: 'backing_file' })
    }
    this.#seen.add(identity)
  }

  /** A write copies what surrounds it from the backing file: without that file, the copy would be zeroes. */
  #refuseHalf({ backing, dataFile, extents }: NativeLayer, { path }: NativeFile, { write }: Access): void {
    // A repair writes no guest data.
    if (write === undefined || this.#options.forCheck || this.#policyNow() !== 'layer') return
    const missing = (backing && 'backing') ?? (dataFile && 'data-file') ?? (extents.length > 0 ? 'extent' : undefined)
    if (missing === undefined) return
    const { name, field } = KINDS[missing]
    const message = `${path === undefined ? '' : `${path}: `}references is 'layer', and writing needs the ${name} too`
    throw new Qcow2Error('ERR_QCOW2_REFERENCE_DENIED', message, { path, field })
  }

  async #attachDataFile({ layer, dataFile }: NativeLayer, from: string | undefined, access: Access): Promise<void> {
    if (dataFile === undefined) return
    const located = await decide(this.#policyNow(), 'data-file', dataFile, from, from, this.#options.signal)
    if (located === undefined) return
    try {
      const file = await this.#open(located, access)
      if (file.identity !== undefined) this.#seen.add(file.identity)
      await request<void>((number, addon) => addon.setDataFile(number, layer, file.file, lockFor(access)))
    } catch (error) {
      throw inReference(error, `the ${nameOf({ kind: 'data-file', filename: dataFile.filename })} of '${from}'`)
    }
  }

  /** Opens the files that the disk of a layer is made of, which has another number then. With `'layer'` it stays without them. */
  async #attachExtents(
    opened: NativeLayer,
    from: string | undefined,
    folder: string | undefined,
    access: Access,
  ): Promise<NativeLayer> {
    const { layer, extents } = opened
    const policy = this.#policyNow()
    if (extents.length === 0 || policy === 'layer') return opened
    const others = new Set(this.#seen)
    const files: number[] = []
    for (const { filename, writable } of extents) {
      const located = await decide(policy, 'extent', { filename }, from, folder, this.#options.signal)
      if (located === undefined) return opened
      try {
        const file = await this.#open(located, writable ? access : { ...access, write: undefined })
        if (file.identity !== undefined && others.has(file.identity)) this.#refuseLoop(file)
        if (file.identity !== undefined) this.#seen.add(file.identity)
        files.push(file.file)
      } catch (error) {
        throw inReference(error, `the ${nameOf({ kind: 'extent', filename })} of '${from}'`)
      }
    }
    const whole = await request<NativeLayer>((number, addon) =>
      addon.attachExtents(number, layer, files, lockFor(access)),
    )
    this.#layers[this.#layers.length - 1] = whole.layer
    return whole
  }

  async #next(
    { backing }: NativeLayer,
    from: string | undefined,
    folder: string | undefined,
  ): Promise<Next | undefined> {
    if (backing === undefined) return undefined
    const { below } = this.#options
    if (below !== undefined && this.#layers.length === 1 && this.#policyNow() !== 'layer') {
      return { located: below, filename: backing.filename, format: backing.format, from }
    }
    const located = await decide(this.#policyNow(), 'backing', backing, from, folder, this.#options.signal)
    return located && { located, filename: backing.filename, format: located.format ?? backing.format, from }
  }

  /** The policy for the layer that was opened last. */
  #policyNow(): ReferencePolicy {
    return this.#layers.length === 1 ? this.#policyOfTop : this.#policy
  }

  get #policyOfTop(): ReferencePolicy {
    return this.#options.trustTop && this.#policy !== 'layer' ? 'allow' : this.#policy
  }
}

/** The path whose directory relative names start from. An export has none. */
const folderPath = (located: Located, path: string | undefined): string | undefined =>
  isFile(located) ? path : undefined

/** The id of the snapshot that a text stands for which may not have all bytes of its name. The layer is given up. */
async function idOf(snapshot: string, { layer }: NativeLayer): Promise<string> {
  try {
    const records = await request<SnapshotRecord[]>((number, addon) => addon.layerSnapshots(number, layer))
    return records[findSnapshot(records, snapshot)]?.id ?? snapshot
  } finally {
    await release(layer)
  }
}

/** The format of the image that the caller opens: what it says, else by its magic, never raw. */
function topFormat(
  { head, path }: NativeFile,
  { format: given, needs, sayRaw = `format: '${PLAIN_FORMAT}'` }: Pick<ChainOptions, 'format' | 'needs' | 'sayRaw'>,
): Format {
  if (isFormat(given)) return given
  const detected = detectFormat(head)
  if (isFormat(detected) && (needs === undefined || can(detected, needs))) return detected
  if (needs !== undefined) {
    // Of bytes that are no image, that is what is wrong.
    if (!isFormat(detected)) return DEFAULT_FORMAT
    throw withoutAbility(path, detected, needs)
  }
  const where = path === undefined ? '' : `${path}: `
  const message =
    detected === undefined
      ? `${where}not a qcow2 image (no magic number in its first bytes); for a raw disk say so: ${sayRaw}`
      : isStream(detected)
        ? `${where}${streamRefusal(detected)} (${sayRaw} takes it as the plain bytes of a disk)`
        : `${where}not a qcow2 image: its first bytes are those of a ${detected} image, which is not supported ` +
          `(${sayRaw} takes it as the plain bytes of a disk)`
  throw new Qcow2Error('ERR_QCOW2_FORMAT_UNKNOWN', message, { path, offset: 0, field: 'magic' })
}

/** What jobs need of the image that they are for, as a message has it. */
const WORK = {
  check: 'checking',
  compact: 'compacting',
  amend: 'amending',
  commit: 'committing',
  rebase: 'rebasing',
} as const satisfies Partial<Record<Ability, string>>

/** What a job can need. */
export type Need = keyof typeof WORK

function withoutAbility(path: string | undefined, format: Format, ability: Need): Qcow2Error {
  const message = `${path === undefined ? '' : `${path}: `}${WORK[ability]} ${format} images is not supported`
  return new Qcow2Error('ERR_QCOW2_UNSUPPORTED_FEATURE', message, { path })
}

function withoutSnapshots({ path }: NativeFile, format: Format | StreamFormat): Qcow2Error {
  const message = `${path === undefined ? '' : `${path}: `}a ${format} image has no snapshots`
  return new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', message, { path, field: 'snapshot' })
}

/** The format of a backing file: what the image says, else by its magic, else raw unless that is one of a format that is not opened. */
function backingFormat({ head, path }: NativeFile, named: string | undefined): Format {
  const format = named ?? detectFormat(head) ?? PLAIN_FORMAT
  const opened = formatNamed(format)
  if (opened !== undefined) return opened
  const how = named === undefined ? 'its first bytes are those of' : 'the image that names it says that it is'
  const message = `${path === undefined ? '' : `${path}: `}${how} a ${format} image, which is not supported`
  throw new Qcow2Error('ERR_QCOW2_UNSUPPORTED_FEATURE', message, { path, field: 'backing format name' })
}

/** An error of a file that an image names: a member that cannot be opened is the chain's error. */
function inReference(error: unknown, reference: string): unknown {
  if (!(error instanceof Qcow2Error) || error.syscall === undefined) return error
  const message = `${reference} cannot be opened: ${error.message}`
  return new Qcow2Error('ERR_QCOW2_CHAIN', message, { ...error, cause: error })
}
