/** Disks that are neither files nor exports: what a caller's own object reads and writes. */

/** Runs of bytes, as a source tells of them. */
export interface SourceExtent {
  /** Bytes from the beginning of the source. */
  readonly position: number
  /** Bytes. */
  readonly length: number
  /** Whether there are only zero bytes, so that nothing of it needs to be read. */
  readonly zero: boolean
}

/**
 * A disk that an object of the caller's reads, and where it can, writes. Its promises are awaited by worker threads while the event loop goes
 * on, up to `concurrency` of them at once. What it throws is the `cause` of the error that the library's call ends with. Every `signal` is
 * aborted when nobody waits for the answer any more; an answer that comes later is ignored.
 */
export interface RandomAccessSource {
  /** Bytes. It is read once, where the source is opened; what `truncate` was told is the size from then on. */
  readonly size: number
  /**
   * Fills the whole `buffer` with the bytes from `position` on, and returns its length: nobody asks for bytes behind the end, so fewer are an
   * error (`ERR_QCOW2_IO`). The buffer is the source's until its promise is settled.
   */
  read(buffer: Uint8Array, position: number, signal: AbortSignal): Promise<number> | number
  /** Writes all of `buffer` at `position`, and returns its length; where that is behind the end, the source grows. Without it the source is read only. */
  write?(buffer: Uint8Array, position: number, signal: AbortSignal): Promise<number> | number
  /** Makes durable what was written before it was called. */
  sync?(signal: AbortSignal): Promise<void> | void
  /** Makes the source as long as that; what it grows by reads as zeroes. Without it the source keeps its size. */
  truncate?(size: number, signal: AbortSignal): Promise<void> | void
  /** Called once for each time that it was opened, when nothing of it will be asked any more. */
  close?(): Promise<void> | void
  /** What is equal for two sources is the same bytes: so a loop in a chain is seen, and a target that is its own source. Default: the object. */
  readonly identity?: string
  /** Whether the bytes from `position` on are zeroes: runs in order that begin at `position`, as many as the source likes to tell at once. */
  extents?(
    position: number,
    length: number,
    signal: AbortSignal,
  ): Promise<readonly SourceExtent[]> | readonly SourceExtent[]
  /** How many requests it may be asked at once. Default 8. */
  readonly concurrency?: number
  /** What errors call it. Default `RandomAccessSource`. */
  readonly name?: string
}
