/** Open, create, read, write, convert, snapshot, check and repair qcow2 disk images, in-process. */

export type { AccessOptions, CacheMode, SharingOptions } from './access.js'
export { type AmendOptions, amend } from './amend.js'
export type { ApplianceDisk, OvfDisk } from './backing/appliance.js'
export type { Reference, ReferencePolicy } from './backing/policy.js'
export type { AddBitmapOptions, Bitmaps, DirtyRange } from './bitmap.js'
export { type CheckFinding, type CheckOptions, type CheckResult, check } from './check.js'
export type { CloneOptions, CloneResult } from './clone.js'
export { type CommitOptions, commit } from './commit.js'
export { type CompactFileOptions, compact } from './compact.js'
export type { CompactOptions, CompactResult } from './compaction.js'
export { type CompareOptions, type CompareResult, compare } from './compare.js'
export { configure, type Settings } from './configure.js'
export { type ConvertOptions, type ConvertResult, convert } from './convert.js'
export { type CreateOptions, create, type NewImageOptions } from './create.js'
export { AbortError, type ErrorPlace, Qcow2Error, type Qcow2ErrorCode, type SystemErrorCode } from './errors.js'
export type { Format, FormatName, KnownFormat, StreamedFormat, StreamFormat, TargetFormat } from './formats/table.js'
export { Image } from './image.js'
export type {
  BitmapInfo,
  BlockLimits,
  EncryptInfo,
  ImageInfo,
  LuksInfo,
  LuksSlotInfo,
  Qcow2SpecificInfo,
  SnapshotInfo,
  VmdkExtentInfo,
  VmdkInfo,
} from './info.js'
export { type IngestOptions, type IngestResult, ingest } from './ingest.js'
export { type Finding, type FindingCode, type Inspection, type InspectOptions, inspect } from './inspect.js'
export type { AddKeyOptions, ChangeKeyOptions, Keys, RemoveKeyOptions } from './keys.js'
export type { MapEntry, MapOptions } from './map.js'
export { type MeasureOptions, type MeasureResult, measure } from './measure.js'
export {
  type NbdAddress,
  type NbdOptions,
  type NbdServed,
  NbdServer,
  type NbdServerOptions,
  type NbdServing,
  serveNbd,
} from './nbd.js'
export {
  listNbd,
  type NbdExport,
  type NbdListOptions,
  type NbdSource,
  type NbdSourceOptions,
  type NbdTimes,
  nbdSource,
} from './nbd-source.js'
export type {
  NbdClientPsk,
  NbdClientTls,
  NbdClientX509,
  NbdServerPsk,
  NbdServerTls,
  NbdServerX509,
  Pem,
} from './nbd-tls.js'
export { type OpenOptions, open } from './open.js'
export type { Abortable, Limits, LongRunning, Progress } from './options.js'
export type { OverlayOptions } from './overlay.js'
export { type ProbeOptions, probe } from './probe.js'
export { createQcow2Stream, type ImageStream, type Qcow2StreamOptions } from './qcow2-stream.js'
export type { RandomAccessSource, SourceCache, SourceExtent } from './random-access.js'
export type { ReadOptions, ReadResult, ReadvResult } from './read.js'
export { type RebaseOptions, rebase } from './rebase.js'
export { type HttpSourceOptions, httpSource } from './remote/http-source.js'
export type { HeadersOption, RequestHeaders } from './remote/requests.js'
export type { RemoteTimes } from './remote/retry.js'
export type { S3ClientLike, S3Credentials, S3Place } from './remote/s3-place.js'
export { type S3SourceOptions, s3Source } from './remote/s3-source.js'
export { type S3TargetOptions, s3Target } from './remote/s3-target.js'
export type { TruncateOptions } from './resize.js'
export type { Encrypt, EncryptedLayer, Secret, SecretBytes, Secrets } from './secret.js'
export type {
  Compression,
  LuksShape,
  ParallelsShape,
  Preallocation,
  Qcow2Shape,
  QcowShape,
  RawShape,
  Shape,
  Shapes,
  VdiShape,
  VhdxShape,
  VmdkShape,
  VpcShape,
} from './shape.js'
export type { Snapshots } from './snapshot/snapshots.js'
export type { DetachedImage, ImageInAppliance, ImageInFile, ImageSource, PathLike } from './source.js'
export type { SourceFormat, SourceOptions } from './source-options.js'
export type { ReadStreamOptions, SparseChunk, SparseReadable, WebStreamOptions } from './stream.js'
export type { StreamTarget, UploadOptions, UploadResult } from './stream-target.js'
export type { Name } from './text.js'
export type { BigIntResults, Size } from './units.js'
export { type VerifiedFile, type VerifyOptions, type VerifyResult, verifyManifest } from './verify.js'
export type {
  WriteOptions,
  WriteResult,
  WriteStreamOptions,
  WritevOptions,
  WritevResult,
  WriteZeroesOptions,
} from './write.js'

/** The version of this package. */
export const version = '0.1.0'
