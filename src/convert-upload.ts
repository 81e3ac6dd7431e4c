/** Converting into what takes a stream: the image is sent as it is made, front to back. */

import type { ConvertOptions, ConvertResult } from './convert.js'
import { invalidArgument } from './errors.js'
import { isStreamed, quoted, STREAMED_FORMATS } from './formats/table.js'
import type { Progress } from './options.js'
import { createQcow2Stream, type Qcow2StreamOptions } from './qcow2-stream.js'
import { type ImageSource, targetFormat, toTargetFormat } from './source.js'
import type { StreamTarget } from './stream-target.js'
import { type BigIntResults, sizesIn } from './units.js'

/** What a stream has of a convert's options; of the others, those that are not on are no matter. */
const STREAMED = [
  'from',
  'to',
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
] as const satisfies readonly (keyof (ConvertOptions & BigIntResults))[]

/** Converts into a target that takes a stream. `options` has no names but those of {@link ConvertOptions}. */
export async function convertToStream(
  source: ImageSource | readonly ImageSource[],
  target: StreamTarget,
  options: ConvertOptions & BigIntResults,
): Promise<ConvertResult<number | bigint>> {
  const begin = performance.now()
  const { from, to, create, references, secret, snapshot, limits, locking, forceShare } = refuseOthers(options)
  const { concurrency, signal, onProgress, bigint } = options
  const format = toTargetFormat('convert', to === undefined ? undefined : targetFormat(to, 'convert: to'))
  if (!isStreamed(format)) {
    const message = `convert: a ${format} image is not made front to back: the target is a stream, which can be one of ${quoted(STREAMED_FORMATS)}`
    throw invalidArgument('to', message)
  }
  const reading = { from, references, secret, snapshot, limits, locking, forceShare, concurrency, signal }
  const stream = await createQcow2Stream(source, {
    ...reading,
    to: format,
    // Its reader refuses what the format does not have.
    create: create as Qcow2StreamOptions['create'],
  })
  // The target hears of what fails when it reads.
  stream.on('error', () => {})
  const { byteLength, virtualSize } = stream
  const scale = byteLength === 0 ? 0 : Number(virtualSize) / byteLength
  const told = ({ current }: Progress): unknown => {
    const done = current === byteLength ? Number(virtualSize) : Math.floor(current * scale)
    return onProgress?.({ phase: 'convert', current: done, total: Number(virtualSize), steps: [done] })
  }
  try {
    const size = sizesIn(bigint)
    const whole = size(virtualSize, 'convert: virtualSize')
    const { bytesWritten } = await target.upload(stream, {
      byteLength,
      signal,
      ...(onProgress && { onProgress: told }),
    })
    const sent = size(bytesWritten, 'bytesWritten')
    return { virtualSize: whole, bytesRead: sent, bytesWritten: sent, durationMs: performance.now() - begin }
  } finally {
    // A target that leaves some of it holds nothing open.
    stream.destroy()
  }
}

function refuseOthers(options: ConvertOptions & BigIntResults): ConvertOptions {
  const known: ReadonlySet<string> = new Set(STREAMED)
  const other = Object.entries(options).find(
    ([name, value]) => !known.has(name) && value !== undefined && value !== false && value !== 0,
  )
  if (other === undefined) return options
  const [name] = other
  const message = `convert: ${name} is not possible where the target is a stream: convert to a file, and upload that`
  throw invalidArgument(name, message)
}
