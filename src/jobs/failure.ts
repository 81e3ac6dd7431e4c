/** Errors of jobs, as a queue keeps them: a text that begins with the code. */

import { AbortError, Qcow2Error, type Qcow2ErrorCode, type SystemErrorCode } from '../errors.js'
import { codeOf } from './target.js'

/** What the same job would meet on any worker, however often: it is not tried again. */
const FINAL: ReadonlySet<string> = new Set([
  'EEXIST',
  'ERR_QCOW2_BAD_SECRET',
  'ERR_QCOW2_CHAIN',
  'ERR_QCOW2_CORRUPT',
  'ERR_QCOW2_DATA_LOSS',
  'ERR_QCOW2_FORMAT_UNKNOWN',
  'ERR_QCOW2_INVALID_ARGUMENT',
  'ERR_QCOW2_INVALID_HEADER',
  'ERR_QCOW2_LIMIT',
  'ERR_QCOW2_NO_BITMAP',
  'ERR_QCOW2_NO_SNAPSHOT',
  'ERR_QCOW2_REFERENCE_DENIED',
  'ERR_QCOW2_UNSUPPORTED_FEATURE',
] satisfies (Qcow2ErrorCode | SystemErrorCode)[])

/** Whether there is no use in another attempt. */
export function isFinal(error: unknown): boolean {
  const code = codeOf(error)
  return code !== undefined && FINAL.has(code)
}

const CODE = /^((?:ERR_QCOW2_|E)[A-Z0-9_]+|ABORT_ERR): /

/** What is kept of an error. */
export function reasonOf(error: unknown): string {
  const message = error instanceof Error ? error.message : String(error)
  const code = codeOf(error) ?? 'ERR_QCOW2_INTERNAL'
  return message.startsWith(`${code}: `) ? message : `${code}: ${message}`
}

export const CANCELLED = 'ABORT_ERR: cancelled'

/** The code and the rest of a reason that was kept; what BullMQ says itself, of workers that were lost, has none. */
export function readReason(reason: string): { readonly code: string; readonly message: string } {
  const code = CODE.exec(reason)?.[1]
  if (code !== undefined) return { code, message: reason }
  return { code: 'ERR_QCOW2_IO', message: `ERR_QCOW2_IO: ${reason}` }
}

/** The error that a reason was made of. */
export function toFailure(id: string, reason: string): Qcow2Error {
  if (reason.startsWith(CANCELLED)) return new AbortError(new Error(`the job '${id}' was cancelled: ${reason}`))
  const { code, message } = readReason(reason)
  return new Qcow2Error(code as Qcow2ErrorCode, `the job '${id}' failed: ${message}`)
}
