/** Converting into what takes a stream: the image is sent as it is made, front to back. */

import type { ConvertOptions, ConvertResult } from './convert.js'
import { invalidArgument } from './errors.js'
import { isStreamed, quoted, STREAMED_FORMATS } from './formats/table.js'
import type { Progress } from './options.js'
import { createQcow2Stream, type ImageStream, type Qcow2StreamOptions } from './qcow2-stream.js'
import { type ImageSource, targetFormat, toTargetFormat } from './source.js'
import type { StreamTarget } from './stream-target.js'
import { type BigIntResults, sizesIn } from './units.js'

/** What a stream has of a convert's options; of the others, those that are not on are no matter. */
const STREAMED = [
  'from',
  'to',
  'compress',
  'create',
  'references',
  'secret',
  'snapshot',
  'limits',
  'locking',
  'forceShare',
  'concurrency',
  'signal',
  'progressInterval',
  'onProgress',
  'bigint',
  // Whatever is said: the other side has all of it, or nothing.
  'durable',
] as const satisfies readonly (keyof (ConvertOptions & BigIntResults))[]

/** Converts into a target that takes a stream. `options` has no names but those of {@link ConvertOptions}. */
export async function convertToStream(
  source: ImageSource | readonly ImageSource[],
  target: StreamTarget,
  options: ConvertOptions & BigIntResults,
): Promise<ConvertResult<number | bigint>> {
  const begin = performance.now()
  const { from, to, compress, create, references, secret, snapshot, limits, locking, forceShare } =
    refuseOthers(options)
  const { concurrency, signal, onProgress, progressInterval, bigint } = options
  const format = toTargetFormat('convert', to === undefined ? undefined : targetFormat(to, 'convert: to'))
  if (!isStreamed(format)) {
    const message = `convert: a ${format} image is not made front to back: the target is a stream, which can be one of ${quoted(STREAMED_FORMATS)}`
    throw invalidArgument('to', message)
  }
  const reading = { from, references, secret, snapshot, limits, locking, forceShare, concurrency, signal }
  const progress = new UploadProgress(onProgress)
  const stream = await createQcow2Stream(source, {
    ...reading,
    ...progress.counting(progressInterval),
    to: format,
    compress,
    // Its reader refuses what the format does not have.
    create: create as Qcow2StreamOptions['create'],
  })
  // The target hears of what fails when it reads.
  stream.on('error', () => {})
  const { byteLength, virtualSize } = stream
  try {
    const size = sizesIn(bigint)
    const whole = size(virtualSize, 'convert: virtualSize')
    const { bytesWritten } = await target.upload(stream, { byteLength, signal, ...progress.sending(stream) })
    const sent = size(bytesWritten, 'bytesWritten')
    return { virtualSize: whole, bytesRead: sent, bytesWritten: sent, durationMs: performance.now() - begin }
  } finally {
    // A target that leaves some of it holds nothing open.
    stream.destroy()
  }
}

/** The progress in bytes of guest data: of what is compressed, and so counted first, that is the first half. */
class UploadProgress {
  readonly #onProgress: ConvertOptions['onProgress']
  #counted = 0
  #sending = false

  constructor(onProgress: ConvertOptions['onProgress']) {
    this.#onProgress = onProgress
  }

  /** Of making the stream. */
  counting(progressInterval: number | undefined): Pick<ConvertOptions, 'onProgress' | 'progressInterval'> {
    const onProgress = this.#onProgress
    if (onProgress === undefined) return {}
    const told = (progress: Progress): unknown => {
      // What was emitted is not sent yet.
      if (this.#sending) return undefined
      this.#counted = progress.total / 2
      return onProgress({ ...progress, phase: 'convert' })
    }
    return { onProgress: told, progressInterval }
  }

  /** Of sending it. */
  sending({ byteLength, virtualSize }: ImageStream): Pick<ConvertOptions, 'onProgress'> {
    const onProgress = this.#onProgress
    if (onProgress === undefined) return {}
    this.#sending = true
    const size = Number(virtualSize)
    const told = ({ current }: Progress): unknown => {
      const sent = current === byteLength ? size : Math.floor((current / byteLength) * size)
      const done = this.#counted + sent
      return onProgress({ phase: 'convert', current: done, total: this.#counted + size, steps: [done] })
    }
    return { onProgress: told }
  }
}

function refuseOthers(options: ConvertOptions & BigIntResults): ConvertOptions {
  const known: ReadonlySet<string> = new Set(STREAMED)
  const other = Object.entries(options).find(
    ([name, value]) => !known.has(name) && value !== undefined && value !== false && value !== 0,
  )
  if (other === undefined) return options
  const [name] = other
  const way =
    name === 'overwrite' ? 'it is an option of the target: s3Target({ … })' : 'convert to a file, and upload that'
  const message = `convert: ${name} is not possible where the target takes a stream: ${way}`
  throw invalidArgument(name, message)
}
