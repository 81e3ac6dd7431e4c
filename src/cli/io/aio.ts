/** Commands whose requests go on while the next command runs. What comes of them is no failure of the command. */

import { type Context, clock } from './context.js'
import { expectedOf, FILLED, sayRead } from './data.js'
import { type Arguments, misused, refused } from './line.js'
import { patternOf, toRange, toVector } from './numbers.js'
import { opened } from './opened.js'
import { readRange, writeRange, zeroRange } from './requests.js'

export async function aioRead(context: Context, args: Arguments): Promise<boolean> {
  patternOf(args)
  if (args.has('i')) return injected(context, 'read')
  const range = toVector(args)
  const expected = expectedOf(args, range.length)
  const disk = opened(context)
  const time = clock()
  context.start(
    context.request('readv failed', async () => {
      const bytes = await readRange(disk, range)
      await sayRead(context, args, bytes, range, expected, time())
    }),
  )
  return true
}

export async function aioWrite(context: Context, args: Arguments): Promise<boolean> {
  const pattern = patternOf(args) ?? FILLED
  if (args.has('i')) return injected(context, 'write')
  if (args.operands.length < 2) throw misused()
  const zeroes = args.has('z')
  if (zeroes && args.operands.length !== 2) throw refused('-z supports only a single length parameter')
  if (args.has('u') && !zeroes) throw refused('-u requires -z to be specified')
  if (zeroes && args.has('r')) throw refused('cannot combine zero write with registered I/O buffer')
  const range = zeroes ? toRange(args, { limited: false }) : toVector(args)
  const disk = opened(context)
  const durable = args.has('f')
  const { offset, length } = range
  const time = clock()
  context.start(
    context.request('aio_write failed', async () => {
      if (zeroes) await zeroRange(disk, range, args.has('u'), durable)
      else await writeRange(disk, range, Buffer.alloc(Number(length), pattern), { compressed: false, durable })
      if (!args.has('q')) context.done({ what: 'wrote', offset, length, seconds: time(), bare: args.has('C') })
    }),
  )
  return true
}

/** Statistics of a machine count requests that are refused; there is no machine here. */
function injected(context: Context, what: string): boolean {
  context.out(`injecting invalid ${what} request\n`)
  return true
}

export async function aioFlush(context: Context): Promise<boolean> {
  opened(context)
  await context.settled()
  return true
}
