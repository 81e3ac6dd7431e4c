/** Commands that read and write the disk's bytes, one at a time: read, readv, write, writev, discard, flush. */

import { readFileSync } from 'node:fs'
import { toName } from '../../text.js'
import { strerror } from '../errors.js'
import { type Context, clock } from './context.js'
import { type Arguments, LineFailure, misused, refused } from './line.js'
import { patternOf, type Range, toNumber, toRange, toVector, wholeSectors } from './numbers.js'
import { opened } from './opened.js'
import { discardRange, needsData, readRange, readVmState, writeRange, writeVmState, zeroRange } from './requests.js'

/** What a buffer has before it is written. */
export const FILLED = 0xcd
const PIECE = 2 ** 20

/** What is to be found in what was read. */
export interface Expected {
  readonly pattern: number
  /** From the first byte read. */
  readonly start: number
  readonly length: number
}

/** Reads `-P`, `-s` and `-l` of a command that reads `length` bytes. */
export function expectedOf(args: Arguments, length: bigint): Expected | undefined {
  const pattern = patternOf(args)
  const [start, most] = [args.value('s'), args.value('l')].map(text =>
    text === undefined ? undefined : toNumber(text),
  )
  if (pattern === undefined && (start !== undefined || most !== undefined)) throw misused()
  const from = start ?? 0n
  const count = most ?? length - from
  if (count < 0n || from + count > length) throw refused('pattern verification range exceeds end of read data')
  return pattern === undefined ? undefined : { pattern, start: Number(from), length: Number(count) }
}

/** Whether bytes are what they should be. */
function fits(bytes: Uint8Array, { pattern, start, length }: Expected): boolean {
  const piece = Buffer.alloc(Math.min(length, PIECE), pattern)
  for (let at = 0; at < length; at += PIECE) {
    const size = Math.min(PIECE, length - at)
    const part = bytes.subarray(start + at, start + at + size)
    if (Buffer.compare(part, piece.subarray(0, size)) !== 0) return false
  }
  return true
}

/** Says what was read. Tells whether it was what it should be. */
export async function sayRead(
  context: Context,
  args: Arguments,
  bytes: Uint8Array,
  { offset, length }: Range,
  expected: Expected | undefined,
  seconds: number,
): Promise<boolean> {
  const right = expected === undefined || fits(bytes, expected)
  if (expected !== undefined && !right) {
    const at = offset + BigInt(expected.start)
    context.out(`Pattern verification failed at offset ${at}, ${expected.length} bytes\n`)
  }
  if (args.has('q')) return right
  if (args.has('v')) await context.dump(bytes, offset)
  context.done({ what: 'read', offset, length, seconds, bare: args.has('C') })
  return right
}

export async function read(context: Context, args: Arguments): Promise<boolean> {
  const range = toRange(args)
  const expected = expectedOf(args, range.length)
  if (args.has('b')) {
    wholeSectors(range)
    if (args.has('r')) throw refused('I/O buffer registration is not supported when reading from vmstate')
  }
  const reading = args.has('b') ? readVmState : readRange
  return readAndSay(context, args, range, expected, 'read failed', reading)
}

export async function readv(context: Context, args: Arguments): Promise<boolean> {
  const range = toVector(args)
  return readAndSay(context, args, range, expectedOf(args, range.length), 'readv failed', readRange)
}

async function readAndSay(
  context: Context,
  args: Arguments,
  range: Range,
  expected: Expected | undefined,
  failing: string,
  reading: typeof readRange,
): Promise<boolean> {
  const disk = opened(context)
  let right = true
  const done = await context.request(failing, async () => {
    const time = clock()
    const bytes = await reading(disk, range)
    right = await sayRead(context, args, bytes, range, expected, time())
  })
  return done && right
}

/** Flags of a write that exclude each other. */
function refuseTogether(args: Arguments): void {
  const [vmState, compressed, zeroes] = [args.has('b'), args.has('c'), args.has('z')]
  if (vmState && zeroes) throw refused('-b and -z cannot be specified at the same time')
  if (args.has('f') && (vmState || compressed)) {
    throw refused('-f and -b or -c cannot be specified at the same time')
  }
  if (args.has('n') && !zeroes) throw refused('-n requires -z to be specified')
  if (args.has('u') && !zeroes) throw refused('-u requires -z to be specified')
  if ([zeroes, args.has('P'), args.has('s')].filter(Boolean).length > 1) {
    throw refused('Only one of -z, -P, and -s can be specified at the same time')
  }
}

export async function write(context: Context, args: Arguments): Promise<boolean> {
  const pattern = patternOf(args) ?? FILLED
  if (args.operands.length !== 2) throw misused()
  refuseTogether(args)
  const range = toRange(args, { limited: !args.has('n'), unless: ' without -n' })
  if (args.has('b') || args.has('c')) wholeSectors(range)
  if (args.has('z') && args.has('r')) throw refused('cannot combine zero write with registered I/O buffer')
  const file = args.value('s')
  const bytes = () => (file === undefined ? Buffer.alloc(Number(range.length), pattern) : contentOf(file, range.length))
  const disk = opened(context)
  const work = async (): Promise<void> => {
    if (args.has('z')) {
      if (args.has('n') && (await needsData(disk, range))) throw noFallback()
      return zeroRange(disk, range, args.has('u'), args.has('f'))
    }
    if (args.has('b')) return writeVmState(disk, range, bytes())
    return writeRange(disk, range, bytes(), { compressed: args.has('c'), durable: args.has('f') })
  }
  return changeAndSay(context, args, range, 'wrote', 'write failed', work)
}

const noFallback = (): Error => Object.assign(new Error('zeroes are written as data there'), { code: 'ENOTSUP' })

/** The bytes of a file, over and over. */
function contentOf(file: string, length: bigint): Buffer {
  let content: Buffer
  try {
    content = readFileSync(toName(file))
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? String(error.code) : ''
    throw new LineFailure({ err: `${file}: ${strerror(code) ?? String(error)}`, cause: error })
  }
  if (content.length === 0) throw new LineFailure({ err: `${file}: file is empty` })
  return Buffer.alloc(Number(length), content)
}

export async function writev(context: Context, args: Arguments): Promise<boolean> {
  const pattern = patternOf(args) ?? FILLED
  const range = toVector(args)
  const disk = opened(context)
  const work = () =>
    writeRange(disk, range, Buffer.alloc(Number(range.length), pattern), { compressed: false, durable: args.has('f') })
  return changeAndSay(context, args, range, 'wrote', 'writev failed', work)
}

export async function discard(context: Context, args: Arguments): Promise<boolean> {
  const range = toRange(args)
  const disk = opened(context)
  return changeAndSay(context, args, range, 'discard', 'discard failed', () => discardRange(disk, range))
}

async function changeAndSay(
  context: Context,
  args: Arguments,
  { offset, length }: Range,
  what: string,
  failing: string,
  work: () => Promise<void>,
): Promise<boolean> {
  return context.request(failing, async () => {
    const time = clock()
    await work()
    if (!args.has('q')) context.done({ what, offset, length, seconds: time(), bare: args.has('C') })
  })
}

export async function flush(context: Context): Promise<boolean> {
  const disk = opened(context)
  return context.request('flush failed', () => disk.image.datasync())
}
