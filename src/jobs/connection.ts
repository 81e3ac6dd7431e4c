/** Where the queue is: how both of its ends are told, and how long they wait for it. */

import { invalidArgument, Qcow2Error, type SystemErrorCode } from '../errors.js'
import { integer, type Reader } from '../options.js'
import { describe } from '../units.js'

/**
 * Where Redis or Valkey is: `redis://host:6379/0`, `rediss://` with TLS, `unix:///run/redis.sock`; or an object of ioredis' options (`host`,
 * `port`, `path`, `tls`, …). A name and a password stand in the address (`redis://:password@host`).
 */
export type Connection = string | Readonly<Record<string, unknown>>

/** Options of both ends of a queue. */
export interface QueuePlace {
  /** Where it is. */
  connection: Connection
  /** Name of the queue: letters, digits, `-`, `_` and `.`. Default `'qcow2'`. */
  queue?: string | undefined
  /** What its keys begin with. In a cluster it has braces: `'{qcow2}'`. Default `'bull'`. */
  prefix?: string | undefined
  /** Milliseconds to wait for an answer, 1 to 2^31 - 1. Default 10000. */
  timeout?: number | undefined
}

/** ioredis' options of a {@link Connection}. */
export type ReadConnection = Readonly<Record<string, unknown>>

/** Milliseconds until the first attempt to connect anew, and at most. */
const RECONNECT = { first: 100, most: 3000 } as const

const COMMON: ReadConnection = {
  retryStrategy: (times: number) => Math.min(times * RECONNECT.first, RECONNECT.most),
}

const PROTOCOLS: ReadonlySet<string> = new Set(['redis:', 'rediss:'])

const connection: Reader<ReadConnection> = (value, name) => {
  if (typeof value === 'string') return { ...COMMON, ...readUrl(value, name) }
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return { ...COMMON, ...value }
  throw invalidArgument(name, `${name} must be an address (redis://…) or an object, not ${describe(value)}`)
}

function readUrl(value: string, name: string): ReadConnection {
  const url = URL.canParse(value) ? new URL(value) : undefined
  if (url !== undefined && PROTOCOLS.has(url.protocol)) return { url: value }
  if (url?.protocol === 'unix:' && url.host === '' && url.pathname !== '') {
    const db = Number(url.searchParams.get('db') ?? 0)
    return { path: decodeURIComponent(url.pathname), db, ...(url.password !== '' && { password: url.password }) }
  }
  // What it is may have a password in it.
  throw invalidArgument(name, `${name} must begin with redis://, rediss:// or unix:///`)
}

const NAME = /^[\w.-]{1,100}$/
const PREFIX = /^[\w.{}-]{1,100}$/

const matching =
  (pattern: RegExp): Reader<string> =>
  (value, name) => {
    if (typeof value === 'string' && pattern.test(value)) return value
    throw invalidArgument(name, `${name} must be 1 to 100 letters, digits, '-', '_' or '.', not ${describe(value)}`)
  }

/** The table entries of {@link QueuePlace}. */
export const PLACE = {
  connection,
  queue: matching(NAME),
  prefix: matching(PREFIX),
  timeout: integer(1, 2 ** 31 - 1),
} as const

export const DEFAULT_QUEUE = 'qcow2'
export const DEFAULT_PREFIX = 'bull'
export const DEFAULT_TIMEOUT = 10_000

/** What a call needs: it has no default. */
export function needed<T>(value: T | undefined, owner: string, name: string): T {
  if (value === undefined) throw invalidArgument(name, `${owner}: the option ${name} is needed`)
  return value
}

/** Waits for the queue's answer, and no longer than that. `lastError` is what the connection said last. */
export async function answered<T>(
  asked: Promise<T>,
  timeout: number | undefined,
  lastError: () => unknown,
): Promise<T> {
  const ms = timeout ?? DEFAULT_TIMEOUT
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(unreachable(ms, lastError())), ms)
  })
  try {
    return await Promise.race([asked, late])
  } catch (error) {
    if (error instanceof Qcow2Error) throw error
    const reason = error instanceof Error ? error.message : String(error)
    throw new Qcow2Error('ERR_QCOW2_IO', `the queue: ${reason}`, { transient: true, cause: error })
  } finally {
    clearTimeout(timer)
    // Whoever waits no more is not told.
    asked.catch(() => {})
  }
}

/** The system's name of what became of a connection. */
function unreachable(ms: number, cause: unknown): Qcow2Error {
  const said = cause instanceof Error && 'code' in cause && typeof cause.code === 'string' ? cause.code : undefined
  const code = said !== undefined && /^E[A-Z]+$/.test(said) ? (said as SystemErrorCode) : 'ETIMEDOUT'
  const last = cause instanceof Error ? `: ${cause.message}` : ''
  return new Qcow2Error(code, `${code}: the queue has not answered for ${ms} ms${last}`, {
    syscall: 'connect',
    transient: true,
    cause,
  })
}
