/** Open, create, read, convert, check and inspect qcow2 disk images, in-process. */

export type { AccessOptions, CacheMode, SharingOptions } from './access.js'
export { type AmendOptions, amend } from './amend.js'
export type { Reference, ReferencePolicy } from './backing/policy.js'
export type { AddBitmapOptions, Bitmaps, DirtyRange } from './bitmap.js'
export { type CheckFinding, type CheckOptions, type CheckResult, check } from './check.js'
export { type CommitOptions, commit } from './commit.js'
export { type CompareOptions, type CompareResult, compare } from './compare.js'
export {
  type Compression,
  type ConvertOptions,
  type ConvertResult,
  convert,
  type SourceOptions,
} from './convert.js'
export { type CreateOptions, create, type Preallocation, type Qcow2Shape } from './create.js'
export { AbortError, type ErrorPlace, Qcow2Error, type Qcow2ErrorCode, type SystemErrorCode } from './errors.js'
export { Image, type OpenOptions, open, type ReadOptions } from './image.js'
export type { BitmapInfo, ImageInfo, Qcow2SpecificInfo, SnapshotInfo } from './info.js'
export { type Finding, type FindingCode, type Inspection, type InspectOptions, inspect } from './inspect.js'
export type { MapEntry, MapOptions } from './map.js'
export { type MeasureOptions, type MeasureResult, measure } from './measure.js'
export type { Abortable, Limits, LongRunning, Progress } from './options.js'
export { type KnownFormat, probe } from './probe.js'
export { type RebaseOptions, rebase } from './rebase.js'
export type { TruncateOptions } from './resize.js'
export type { Snapshots } from './snapshot/snapshots.js'
export type { Format, ImageSource, PathLike } from './source.js'
export type { ReadStreamOptions, SparseChunk, WebStreamOptions } from './stream.js'
export type { Size } from './units.js'
export type { WriteOptions, WriteStreamOptions, WritevOptions, WriteZeroesOptions } from './write.js'

/** The version of this package. */
export const version = '0.1.0'
