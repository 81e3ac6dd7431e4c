/** Disks on web servers, which answer requests of ranges. */

import { ABORTABLE, type Abortable, callback, integer, readOptions } from '../options.js'
import type { RandomAccessSource } from '../random-access.js'
import { type Address, toAddress } from './address.js'
import { CONCURRENCY, RangedSource } from './ranged-source.js'
import { Ranges } from './ranges.js'
import { type HeadersOption, Requests, requestHeaders } from './requests.js'
import { REMOTE_TIMES, type RemoteTimes, toPatience } from './retry.js'

/** Options of {@link httpSource}. */
export interface HttpSourceOptions extends RemoteTimes, Abortable {
  /**
   * Headers of each request, `authorization` say, or a function that is asked for them before each one. They go to the origin of `url` alone,
   * and nowhere that it redirects to. No message has them.
   */
  headers?: HeadersOption | undefined
  /** How many redirects a request may take, 0 to 20. Default 5. Those from https to http are refused. */
  maxRedirects?: number | undefined
  /** Requests at once, 1 to 64. Default 8. */
  concurrency?: number | undefined
  /** What to ask with instead of Node's `fetch`: one that knows a proxy, client certificates, or which addresses may be reached. */
  fetch?: typeof fetch | undefined
}

const OPTIONS = {
  ...ABORTABLE,
  ...REMOTE_TIMES,
  headers: requestHeaders,
  maxRedirects: integer(0, 20),
  concurrency: integer(1, 64),
  fetch: callback<typeof fetch>(),
} as const

const REDIRECTS = 5

/**
 * A disk on a web server, which is asked for the ranges that are read of it. The first request, of its first MiB, is made here; it tells the
 * size, and by what versions are told apart.
 *
 * Only what a caller names is asked: no name in an image ever becomes a request. A server whose addresses come from strangers should say
 * which ones it reaches (`fetch`, `maxRedirects: 0`).
 *
 * @example
 * ```js
 * import { httpSource } from 'qcow2'
 *
 * const source = await httpSource('https://images.example/disk.qcow2', {
 *   headers: () => ({ authorization: `Bearer ${token()}` }),
 * })
 * const header = Buffer.alloc(512)
 * await source.read(header, 0, AbortSignal.timeout(60_000))
 * ```
 *
 * A version that is another one now (its ETag, Last-Modified or length) ends what reads it with `ERR_QCOW2_SOURCE_CHANGED`.
 *
 * @throws {@link Qcow2Error} `ERR_QCOW2_INVALID_ARGUMENT` for what is no address on the web; `ERR_QCOW2_UNSUPPORTED_FEATURE` for a server that answers with
 *   the whole file, or encodes it; `EACCES` (status 401, 403), `ENOENT` (404, 410), `ETIMEDOUT` and the other names of the system;
 *   `ERR_QCOW2_IO` for other statuses and answers that are wrong. `transient` is true for what was tried several times
 */
export async function httpSource(url: string | URL, options?: HttpSourceOptions): Promise<RandomAccessSource> {
  const address = toAddress(url, 'httpSource')
  const {
    signal,
    headers,
    maxRedirects = REDIRECTS,
    concurrency = CONCURRENCY,
    fetch,
    ...times
  } = readOptions(options, 'httpSource', OPTIONS)
  const patience = toPatience(times)
  const ranges = new Ranges(new Requests(address, { headers, maxRedirects, fetch }), patience)
  const { version, first } = await ranges.begin(signal)
  return new RangedSource({
    size: version.size,
    name: ranges.name,
    identity: identityOf(address),
    concurrency,
    first,
    fill: (buffer, position, signal) => ranges.fill(buffer, position, version, signal),
  })
}

/** Equal addresses are the same disk. What may be secret in them is not to be read from it. */
function identityOf({ url }: Address): string {
  const { createHash } = process.getBuiltinModule('node:crypto')
  return `http:${createHash('sha256').update(url.href).digest('hex')}`
}
