/** A file as the body of an HTTP PUT. */

import { type FileHandle, open as openFile } from 'node:fs/promises'
import { Readable } from 'node:stream'
import { AbortError, invalidArgument, Qcow2Error, type SystemErrorCode } from '../errors.js'
import type { Image } from '../image.js'
import { open } from '../open.js'
import { toName } from '../text.js'
import type { UploadResult } from './kinds.js'
import type { JobProgress } from './progress.js'
import { codeOf } from './target.js'

export interface Upload {
  readonly path: string
  readonly url: string
  readonly headers: Readonly<Record<string, string>>
  readonly signal: AbortSignal
  readonly onProgress: (progress: JobProgress) => void
}

/** Bytes between two reports. */
const REPORT = 2 ** 20

/** Milliseconds in which a server takes something, or has gone. */
const SILENCE = 60_000

/** Sends a file with its length said first. A redirection is an error: only the address that was judged is spoken to. */
export async function upload({ path, url, headers, signal, onProgress }: Upload): Promise<UploadResult> {
  const begin = performance.now()
  const name = toName(path)
  const held = await locked(name, signal)
  const silence = new Silence()
  let file: FileHandle | undefined
  try {
    file = await openFile(name, 'r')
    const stat = await file.stat()
    if (!stat.isFile()) throw invalidArgument('source', `upload: '${path}' is no regular file, whose length is known`)
    const { size } = stat
    const chunks = counted(file.createReadStream({ autoClose: false }), size, onProgress)
    const body = Readable.from(silence.watch(chunks))
    const answer = await fetch(url, {
      method: 'PUT',
      body: Readable.toWeb(body) as ReadableStream<Uint8Array>,
      duplex: 'half',
      redirect: 'error',
      headers: { ...headers, 'content-length': String(size) },
      signal: AbortSignal.any([signal, silence.signal]),
    } as RequestInit)
    // What it says is nobody's, and its connection is free again.
    await answer.body?.cancel()
    if (!answer.ok) throw refused(answer.status, url)
    const etag = answer.headers.get('etag')
    const durationMs = performance.now() - begin
    return { bytesSent: size, status: answer.status, ...(etag !== null && { etag }), durationMs }
  } catch (error) {
    if (signal.aborted) throw new AbortError(signal.reason)
    if (error instanceof Qcow2Error) throw error
    throw failed(error, url)
  } finally {
    silence.end()
    await Promise.all([file?.close(), held?.close()])
  }
}

/** Nobody writes to an image meanwhile; any other file is only its bytes. */
async function locked(name: string | Buffer, signal: AbortSignal): Promise<Image | undefined> {
  try {
    return await open(name, { references: 'layer', signal })
  } catch (error) {
    if (codeOf(error) === 'ERR_QCOW2_LOCKED' || signal.aborted) throw error
    return undefined
  }
}

/** Ends a request whose server takes nothing any more; how long its answer takes is the client's own limit. */
class Silence {
  readonly #abort = new AbortController()
  #timer: NodeJS.Timeout | undefined

  get signal(): AbortSignal {
    return this.#abort.signal
  }

  async *watch(chunks: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
    for await (const chunk of chunks) {
      this.end()
      const late = new Qcow2Error('ETIMEDOUT', `ETIMEDOUT: the server has taken nothing for ${SILENCE} ms`)
      this.#timer = setTimeout(() => this.#abort.abort(late), SILENCE)
      yield chunk
    }
    this.end()
  }

  end(): void {
    clearTimeout(this.#timer)
  }
}

async function* counted(
  chunks: AsyncIterable<Uint8Array>,
  total: number,
  onProgress: Upload['onProgress'],
): AsyncGenerator<Uint8Array> {
  let [current, told] = [0, 0]
  for await (const chunk of chunks) {
    yield chunk
    current += chunk.length
    if (current - told < REPORT && current !== total) continue
    told = current
    onProgress({ phase: 'upload', current, total })
  }
}

/** A query can be a key that was signed into the address. */
const shown = (url: string): string => url.replace(/[?#].*$/s, '')

/** Of 4xx the server will say the same again, but for those that say that it is a matter of time. */
const PASSING: ReadonlySet<number> = new Set([408, 409, 423, 425, 429])

function refused(status: number, url: string): Qcow2Error {
  const final = status >= 400 && status < 500 && !PASSING.has(status)
  const message = `the server answered ${status} to PUT ${shown(url)}`
  return new Qcow2Error(final ? 'ERR_QCOW2_REFERENCE_DENIED' : 'ERR_QCOW2_IO', message, { path: shown(url) })
}

function failed(error: unknown, url: string): Qcow2Error {
  const cause = error instanceof Error && error.cause instanceof Error ? error.cause : error
  const reason = cause instanceof Error ? cause.message : String(cause)
  const code = codeOf(cause)
  const system = code !== undefined && /^E[A-Z]+$/.test(code)
  const message = `PUT ${shown(url)}: ${reason}`
  return new Qcow2Error(system ? (code as SystemErrorCode) : 'ERR_QCOW2_IO', message, {
    path: shown(url),
    transient: true,
    cause: error,
  })
}
