/** `convert - TARGET`: an image that comes on standard input. */

import type { Readable } from 'node:stream'
import { type ConvertOptions, type ConvertResult, ingest, Qcow2Error, type SourceFormat } from '../../index.js'
import { CommandFailure } from '../failure.js'
import type { Session } from '../session.js'
import { targetSource } from '../sources.js'

/** Whether the only source is standard input. A file of that name is `./-`. */
export const isInput = (sources: readonly string[]): boolean => sources.length === 1 && sources[0] === '-'

/** What of the command line cannot be done with what is read once, in the order in which it comes. */
const OUT_OF_ORDER = {
  backing: '-B',
  salvage: '--salvage',
  rate: '-r',
} as const

/** Refuses that. */
export function refuseOutOfOrder(given: { readonly [K in keyof typeof OUT_OF_ORDER]?: unknown }): void {
  for (const [name, option] of Object.entries(OUT_OF_ORDER)) {
    if (given[name as keyof typeof OUT_OF_ORDER] !== undefined) {
      throw new CommandFailure(`${option} is not possible with standard input, which is read once`)
    }
  }
}

/** Converts it. */
export async function convertInput(
  target: string,
  from: SourceFormat | undefined,
  options: ConvertOptions & { bigint: true },
  session: Session,
): Promise<ConvertResult<bigint>> {
  const { from: _from, base: _base, salvage: _salvage, rate: _rate, countData: _countData, ...rest } = options
  const member = session.objects.memberOf('-')
  try {
    return await ingest(session.stdin as unknown as Readable, targetSource(target, session), {
      ...rest,
      ...(from !== undefined && { from }),
      ...(member !== undefined && { member }),
    })
  } catch (error) {
    if (!(error instanceof Qcow2Error) || error.code !== 'ERR_QCOW2_FORMAT_UNKNOWN' || error.field !== 'magic')
      throw error
    const message = 'Could not open standard input: its first bytes are those of no image that is known by them'
    throw new CommandFailure(message, {
      cause: error,
      hint: 'A raw disk is given with -f raw, a fixed VHD with -f vpc.',
    })
  }
}
