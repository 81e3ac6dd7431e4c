/**
 * Holds the types of `src/native.ts` against what the addon says of itself, `dist/binding.d.ts`, which the build makes from
 * `crates/node`: names of functions, their parameters and results, names of fields, and which may be absent. Nothing here runs: `npm run
 * typecheck` fails where they disagree, and names the function or the object. Where the addon says a string or a number, `native.ts`
 * may say which ones.
 */

import type * as binding from '../../dist/binding.js'
import type * as native from '../../src/native.js'
import type { SnapshotTable } from '../../src/snapshot/types.js'

type Keys<T> = T extends unknown ? keyof T : never
type At<T, K extends PropertyKey> = T extends unknown ? (K extends keyof T ? T[K] : undefined) : never
type Given<T> = Exclude<T, null | undefined>

/** A type with everything left out that may differ. Objects of a union are one object. */
type Form<T> = unknown extends T
  ? 'anything'
  : [T] extends [boolean]
    ? 'boolean'
    : [T] extends [number]
      ? 'number'
      : [T] extends [string]
        ? 'string'
        : [T] extends [string | number]
          ? 'string or number'
          : [T] extends [ArrayBufferView]
            ? 'bytes'
            : [T] extends [(...values: infer P) => infer R]
              ? { parameters: Parameters<P>; result: Form<R> }
              : [T] extends [readonly (infer E)[]]
                ? { each: Form<E> }
                : { [K in Keys<T>]: Value<At<T, K>> }

/** What may be absent, or undefined. */
type Value<T> = unknown extends T ? Form<T> : undefined extends T ? { optional: Form<Given<T>> } : Form<T>

type Parameters<P extends unknown[]> = { [I in keyof P]-?: Value<P[I]> }

/** Forms have no optional fields: what can be assigned both ways is the same. */
type Same<A, B> = [Form<A>] extends [Form<B>] ? ([Form<B>] extends [Form<A>] ? true : false) : false

type Functions = typeof binding
type AnyFunction = keyof Functions | keyof native.Addon

/** Functions that only one of the two has, or that differ. */
type WrongFunctions = {
  [K in AnyFunction]: K extends keyof Functions & keyof native.Addon
    ? Same<Functions[K], Given<native.Addon[K]>> extends true
      ? never
      : K
    : K
}[AnyFunction]

/** What is delivered, and what else no function has as a parameter. `unit/native-types.test.ts` says whether one is missing. */
interface Delivered {
  TlsConnection: [binding.TlsConnection, native.NativeTlsConnection]
  CheckOutcome: [binding.CheckOutcome, native.NativeCheckOutcome]
  Cloned: [binding.Cloned, native.NativeCloned]
  Compacted: [binding.Compacted, native.NativeCompacted]
  Compared: [binding.Compared, native.NativeCompared]
  Converted: [binding.Converted, native.NativeConverted]
  Failure: [binding.Failure, native.NativeFailure]
  Inspected: [binding.Inspected, native.NativeInspection]
  LayerInfo: [binding.LayerInfo, native.NativeLayerInfo]
  ListedExport: [binding.ListedExport, native.NativeListedExport]
  Measured: [binding.Measured, native.NativeMeasured]
  NbdStarted: [binding.NbdStarted, native.NativeNbdStarted]
  OpenedFile: [binding.OpenedFile, native.NativeFile]
  OpenedLayer: [binding.OpenedLayer, native.NativeLayer]
  OpenedStream: [binding.OpenedStream, native.NativeStream]
  OvfDisk: [binding.OvfDisk, native.NativeOvfDisk]
  PlannedStream: [binding.PlannedStream, native.NativePlannedStream]
  Overlaid: [binding.Overlaid, native.NativeOverlaid]
  SourceQuestion: [binding.SourceQuestion, native.NativeSourceQuestion]
  Table: [binding.Table, SnapshotTable]
}

type WrongObjects = {
  [K in keyof Delivered]: Same<Delivered[K][0], Delivered[K][1]> extends true ? never : K
}[keyof Delivered]

type None<T extends never> = T
export type Disagreement = None<WrongFunctions> | None<WrongObjects>
