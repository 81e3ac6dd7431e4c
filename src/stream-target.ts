/** What takes a disk image as a stream of bytes, front to back: an object in a store, an upload. */

import type { Abortable, Progress } from './options.js'

/** Options of {@link StreamTarget.upload}. */
export interface UploadOptions extends Abortable {
  /** Bytes that will come, where that is known: another number is an error, and nothing appears. */
  byteLength?: number | undefined
  /** Called with the progress: bytes that the other side has, and `byteLength`, or 0. What it throws ends the upload. */
  onProgress?: ((progress: Progress) => unknown) | undefined
}

/** What became of an upload. */
export interface UploadResult {
  /** Bytes. */
  readonly bytesWritten: number
  /** The entity tag of what is there now, as the other side tells it. */
  readonly etag?: string
  /** The version, where the other side keeps several. */
  readonly versionId?: string
}

/** Where a stream of bytes goes. What it makes appears whole, when all bytes have come, or not at all. */
export interface StreamTarget {
  /** What errors call it. */
  readonly name: string
  /** Takes all bytes. They are asked for as they can be taken; a stream that is not read to its end is destroyed. */
  upload(bytes: AsyncIterable<Uint8Array>, options?: UploadOptions): Promise<UploadResult>
}

/** Whether a target takes a stream. A file is named by a string, Buffer or URL, none of which does. */
export const isStreamTarget = (target: unknown): target is StreamTarget =>
  typeof target === 'object' && target !== null && 'upload' in target && typeof target.upload === 'function'
