/** Options of the qcow2 driver at run time: their rules, in QEMU's words. What they do beyond that is `disk.ts`. */

import { CommandFailure } from '../failure.js'
import { type OptionType, type OptionValue, parseValue, settings } from '../options.js'
import { OVERLAP_TEMPLATES, runtimeOption } from '../runtime-options.js'

/** What any driver knows. */
const GENERAL: Readonly<Record<string, OptionType>> = {
  'read-only': 'bool',
  'force-share': 'bool',
  'cache.direct': 'bool',
  'cache.no-flush': 'bool',
  discard: 'string',
  'detect-zeroes': 'string',
}

/** What an image is opened by, which stays as it is. */
const FIXED: ReadonlySet<string> = new Set(['driver', 'file', 'file.filename', 'file.driver', 'filename', 'node-name'])

export type DriverOptions = ReadonlyMap<string, OptionValue>

/** Sorts a list: what the drivers know, read, and the rest as it is. */
export function readDriverOptions(list: string): { values: DriverOptions; others: Map<string, string> } {
  const values = new Map<string, OptionValue>()
  const others = new Map<string, string>()
  for (const { name, value = 'on' } of settings(list)) {
    const type = runtimeOption(name) ?? (Object.hasOwn(GENERAL, name) ? GENERAL[name] : undefined)
    if (type === undefined) others.set(name, value)
    else values.set(name, parseValue({ name, type }, value))
  }
  return { values, others }
}

/** Refuses what cannot change while the image is open. */
export function refuseFixed(others: ReadonlyMap<string, string>): void {
  const [name] = [...others.keys()].sort((a, b) => Number(FIXED.has(b)) - Number(FIXED.has(a)))
  if (name !== undefined) throw new CommandFailure(`Cannot change the option '${name}'`)
}

/** The image that options are for. */
export interface Shape {
  readonly clusterSize: number
  readonly virtualSize: bigint
  readonly version: 2 | 3
}

const INT_MAX = 2n ** 31n - 1n
const UINT_MAX = 2n ** 32n - 1n
const MIB = 2n ** 20n
const DEFAULT_L2_CACHE = 32n * MIB

const sizeOf = (values: DriverOptions, name: string): bigint | undefined => {
  const value = values.get(name)
  return typeof value === 'bigint' ? value : undefined
}

/** Checks options against each other and against the image, in the order in which QEMU does. */
export function checkDriverOptions(values: DriverOptions, shape: Shape): void {
  checkCaches(values, shape)
  const interval = sizeOf(values, 'cache-clean-interval')
  if (interval !== undefined && interval > UINT_MAX) throw new CommandFailure('Cache clean interval too big')
  if (values.get('lazy-refcounts') === true && shape.version === 2) {
    throw new CommandFailure('Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level')
  }
  const [short, long] = [values.get('overlap-check'), values.get('overlap-check.template')]
  if (short !== undefined && long !== undefined && short !== long) {
    const both = `'overlap-check' ('${short}') and 'overlap-check.template' ('${long}')`
    throw new CommandFailure(`Conflicting values for qcow2 options ${both}`)
  }
  const template = short ?? long
  if (template !== undefined && !OVERLAP_TEMPLATES.includes(String(template))) {
    const allowed = `Allowed are any of the following: ${OVERLAP_TEMPLATES.join(', ')}`
    throw new CommandFailure(`Unsupported value '${template}' for qcow2 option 'overlap-check'. ${allowed}`)
  }
}

function checkCaches(values: DriverOptions, { clusterSize, virtualSize }: Shape): void {
  const [both, l2, refcounts] = ['cache-size', 'l2-cache-size', 'refcount-cache-size'].map(name => sizeOf(values, name))
  if (both !== undefined) {
    if (l2 !== undefined && refcounts !== undefined) {
      throw new CommandFailure('cache-size, l2-cache-size and refcount-cache-size may not be set at the same time')
    }
    if (l2 !== undefined && l2 > both) throw new CommandFailure('l2-cache-size may not exceed cache-size')
    if (refcounts !== undefined && refcounts > both) {
      throw new CommandFailure('refcount-cache-size may not exceed cache-size')
    }
  }
  const entry = sizeOf(values, 'l2-cache-entry-size') ?? BigInt(Math.min(clusterSize, 65536))
  if (entry < 512n || entry > BigInt(clusterSize) || (entry & (entry - 1n)) !== 0n) {
    const range = `between 512 and the cluster size (${clusterSize})`
    throw new CommandFailure(`L2 cache entry size must be a power of two ${range}`)
  }
  const whole = ((virtualSize + BigInt(clusterSize) - 1n) / BigInt(clusterSize)) * 8n
  const wanted = l2CacheSize(values) ?? DEFAULT_L2_CACHE
  if ((wanted < whole ? wanted : whole) / entry > INT_MAX) throw new CommandFailure('L2 cache size too big')
  if ((refcounts ?? 0n) / BigInt(clusterSize) > INT_MAX) throw new CommandFailure('Refcount cache size too big')
}

/** The bytes that L2 tables may take, where the options say so. Options that contradict each other are refused elsewhere. */
export function l2CacheSize(values: DriverOptions): bigint | undefined {
  const both = sizeOf(values, 'cache-size')
  const refcounts = sizeOf(values, 'refcount-cache-size') ?? 0n
  const rest = both === undefined ? undefined : both > refcounts ? both - refcounts : 0n
  return sizeOf(values, 'l2-cache-size') ?? rest
}
