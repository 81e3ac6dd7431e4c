/** What a worker does for each kind of job. */

import { type CheckResult, check } from '../check.js'
import { compact } from '../compact.js'
import { convert } from '../convert.js'
import { invalidArgument, Qcow2Error } from '../errors.js'
import { inspect } from '../inspect.js'
import type { Limits, LongRunning } from '../options.js'
import type { Secrets } from '../secret.js'
import { toName } from '../text.js'
import type { JobData, JobKind, JobResults } from './kinds.js'
import { plain } from './plain.js'
import type { JobProgress } from './progress.js'
import type { Roots } from './roots.js'
import { type Fence, NewFile } from './target.js'
import { upload } from './upload.js'

/** What a worker lets its jobs do. */
export interface Means {
  readonly roots: Roots
  readonly references: 'deny' | 'roots'
  readonly secret: Secrets | undefined
  readonly limits: Limits | undefined
  /** Worker threads, and bytes a second, of one job. */
  readonly threads: number | undefined
  readonly rate: number | undefined
  readonly uploads: readonly string[]
  readonly uploadHeaders: ((url: string) => Promise<Record<string, string>>) | undefined
  readonly progressInterval: number | undefined
}

/** An attempt of a job. */
export interface Attempt {
  readonly means: Means
  /** Tells the job from all others. */
  readonly job: string
  /** There were attempts before. */
  readonly again: boolean
  readonly fence: Fence
  readonly signal: AbortSignal
  readonly onProgress: (progress: JobProgress) => void
}

type Performers = { readonly [K in JobKind]: (data: JobData[K], attempt: Attempt) => Promise<JobResults[K]> }

const MAX_FINDINGS = 100

const running = ({ means, signal, onProgress }: Attempt): LongRunning => ({
  signal,
  onProgress,
  progressInterval: means.progressInterval,
  concurrency: means.threads,
})

const reading = ({ means: { roots, references, secret, limits } }: Attempt) => ({
  references: references === 'roots' ? roots.references : ('deny' as const),
  secret,
  limits,
})

const PERFORMERS: Performers = {
  async convert({ source, target, overwrite = false, ...how }, attempt) {
    const { roots, rate } = attempt.means
    const [from, place] = [await roots.source(source), await roots.target(target)]
    if (from === place.path) throw invalidArgument('target', `convert: the target '${target}' is the source`)
    const file = new NewFile(place, attempt.job)
    if (attempt.again) {
      await file.revokeOthers()
      const done = await file.done(attempt.fence)
      if (done !== undefined) return done.result as JobResults['convert']
    }
    if (!overwrite) await file.refuseExisting()
    try {
      const options = { ...how, ...reading(attempt), ...running(attempt), rate }
      const result = plain(await convert(toName(from), toName(file.temporary), options))
      await file.name(attempt.fence, overwrite, result, attempt.signal)
      return result
    } finally {
      await file.discard()
    }
  },

  async check({ source, ...how }, attempt) {
    const path = await attempt.means.roots.source(source)
    const { limits } = attempt.means
    return shortened(await check(toName(path), { ...how, ...running(attempt), limits }))
  },

  async inspect({ source }, { means: { roots, limits }, signal }) {
    const path = await roots.source(source)
    const name = toName(path)
    // A buffer would be the bytes of an image.
    if (typeof name !== 'string') throw invalidArgument('source', `inspect: the name of '${source}' is no text`)
    return plain(await inspect(name, { limits, signal }))
  },

  async compact({ source, ...how }, attempt) {
    const path = await attempt.means.roots.source(source)
    return plain(await compact(toName(path), { ...how, ...reading(attempt), ...running(attempt) }))
  },

  async upload({ source, url, contentType = 'application/octet-stream' }, attempt) {
    const { roots, uploads, uploadHeaders } = attempt.means
    const path = await roots.source(source)
    // As it is spoken to: with what `..` and the like come to.
    const { href } = new URL(url)
    if (!uploads.some(start => href.startsWith(start))) {
      const message = `upload: this worker sends nothing to ${new URL(url).origin}: the address begins with none of its uploads`
      throw new Qcow2Error('ERR_QCOW2_REFERENCE_DENIED', message, { field: 'uploads' })
    }
    const headers = { 'content-type': contentType, ...(await uploadHeaders?.(href)) }
    return upload({ path, url: href, headers, signal: attempt.signal, onProgress: attempt.onProgress })
  },
}

function shortened({ messages: _, findings, omittedFindings, ...counts }: CheckResult): JobResults['check'] {
  const listed = findings.slice(0, MAX_FINDINGS)
  return plain({ ...counts, findings: listed, omittedFindings: omittedFindings + findings.length - listed.length })
}

/** Does a job; resolves to what it says. Its data has been read. */
export const perform = <K extends JobKind>(kind: K, data: JobData[K], attempt: Attempt): Promise<JobResults[K]> =>
  PERFORMERS[kind](data, attempt)
