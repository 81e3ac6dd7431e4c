/**
 * Reading of option objects: every option is known, of the right type, and in range, or the call is refused with
 * `ERR_QCOW2_INVALID_ARGUMENT` and the option's name. A misspelt option is an error, never ignored.
 */

import { AbortError, invalidArgument } from './errors.js'
import { meantBy, takenBy } from './support/option-hints.js'
import { exactName, type Name } from './text.js'
import { describe, type Size, toBytes } from './units.js'

/** A request that can be cancelled. */
export interface Abortable {
  /**
   * Cancels the request: it rejects with an `AbortError` whose `cause` is the signal's reason, at once if the signal is
   * already aborted, else when the work has stopped (a caller's buffer is free to use again then).
   */
  signal?: AbortSignal | undefined
}

/** How far a job is. */
export interface Progress {
  /**
   * What the job is doing: `'convert'`, `'check'`, `'compare'`, `'measure'`, `'create'`, `'clone'`, `'compact'`, `'amend'`, `'commit'`,
   * `'rebase'`, `'stream'`, `'upload'`.
   */
  readonly phase: string
  /** Bytes of guest data done. */
  readonly current: number
  /** Bytes of guest data in all; 0 while that is not known, and while the job waits its turn ({@link configure}). */
  readonly total: number
  /**
   * `current` as it was each time that the job had passed another hundredth since the last call, in order: a job that is done before
   * the first call tells how it went all the same.
   */
  readonly steps: readonly number[]
}

/** Options of every job that can take long. */
export interface LongRunning extends Abortable {
  /**
   * Called with the progress every `progressInterval` ms, and once at the end of a job that succeeded. Never awaited: it
   * cannot slow the job. If it throws, or what it returns rejects, the job is cancelled and rejects with that; what the last call throws
   * comes too late to cancel anything: the work is done, and stays. What rejects when the job has ended is a warning of the process
   * (`QCOW2_CALLBACK`).
   */
  onProgress?: ((progress: Progress) => unknown) | undefined
  /** Milliseconds between two calls of `onProgress`, 1 to 2^31 - 1. Default 250. */
  progressInterval?: number | undefined
  /**
   * Worker threads, 1 to 64. Default: the cores of the machine, 8 at most. All jobs of the process share a number of them, and a system that
   * starts no more threads ends none: the job then has fewer.
   */
  concurrency?: number | undefined
}

/**
 * Bounds on what an image may claim, enforced before anything is allocated. The defaults are QEMU's own, so that the same
 * images open here and there; tighten them for images from strangers.
 */
export interface Limits {
  /** Largest virtual size in bytes. Default 2^63 - 1, and for `inspect` without `bigint: true` 2^53 - 1. */
  maxVirtualSize?: Size | undefined
  /** Most bytes of metadata that is loaded as a whole (L1, refcount and snapshot tables). Default 128 MiB. */
  maxMetadataBytes?: Size | undefined
  /** Most internal snapshots. Default 65536. */
  maxSnapshots?: number | undefined
  /** Most persistent bitmaps. Default 65535. */
  maxBitmaps?: number | undefined
  /** Most layers in a backing chain, the top included. Default 200. */
  maxChainDepth?: number | undefined
  /** Most bytes that one operation holds in memory for bookkeeping (a check's counters). Default 1 GiB. */
  maxMemory?: Size | undefined
}

/** Turns a value into what the code works with, or throws naming the option. */
export type Reader<T> = (value: unknown, name: string) => T

/** What `readOptions` returns: every option of the table, undefined where the caller did not give it. */
export type Read<S> = { readonly [K in keyof S]: S[K] extends Reader<infer T> ? T | undefined : never }

/**
 * Reads an options object against the table of what `owner` (`'open'`, `'Image.read'`) knows. `undefined` counts as not
 * given, as everywhere in Node.
 */
export function readOptions<S extends Readonly<Record<string, Reader<unknown>>>>(
  options: unknown,
  owner: string,
  table: S,
): Read<S> {
  const given = new Map<string, unknown>(Object.entries(checkNames(options, owner, table)))
  const read = Object.entries(table).map(([name, reader]) => {
    const value = given.get(name)
    return [name, value === undefined ? undefined : reader(value, `${owner}: ${name}`)]
  })
  return Object.fromEntries(read) as Read<S>
}

/** Refuses options that `owner` does not have. */
export function checkNames(options: unknown, owner: string, table: object): object {
  const given = asObject(options, owner, table)
  for (const name of Object.keys(given)) {
    if (!Object.hasOwn(table, name)) throw unknownOption(name, owner, Object.keys(table))
  }
  return given
}

/** An `owner` such as `convert: compress` is an option that is an object itself: it is the one to name, with what it takes. */
function asObject(options: unknown, owner: string, table: object): object {
  if (options === undefined) return {}
  if (typeof options !== 'object' || options === null || Array.isArray(options) || ArrayBuffer.isView(options)) {
    throw owner.includes(': ')
      ? invalidArgument(
          owner,
          `${owner} must be an object ({ ${Object.keys(table).join(', ')} }), not ${describe(options)}`,
        )
      : invalidArgument('options', `${owner}: options must be an object, not ${describe(options)}`)
  }
  return options
}

function unknownOption(name: string, owner: string, known: readonly string[]): Error {
  return invalidArgument(name, `${owner}: unknown option '${name}': ${hintFor(name, owner, known)}`)
}

/** A name that is another call's may be a slip all the same: `from` and `form`. So what is known to be meant comes first. */
function hintFor(name: string, owner: string, known: readonly string[]): string {
  const meant = meantBy(name, owner, known)
  if (meant !== undefined) return meant
  const close = nearest(name, known)
  if (close !== undefined) return `did you mean '${close}'?`
  const others = takenBy(name)
  const list = `known are ${known.join(', ')}`
  return others === undefined ? list : `it is an option of ${others}; here ${list}`
}

/** The known name that `name` is probably a slip of: two edits away at most, case aside. */
export function nearest(name: string, known: readonly string[]): string | undefined {
  const scored = known.map(candidate => ({
    candidate,
    edits: editDistance(name.toLowerCase(), candidate.toLowerCase()),
  }))
  const best = scored.sort((a, b) => a.edits - b.edits)[0]
  return best !== undefined && best.edits <= Math.min(2, best.candidate.length / 2) ? best.candidate : undefined
}

function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (const [i, x] of [...a].entries()) {
    const next = [i + 1]
    for (const [j, y] of [...b].entries()) {
      const substitute = (row[j] ?? 0) + (x === y ? 0 : 1)
      next.push(Math.min(substitute, (row[j + 1] ?? 0) + 1, (next[j] ?? 0) + 1))
    }
    row = next
  }
  return row[b.length] ?? 0
}

/** A string that is not empty. */
export const text: Reader<string> = (value, name) => {
  if (typeof value !== 'string') throw invalidArgument(name, `${name} must be a string, not ${describe(value)}`)
  if (value === '') throw invalidArgument(name, `${name} must not be empty`)
  if (value.includes('\0')) throw invalidArgument(name, `${name} must not contain a null character`)
  return value
}

/** A {@link Name} that can be one: not empty, no null character. */
export const name: Reader<Name> = (value, field) => {
  if (!(value instanceof Uint8Array)) return text(value, field)
  if (value.length === 0) throw invalidArgument(field, `${field} must not be empty`)
  if (value.includes(0)) throw invalidArgument(field, `${field} must not contain a null byte`)
  return value
}

/** A name to store, with every byte that the user gave. */
export const storedName: Reader<string> = (value, field) => exactName(name(value, field))

export const flag: Reader<boolean> = (value, name) => {
  if (typeof value !== 'boolean') throw invalidArgument(name, `${name} must be true or false, not ${describe(value)}`)
  return value
}

export const bytes: Reader<number> = toBytes

/** A whole number of `least` to `most`. */
export const integer =
  (least: number, most: number): Reader<number> =>
  (value, name) => {
    if (typeof value !== 'number' || !Number.isInteger(value) || value < least || value > most) {
      throw invalidArgument(name, `${name} must be a whole number of ${least} to ${most}, not ${describe(value)}`)
    }
    return value
  }

/** One of the given values, by identity. */
export const oneOf =
  <const T extends readonly (string | number | boolean)[]>(...choices: T): Reader<T[number]> =>
  (value, name) => {
    const found = choices.find(choice => choice === value)
    if (found !== undefined) return found
    const list = choices.map(choice => describe(choice)).join(', ')
    throw invalidArgument(name, `${name} must be one of ${list}, not ${describe(value)}`)
  }

export const callback =
  <F extends (...values: never[]) => unknown>(): Reader<F> =>
  (value, name) => {
    if (typeof value !== 'function') throw invalidArgument(name, `${name} must be a function, not ${describe(value)}`)
    return value as F
  }

/** An `AbortSignal`, recognised by its shape as Node does, so that polyfills pass. */
export const abortSignal: Reader<AbortSignal> = (value, name) => {
  if (typeof value !== 'object' || value === null || !('aborted' in value) || !('addEventListener' in value)) {
    throw invalidArgument(name, `${name} must be an AbortSignal, not ${describe(value)}`)
  }
  return value as AbortSignal
}

const COUNT_MAX = 2 ** 31 - 1

/** {@link Limits}, read. */
export type ReadLimits = Read<typeof LIMITS>

const LIMITS = {
  maxVirtualSize: bytes,
  maxMetadataBytes: bytes,
  maxSnapshots: integer(0, COUNT_MAX),
  maxBitmaps: integer(0, COUNT_MAX),
  maxChainDepth: integer(1, 1000),
  maxMemory: bytes,
} as const

export const limits: Reader<ReadLimits> = (value, name) => readOptions(value, name, LIMITS)

/** The table entries of {@link Abortable}. */
export const ABORTABLE = { signal: abortSignal } as const

/** The table entries of {@link LongRunning}. */
export const LONG_RUNNING = {
  ...ABORTABLE,
  onProgress: callback<(progress: Progress) => unknown>(),
  progressInterval: integer(1, COUNT_MAX),
  concurrency: integer(1, 64),
} as const

/** Throws if the signal is already aborted. */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw new AbortError(signal.reason)
}
