/** Commands about the disk as a whole: alloc, map, length, info, truncate. */

import { isPlain } from '../../formats/table.js'
import type { Preallocation } from '../../index.js'
import { specificData } from '../commands/info.js'
import { describeError } from '../errors.js'
import { specificLines } from '../format/info.js'
import { toSize } from '../size.js'
import type { Context } from './context.js'
import type { OpenDisk } from './disk.js'
import { type Arguments, misused } from './line.js'
import { toNumber } from './numbers.js'
import { opened } from './opened.js'
import { amount } from './report.js'
import { vmStateOffset } from './requests.js'

interface Run {
  readonly start: bigint
  readonly length: bigint
  readonly allocated: boolean
}

/** What the top layer has of a range that is on the disk, neighbours of a kind as one. */
async function* runs({ image, info }: OpenDisk, start: bigint, length: bigint): AsyncGenerator<Run> {
  if (length === 0n) return
  // A plain file has all of its disk.
  if (isPlain(info.format)) return yield { start, length, allocated: true }
  let run: Run | undefined
  const asked = { start: toSize(start), length: toSize(length), depth: 'top', bigint: true } as const
  for await (const { start: at, length: bytes, present } of image.map(asked)) {
    if (run !== undefined && run.allocated === present) run = { ...run, length: run.length + bytes }
    else {
      if (run !== undefined) yield run
      run = { start: at, length: bytes, allocated: present }
    }
  }
  if (run !== undefined) yield run
}

export async function alloc(context: Context, args: Arguments): Promise<boolean> {
  const [first = '', second] = args.operands
  const offset = toNumber(first)
  const wanted = second === undefined ? 512n : toNumber(second)
  const disk = opened(context)
  const rest = disk.image.virtualSizeBigInt - offset
  const length = rest < 0n ? 0n : rest < wanted ? rest : wanted
  return context.request('is_allocated failed', async () => {
    let allocated = 0n
    for await (const run of runs(disk, offset, length)) if (run.allocated) allocated += run.length
    context.out(`${allocated}/${length} bytes allocated at offset ${amount(offset)}\n`)
  })
}

export async function map(context: Context): Promise<boolean> {
  const disk = opened(context)
  return context.request('Failed to get allocation status', async () => {
    for await (const { start, length, allocated } of runs(disk, 0n, disk.image.virtualSizeBigInt)) {
      const what = allocated ? '    allocated' : 'not allocated'
      const where = `${amount(start)} (0x${start.toString(16)})`
      context.out(`${amount(length)} (0x${length.toString(16)}) bytes ${what} at offset ${where}\n`)
      await context.session.stdout.drained()
    }
  })
}

export async function length(context: Context): Promise<boolean> {
  context.out(`${amount(opened(context).image.virtualSizeBigInt)}\n`)
  return true
}

export async function info(context: Context): Promise<boolean> {
  const disk = opened(context)
  return context.request('info failed', async () => {
    const { format, clusterSize = 0, formatSpecific } = await disk.image.info({ bigint: true })
    context.out(
      `format name: ${format}\ncluster size: ${amount(clusterSize)}\nvm state offset: ${amount(vmStateOffset(disk))}\n`,
    )
    if (formatSpecific !== undefined) context.out(specificLines(specificData(formatSpecific)).join(''))
  })
}

const PREALLOCATION: readonly string[] = ['off', 'metadata', 'falloc', 'full'] satisfies Preallocation[]

const isPreallocation = (mode: string): mode is Preallocation => PREALLOCATION.includes(mode)

export async function truncate(context: Context, args: Arguments): Promise<boolean> {
  const mode = args.value('m') ?? 'off'
  if (!isPreallocation(mode)) return refuse(context, `Invalid preallocation mode '${mode}'`)
  const [text] = args.operands
  // Words behind it mean nothing.
  if (text === undefined) throw misused()
  const { image, info } = opened(context)
  const wanted = toNumber(text)
  const partial = wanted % 512n
  if (partial !== 0n && !isPlain(info.format)) return refuse(context, 'The new size must be a multiple of 512')
  // A disk has whole sectors; those of a plain file are filled up.
  const size = partial === 0n ? wanted : wanted + 512n - partial
  try {
    await image.truncate(toSize(size), { shrink: true, ...(mode !== 'off' && { preallocation: mode }) })
    return true
  } catch (error) {
    return refuse(context, describeError(error))
  }
}

async function refuse(context: Context, message: string): Promise<boolean> {
  await context.complainAs(message)
  return false
}
