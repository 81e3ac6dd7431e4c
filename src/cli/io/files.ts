/** Commands that open and close the image: open, close, reopen. */

import type { CacheMode } from '../../index.js'
import { describeError } from '../errors.js'
import { CommandFailure, unsupported } from '../failure.js'
import { cacheMode, toCacheMode } from '../grammar.js'
import type { Session } from '../session.js'
import type { Context } from './context.js'
import { describedBy, type Opening, openDisk, plainFailure, ReopenFailure, reopenDisk } from './disk.js'
import { type DriverOptions, readDriverOptions, refuseFixed } from './driver-options.js'
import { type Arguments, misused } from './line.js'
import { opened } from './opened.js'

/** How an image is asked for, by the flags of the program or of `open`. */
export interface Asked {
  readonly filename: string | undefined
  readonly format?: string | undefined
  /** A list of options: what describes the image where it has no name. */
  readonly options?: string | undefined
  readonly readOnly: boolean
  readonly snapshot: boolean
  readonly copyOnRead: boolean
  readonly noCache: boolean
  readonly forceShare: boolean
  readonly cache?: string | undefined
  readonly aio?: string | undefined
  readonly discard?: string | undefined
}

const AIO = ['threads', 'native', 'io_uring']
const DISCARD: Readonly<Record<string, Opening['discard']>> = {
  ignore: 'ignore',
  off: 'ignore',
  unmap: 'unmap',
  on: 'unmap',
}

/** Reads what was asked for. */
export function toOpening(asked: Asked, session: Session): Opening {
  if (asked.copyOnRead) throw unsupported("Option '-C'", 'reading does not write to the image')
  const cache = toCacheMode(cacheMode('cache')(asked.cache ?? (asked.noCache ? 'none' : 'writeback')))
  if (asked.aio !== undefined && !AIO.includes(asked.aio)) throw new CommandFailure(`Invalid aio option: ${asked.aio}`)
  const discard = Object.hasOwn(DISCARD, asked.discard ?? 'unmap') ? DISCARD[asked.discard ?? 'unmap'] : undefined
  if (discard === undefined) throw new CommandFailure(`Invalid discard option: ${asked.discard}`)
  const described = asked.options === undefined ? undefined : describedBy(asked.options, asked.filename, session)
  const options: DriverOptions = described?.options ?? new Map()
  const opening: Opening = {
    filename: described?.filename ?? asked.filename ?? '',
    format: described?.format ?? asked.format,
    readOnly: asked.readOnly,
    snapshot: asked.snapshot,
    forceShare: asked.forceShare,
    cache,
    discard,
    options,
  }
  return withGeneral(opening, options)
}

/** What options of any driver change. */
function withGeneral(how: Opening, options: DriverOptions): Opening {
  const [readOnly, forceShare, discard] = ['read-only', 'force-share', 'discard'].map(name => options.get(name))
  return {
    ...how,
    ...(typeof readOnly === 'boolean' && { readOnly }),
    ...(typeof forceShare === 'boolean' && { forceShare }),
    ...((discard === 'unmap' || discard === 'ignore') && { discard }),
    cache: withCacheOptions(how.cache, options),
  }
}

function withCacheOptions(cache: CacheMode, options: DriverOptions): CacheMode {
  const direct = options.get('cache.direct') ?? (cache === 'none' || cache === 'directsync')
  const noFlush = options.get('cache.no-flush') ?? cache === 'unsafe'
  const through = cache === 'writethrough' || cache === 'directsync'
  if (noFlush === true) return 'unsafe'
  if (direct === true) return through ? 'directsync' : 'none'
  return through ? 'writethrough' : 'writeback'
}

/** Opens what was asked for. Failures name the image as it was named. */
export async function openAsked(asked: Asked, context: Context): Promise<void> {
  const prefix = `can't open${asked.filename === undefined ? '' : ` device ${asked.filename}`}: `
  const how = named(prefix, () => toOpening(asked, context.session))
  try {
    context.disk = await openDisk(how, context.session)
  } catch (error) {
    throw context.session.signal.aborted ? error : prefixed(prefix, error)
  }
}

/** What is wrong with the flags themselves has nothing to do with the image. */
function named(prefix: string, work: () => Opening): Opening {
  try {
    return work()
  } catch (error) {
    const plain = error instanceof CommandFailure && /^Invalid |is not supported: |^Parameter /.test(error.message)
    throw plain ? error : prefixed(prefix, plainFailure('', error))
  }
}

function prefixed(prefix: string, error: unknown): CommandFailure {
  const { message, hint } = error instanceof CommandFailure ? error : { message: describeError(error), hint: undefined }
  return new CommandFailure(`${prefix}${message}`, { cause: error, ...(hint !== undefined && { hint }) })
}

export async function open(context: Context, args: Arguments): Promise<boolean> {
  const [filename] = args.operands
  const options = args.value('o')
  if (args.operands.length > 1 || (filename === undefined && options === undefined)) throw misused()
  if (context.disk !== undefined) return say(context, new CommandFailure("file open already, try 'help close'"))
  const asked: Asked = {
    filename,
    options,
    readOnly: args.has('r'),
    snapshot: args.has('s'),
    copyOnRead: args.has('C'),
    noCache: args.has('n'),
    forceShare: args.has('U'),
    cache: args.value('t'),
    aio: args.value('i'),
    discard: args.value('d'),
  }
  try {
    await openAsked(asked, context)
    return true
  } catch (error) {
    return say(context, error)
  }
}

/** Says what went wrong with the image. Always false: the command failed. */
async function say(context: Context, error: unknown): Promise<boolean> {
  if (context.session.signal.aborted) throw error
  await context.complainAs(error instanceof CommandFailure ? error.message : describeError(error))
  if (error instanceof CommandFailure && error.hint !== undefined) await context.complain(error.hint)
  return false
}

export async function close(context: Context): Promise<boolean> {
  const { image } = opened(context)
  await context.settled()
  context.disk = undefined
  try {
    await image.close()
    return true
  } catch (error) {
    return say(context, error)
  }
}

export async function reopen(context: Context, args: Arguments): Promise<boolean> {
  const [reading, writing] = [args.has('r'), args.has('w')]
  const disk = opened(context)
  try {
    const cache = args.value('c') === undefined ? undefined : toCacheMode(cacheMode('cache')(args.value('c') ?? ''))
    if (reading && writing) throw new CommandFailure('Only one -r/-w option may be given')
    if (args.operands.length > 0) throw misused()
    const { values, others } = readDriverOptions(args.value('o') ?? '')
    if ((reading || writing) && values.has('read-only'))
      throw new CommandFailure("Cannot set both -r/-w and 'read-only'")
    if (cache !== undefined && [...values.keys()].some(name => name.startsWith('cache.'))) {
      throw new CommandFailure('Cannot set both -c and the cache options')
    }
    refuseFixed(others)
    const options: DriverOptions = new Map([...withoutGroups(disk.how.options, values), ...values])
    const readOnly = reading || (!writing && disk.how.readOnly)
    const how = withGeneral({ ...disk.how, readOnly, cache: cache ?? disk.how.cache, options }, values)
    await context.settled()
    context.disk = await reopenDisk(disk, how, context.session)
    return true
  } catch (error) {
    if (error instanceof ReopenFailure) {
      context.disk = error.disk
      return say(context, error.cause)
    }
    if (error instanceof CommandFailure) return say(context, error)
    throw error
  }
}

const GROUPS = [
  ['cache-size', 'l2-cache-size', 'refcount-cache-size'],
  ['overlap-check', 'overlap-check.template'],
]

/** Options that were given before, but for those that new ones take the place of. */
const withoutGroups = (before: DriverOptions, now: DriverOptions): DriverOptions =>
  new Map(
    [...before].filter(([name]) => !GROUPS.some(group => group.includes(name) && group.some(each => now.has(each)))),
  )
