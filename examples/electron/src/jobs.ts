/** The jobs, wherever they run: in a utility process here, in the main process or a worker thread just as well. */

import { convert, Qcow2Error } from 'qcow2'
import type { FromJobs, Outcome, Request, ToJobs } from './bridge.js'

/** Does what messages ask for, and answers by `send`. */
export function serveJobs(send: (message: FromJobs) => void): (message: ToJobs) => void {
  const running = new Map<number, AbortController>()

  async function run(id: number, { source, target, to, compress }: Request): Promise<void> {
    const controller = new AbortController()
    running.set(id, controller)
    const outcome: Outcome = await convert(source, target, {
      // What the user chose is what it is: a raw disk is known by its name here, and by nothing in it.
      from: /\.(raw|img|iso)$/i.test(source) ? 'raw' : undefined,
      to,
      compress: compress && to === 'qcow2',
      overwrite: true,
      signal: controller.signal,
      progressInterval: 100,
      onProgress: ({ current, total }) => send({ id, progress: total > 0 ? current / total : 0 }),
    }).then(
      ({ virtualSize, bytesWritten, durationMs }) => ({ done: { virtualSize, bytesWritten, durationMs } }),
      (error: unknown) => ({ failure: toFailure(error) }),
    )
    running.delete(id)
    send({ id, outcome })
  }

  return message => {
    if ('start' in message) void run(message.id, message.start)
    else running.get(message.id)?.abort()
  }
}

const toFailure = (error: unknown) =>
  error instanceof Qcow2Error
    ? { code: error.code, message: error.message }
    : { code: 'UNKNOWN', message: error instanceof Error ? error.message : String(error) }
