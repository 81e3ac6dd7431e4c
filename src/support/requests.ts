/**
 * Requests to the addon. Each has a number; the addon delivers what is done in batches, one call for all of them, and this
 * table finds who waits. The table keeps a request's buffer alive until then: a worker writes into it.
 */

// Not the global one, which test runners replace by a fake that never fires by itself.
import { setImmediate } from 'node:timers'
import { getSystemErrorName } from 'node:util'
import { AbortError, Qcow2Error } from '../errors.js'
import { type Addon, type NativeFailure, native } from '../native.js'
import { onAbort } from './signals.js'
import { findThrown } from './thrown.js'

/** Numbers that fit into one delivery. More are delivered in several calls. */
const BATCH = 1024

interface Waiting {
  resolve(value: unknown): void
  reject(failure: unknown): void
  /** What the worker uses: alive as long as it is here. */
  readonly buffer: Uint8Array | undefined
}

const waiting: (Waiting | undefined)[] = []
/** Numbers that are free for use. */
const free: number[] = []
const done = new Uint32Array(BATCH)

function deliver(count: number, others: readonly unknown[] | undefined): void {
  for (let i = 0; i < count; i++) take(done[i] ?? 0)?.resolve(undefined)
  if (others === undefined) return
  for (let i = 0; i < others.length; i += 3) {
    const request = take(Number(others[i]))
    if (others[i + 1] === true) request?.resolve(others[i + 2])
    else request?.reject(others[i + 2])
  }
}

native.start(deliver, done)

/** Looks for completions between two rounds of the event loop, while the addon expects some soon. */
function look(): void {
  let again = true
  try {
    again = native.look(deliver)
  } catch {
    // A bug in this library, which has said so. Nothing else wakes those who wait.
  }
  if (again) setImmediate(look)
}

/** What `read` and `write` of the addon return for a request that is under way: whether to look for completions. */
export function watchLook(soon: boolean | null): void {
  if (soon) setImmediate(look)
}

function take(request: number): Waiting | undefined {
  const found = waiting[request]
  waiting[request] = undefined
  free.push(request)
  return found
}

/** Makes a request and waits. `start` hands its number to the addon; what that throws rejects the promise. */
export function submit<T>(start: (request: number) => void, buffer?: Uint8Array): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    const request = free.pop() ?? waiting.length
    waiting[request] = { resolve: resolve as (value: unknown) => void, reject, buffer }
    try {
      start(request)
    } catch (error) {
      take(request)
      reject(error)
    }
  })
}

/** Fills a range of the buffer: the request that there can be many of. */
export function submitRead(
  image: number,
  buffer: Uint8Array,
  offset: number,
  length: number,
  position: number,
): Promise<void> {
  return new Promise<void>((resolve, reject) => {
    const request = free.pop() ?? waiting.length
    waiting[request] = { resolve: resolve as (value: unknown) => void, reject, buffer }
    try {
      const soon = native.read(request, image, buffer, offset, length, position)
      if (soon === null) take(request)?.resolve(undefined)
      else watchLook(soon)
    } catch (error) {
      take(request)
      reject(error)
    }
  })
}

/** Writes a range of the buffer: as {@link submitRead}. */
export function submitWrite(
  image: number,
  buffer: Uint8Array,
  offset: number,
  length: number,
  position: number,
  compressed: boolean,
): Promise<void> {
  return new Promise<void>((resolve, reject) => {
    const request = free.pop() ?? waiting.length
    waiting[request] = { resolve: resolve as (value: unknown) => void, reject, buffer }
    try {
      watchLook(native.write(request, image, buffer, offset, length, position, compressed))
    } catch (error) {
      take(request)
      reject(error)
    }
  })
}

/** A request of one of the addon's functions, its number first. An async function: its errors show who called. */
export async function request<T>(start: (request: number, addon: Addon) => void): Promise<T> {
  try {
    return await submit<T>(number => start(number, native))
  } catch (failure) {
    throw toError(failure)
  }
}

/** The engine's code for work that was cancelled. */
export const isAborted = (failure: unknown): boolean =>
  typeof failure === 'object' && failure !== null && 'code' in failure && failure.code === 'ERR_QCOW2_ABORTED'

/** Requests that can be cancelled have a number for that: their own is used again as soon as they are delivered. */
let lastWatch = 0

/** Hands a request to the addon, with the number by which it is cancelled. */
export type StartWatched = (request: number, addon: Addon, watch: number | undefined) => void

/**
 * As {@link request}, cancelled by the signal while it is under way. `tells`: the `AbortError` says how many bytes are done.
 */
export async function requestWatched<T>(
  signal: AbortSignal | undefined,
  start: StartWatched,
  { buffer, tells = false }: { readonly buffer?: Uint8Array; readonly tells?: boolean } = {},
): Promise<T> {
  if (signal === undefined) return request<T>((number, addon) => start(number, addon, undefined))
  if (signal.aborted) throw new AbortError(signal.reason)
  lastWatch = (lastWatch + 1) >>> 0
  const watch = lastWatch
  let thrown: { readonly error: unknown } | undefined
  const cancel = (): void => {
    try {
      native.cancelRequest(watch)
    } catch (error) {
      // In the signal's event nobody would catch it.
      thrown = { error: toError(error) }
    }
  }
  const forget = onAbort(signal, cancel)
  let end: { readonly value: T } | { readonly failure: unknown }
  try {
    end = { value: await submit<T>(number => start(number, native, watch), buffer) }
  } catch (failure) {
    end = { failure }
  }
  forget()
  const done = native.endRequest(watch)
  if (thrown !== undefined) throw thrown.error
  if ('value' in end) return end.value
  if (isAborted(end.failure)) throw new AbortError(signal.reason, tells ? done : undefined)
  throw toError(end.failure)
}

const isFailure = (value: unknown): value is NativeFailure =>
  typeof value === 'object' && value !== null && !(value instanceof Error) && 'code' in value && 'message' in value

/** The error that a request was rejected with, made where the stack shows the caller. */
export function toError(failure: unknown): unknown {
  if (isFailure(failure)) return fromNative(failure)
  // The addon refuses arguments that the checks here should have refused.
  if (failure instanceof Error && !(failure instanceof Qcow2Error)) {
    return new Qcow2Error('ERR_QCOW2_INTERNAL', `a bug in this library: ${failure.message}`, { cause: failure })
  }
  return failure
}

/** The engine names arguments as the format and QEMU do (`cluster_size`); here they are options (`clusterSize`). */
const toOptionName = (name: string): string => name.replace(/_([a-z])/g, (_, letter: string) => letter.toUpperCase())

function inOptionNames(failure: NativeFailure): NativeFailure {
  const { field, message } = failure
  if (failure.code !== 'ERR_QCOW2_INVALID_ARGUMENT' || field === undefined) return failure
  const option = toOptionName(field)
  return { ...failure, field: option, message: message.replaceAll(field, option) }
}

function fromNative(failure: NativeFailure): Qcow2Error {
  const { code, message, path, offset, field, errno, syscall } = inOptionNames(failure)
  const transient = failure.transient || undefined
  const thrown = findThrown(failure.thrown)
  const cause = thrown === undefined ? causeOf(failure.causes) : thrown.error
  const place = { path, offset, field, syscall, transient, cause }
  if (code === 'ERR_QCOW2_IO' && errno !== undefined) {
    const name = systemName(-errno)
    if (name !== undefined) {
      const reason = message.replace(/ \(os error \d+\)/, '')
      const call = syscall === undefined ? '' : `, ${syscall}`
      const file = path === undefined ? '' : ` '${path}'`
      const sentence = `${name}: ${reason.charAt(0).toLowerCase()}${reason.slice(1)}${call}${file}`
      return new Qcow2Error(name, sentence, { ...place, errno: -errno })
    }
  }
  const where = [field && `field ${field}`, offset !== undefined && `offset 0x${offset.toString(16)}`].filter(Boolean)
  const sentence = `${path === undefined ? '' : `${path}: `}${message}${where.length > 0 ? ` (${where.join(', ')})` : ''}`
  // An error of this library's that came by way of a caller's object is still that one.
  const known = cause instanceof Qcow2Error ? cause.code : (code as Qcow2Error['code'])
  return new Qcow2Error(known, sentence, { ...place, errno })
}

/** Errors, the first caused by the second and so on; undefined without any. */
function causeOf(texts: readonly string[]): Error | undefined {
  return texts.reduceRight<Error | undefined>((cause, text) => new Error(text, cause && { cause }), undefined)
}

function systemName(errno: number): Qcow2Error['code'] | undefined {
  try {
    const name = getSystemErrorName(errno)
    return name.startsWith('E') ? (name as Qcow2Error['code']) : undefined
  } catch {
    return undefined
  }
}
