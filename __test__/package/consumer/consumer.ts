// A consumer's file, checked against the installed package under its strictest settings.
import { type ConvertResult, convert, create, type Image, type MapEntry, open, Qcow2Error } from 'qcow2'
import { type JobQueue, type JobResults, openQueue, startWorker } from 'qcow2/jobs'

export async function use(path: string): Promise<number> {
  const result: ConvertResult = await convert(path, `${path}.raw`, {
    to: 'raw',
    references: 'deny',
    onProgress: ({ current, total }) => console.log(current / total),
    signal: AbortSignal.timeout(1000),
  })
  const made = await create(`${path}.qcow2`, { size: 2n ** 30n, clusterSize: 65536, compressionType: 'zstd' })
  await made.close()
  const image: Image = await open(path)
  const buffer = new Uint8Array(4096)
  const { bytesRead, buffer: same } = await image.read(buffer, { position: 0 })
  const typed: Uint8Array = same
  for await (const entry of image.map()) {
    const kept: MapEntry = entry
    console.log(kept.start, kept.length, kept.depth, kept.zero, kept.data, kept.offset ?? 'nowhere')
  }
  await image.close()
  return result.bytesWritten + bytesRead + typed.length
}

export async function send(path: string): Promise<number> {
  const queue: JobQueue = await openQueue({ connection: 'redis://localhost' })
  const job = await queue.add('convert', { source: path, target: `${path}.raw`, to: 'raw' }, { priority: 1 })
  const result: JobResults['convert'] = await job.finished({ onProgress: ({ current }) => console.log(current) })
  const { ok } = await (await queue.add('check', { source: path })).finished()
  await startWorker({ connection: { host: 'localhost' }, roots: [path] })
  // @ts-expect-error A job has no options of others.
  await queue.add('inspect', { source: path, to: 'raw' })
  return ok ? result.virtualSize : 0
}

export function explain(error: unknown): string {
  if (!(error instanceof Qcow2Error)) throw error
  return error.code === 'ERR_QCOW2_LIMIT' ? 'too large' : error.message
}

// @ts-expect-error A misspelt option is refused by the compiler too.
void open('disk.qcow2', { referencs: 'allow' })
// @ts-expect-error The target's format must be said.
void convert('disk.qcow2', 'disk.raw', {})
// @ts-expect-error A misspelt code of an error, too.
export const isFull = (error: Qcow2Error): boolean => error.code === 'ENOSPACE'
