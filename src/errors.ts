/** The library's error: a stable code, and where it happened. */

import { type Shown, shown, shownText } from './text.js'

/**
 * What went wrong, by who can do something about it. Codes are API, messages are not.
 *
 * - `ERR_QCOW2_INVALID_HEADER`: not a qcow2 image, or a header that contradicts itself
 * - `ERR_QCOW2_UNSUPPORTED_FEATURE`: a feature, version or format that this library does not know
 * - `ERR_QCOW2_CORRUPT`: metadata behind the header, or compressed data, is damaged
 * - `ERR_QCOW2_REFERENCE_DENIED`: the image names another file, and `references` does not allow to open it
 * - `ERR_QCOW2_LIMIT`: a size or count exceeds one of `limits`
 * - `ERR_QCOW2_LOCKED`: another process holds a conflicting lock
 * - `ERR_QCOW2_READ_ONLY`: a write to an image or file that is open for reading only
 * - `ERR_QCOW2_BAD_SECRET`: the secret is missing or does not open the image
 * - `ERR_QCOW2_NO_SNAPSHOT`, `ERR_QCOW2_NO_BITMAP`: nothing has this id or name
 * - `ERR_QCOW2_DATA_LOSS`: the operation would lose data and that was not acknowledged
 * - `ERR_QCOW2_CHAIN`: the backing chain contains itself, is too deep, or a member is missing
 * - `ERR_QCOW2_SOURCE_CHANGED`: what was being read is another version now, on the web server or in the store that it is read from
 * - `ERR_QCOW2_CLOSED`: the handle is closed or closing
 * - `ERR_QCOW2_INVALID_ARGUMENT`: an argument has the wrong type, is out of range, or contradicts another; an
 *   unknown option
 * - `ERR_QCOW2_FORMAT_UNKNOWN`: the file is no qcow2 image and `format` does not say what it is
 * - `ERR_QCOW2_ADDON_MISSING`: the native addon for this platform is not installed or cannot be loaded
 * - `ERR_QCOW2_PEER_MISSING`: a package that only this part needs is not installed: `bullmq` for `qcow2/jobs`
 * - `ERR_QCOW2_IO`: a system error without a name of its own; a stream of the caller's that failed
 * - `ERR_QCOW2_INTERNAL`: a bug in this library; the handle refuses further work
 */
export type Qcow2ErrorCode =
  | 'ERR_QCOW2_INVALID_HEADER'
  | 'ERR_QCOW2_UNSUPPORTED_FEATURE'
  | 'ERR_QCOW2_CORRUPT'
  | 'ERR_QCOW2_REFERENCE_DENIED'
  | 'ERR_QCOW2_LIMIT'
  | 'ERR_QCOW2_LOCKED'
  | 'ERR_QCOW2_READ_ONLY'
  | 'ERR_QCOW2_BAD_SECRET'
  | 'ERR_QCOW2_NO_SNAPSHOT'
  | 'ERR_QCOW2_NO_BITMAP'
  | 'ERR_QCOW2_DATA_LOSS'
  | 'ERR_QCOW2_CHAIN'
  | 'ERR_QCOW2_SOURCE_CHANGED'
  | 'ERR_QCOW2_CLOSED'
  | 'ERR_QCOW2_INVALID_ARGUMENT'
  | 'ERR_QCOW2_FORMAT_UNKNOWN'
  | 'ERR_QCOW2_ADDON_MISSING'
  | 'ERR_QCOW2_PEER_MISSING'
  | 'ERR_QCOW2_IO'
  | 'ERR_QCOW2_INTERNAL'

/** A system error's name, as Node's own errors carry it: all that Node knows. What it has no name for is `ERR_QCOW2_IO`, with its `errno`. */
export type SystemErrorCode =
  | 'E2BIG'
  | 'EACCES'
  | 'EADDRINUSE'
  | 'EADDRNOTAVAIL'
  | 'EAFNOSUPPORT'
  | 'EAGAIN'
  | 'EAI_ADDRFAMILY'
  | 'EAI_AGAIN'
  | 'EAI_BADFLAGS'
  | 'EAI_BADHINTS'
  | 'EAI_CANCELED'
  | 'EAI_FAIL'
  | 'EAI_FAMILY'
  | 'EAI_MEMORY'
  | 'EAI_NODATA'
  | 'EAI_NONAME'
  | 'EAI_OVERFLOW'
  | 'EAI_PROTOCOL'
  | 'EAI_SERVICE'
  | 'EAI_SOCKTYPE'
  | 'EALREADY'
  | 'EBADF'
  | 'EBUSY'
  | 'ECANCELED'
  | 'ECHARSET'
  | 'ECONNABORTED'
  | 'ECONNREFUSED'
  | 'ECONNRESET'
  | 'EDESTADDRREQ'
  | 'EEXIST'
  | 'EFAULT'
  | 'EFBIG'
  | 'EFTYPE'
  | 'EHOSTDOWN'
  | 'EHOSTUNREACH'
  | 'EILSEQ'
  | 'EINTR'
  | 'EINVAL'
  | 'EIO'
  | 'EISCONN'
  | 'EISDIR'
  | 'ELOOP'
  | 'EMFILE'
  | 'EMLINK'
  | 'EMSGSIZE'
  | 'ENAMETOOLONG'
  | 'ENETDOWN'
  | 'ENETUNREACH'
  | 'ENFILE'
  | 'ENOBUFS'
  | 'ENODATA'
  | 'ENODEV'
  | 'ENOENT'
  | 'ENOEXEC'
  | 'ENOMEM'
  | 'ENONET'
  | 'ENOPROTOOPT'
  | 'ENOSPC'
  | 'ENOSYS'
  | 'ENOTCONN'
  | 'ENOTDIR'
  | 'ENOTEMPTY'
  | 'ENOTSOCK'
  | 'ENOTSUP'
  | 'ENOTTY'
  | 'ENXIO'
  | 'EOF'
  | 'EOVERFLOW'
  | 'EPERM'
  | 'EPIPE'
  | 'EPROTO'
  | 'EPROTONOSUPPORT'
  | 'EPROTOTYPE'
  | 'ERANGE'
  | 'EREMOTEIO'
  | 'EROFS'
  | 'ESHUTDOWN'
  | 'ESOCKTNOSUPPORT'
  | 'ESPIPE'
  | 'ESRCH'
  | 'ESTALE'
  | 'ETIMEDOUT'
  | 'ETXTBSY'
  | 'EUNATCH'
  | 'EXDEV'

/** Where an error happened. All optional: what is not known is absent. */
export interface ErrorPlace {
  /** The file, as it was opened. */
  path?: string | undefined
  /** The bytes of `path`, where they are not UTF-8. */
  pathBytes?: Buffer | undefined
  /** Byte offset in that file. */
  offset?: number | undefined
  /** The field of the format by its name in the specification, or the argument. */
  field?: string | undefined
  /** The system's error number, negative as in Node's own errors. */
  errno?: number | undefined
  /** The system call. */
  syscall?: string | undefined
  /** The same request may succeed when it is made again. */
  transient?: boolean | undefined
  /** The error that led to this one. */
  cause?: unknown
}

/** Frames of this library that can stand above the caller's in a stack, which Node cuts at 10 in all. */
const OWN_FRAMES = 12

/** Captures the stack so that the caller is in it. */
function captureCaller(error: Error, maker: typeof Qcow2Error): void {
  const limit = Error.stackTraceLimit
  // Frozen by --frozen-intrinsics, or gone: then the stack is what it is.
  if (Reflect.set(Error, 'stackTraceLimit', limit + OWN_FRAMES)) {
    Error.captureStackTrace(error, maker)
    Error.stackTraceLimit = limit
  }
}

/**
 * Every error of this library. `code` is one of {@link Qcow2ErrorCode}, or the system's name (`ENOENT`, `ENOSPC`) where
 * the operating system reported it, with `errno`, `syscall` and `path` as in Node's own errors; `ABORT_ERR` for a
 * request that its signal cancelled ({@link AbortError}).
 */
export class Qcow2Error extends Error {
  /** What went wrong: part of the API, where messages are not. */
  readonly code: Qcow2ErrorCode | SystemErrorCode | 'ABORT_ERR'
  /** The file this happened in, as it was opened. */
  declare readonly path?: string
  /** The bytes of `path`, where they are not UTF-8: `path` then has replacement characters. */
  declare readonly pathBytes?: Buffer
  /** Byte offset in that file. */
  declare readonly offset?: number
  /** The field of the format by its name in the specification, or the name of the offending argument. */
  declare readonly field?: string
  /** The system's error number, negative as in Node's own errors. */
  declare readonly errno?: number
  /** The system call that failed. */
  declare readonly syscall?: string
  /** True where the same request may succeed when it is made again, as the file, device or source that failed judges. */
  declare readonly transient?: boolean

  constructor(code: Qcow2Error['code'], message: string, place: ErrorPlace = {}) {
    super(shownText(message), place.cause === undefined ? undefined : { cause: place.cause })
    this.code = code
    captureCaller(this, new.target)
    const file: Partial<Shown<'path'>> = place.path === undefined ? {} : shown('path', place.path)
    const all: ErrorPlace = { ...place, ...file }
    for (const key of ['path', 'pathBytes', 'offset', 'field', 'errno', 'syscall', 'transient'] as const) {
      const value = all[key]
      if (value !== undefined) Object.defineProperty(this, key, { value, enumerable: true })
    }
  }
}
nameErrors(Qcow2Error, 'Qcow2Error')

/**
 * A request that its `signal` cancelled, as Node words it: `name` is `AbortError`, `cause` the signal's reason. What has no
 * `bytesDone` left everything as it was.
 */
export class AbortError extends Qcow2Error {
  /**
   * Of a request that changes guest bytes and had begun (`write`, `writev`, `writeZeroes`, `discard`): how many bytes, from its
   * `position` on, are done. Those behind them are what they were.
   */
  declare readonly bytesDone?: number

  constructor(reason: unknown, bytesDone?: number) {
    const done = bytesDone === undefined ? '' : `: ${bytesDone} bytes were done`
    super('ABORT_ERR', `The operation was aborted${done}`, { cause: reason })
    if (bytesDone !== undefined) Object.defineProperty(this, 'bytesDone', { value: bytesDone, enumerable: true })
  }
}
nameErrors(AbortError, 'AbortError')

/** Behind the class, not in it: a bundler gives a class that speaks of itself another name, which stacks would show. */
function nameErrors(kind: { readonly prototype: Error }, name: string): void {
  Object.defineProperty(kind.prototype, 'name', { value: name, configurable: true, writable: true })
}

/** The error for an argument that cannot be used; `name` ends with its name, behind that of the call (`open: flags`). */
export const invalidArgument = (name: string, message: string): Qcow2Error =>
  new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', message, { field: name.slice(name.lastIndexOf(': ') + 1).trimStart() })
