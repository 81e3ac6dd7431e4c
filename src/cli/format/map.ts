/** The two listings of `map`, written one extent at a time: an image may have millions. */

import { exactText } from '../../text.js'
import { CommandFailure } from '../failure.js'
import { argumentOf } from '../filename.js'
import { hex } from './number.js'

/** One run of guest bytes that are stored alike; lengths and offsets in bytes. */
export interface MapExtent<N extends number | bigint = number> {
  readonly start: N
  readonly length: N
  /** How far down the backing chain the data is: 0 is the image itself. */
  readonly depth: number
  readonly present: boolean
  readonly zero: boolean
  readonly data: boolean
  readonly compressed: boolean
  /** Where the bytes lie in their file, if they lie there as they are. */
  readonly offset?: N | undefined
  /** That file. */
  readonly filename?: string | undefined
  readonly filenameBytes?: Uint8Array | undefined
}

export interface MapWriter {
  readonly begin: string
  /** The text of one extent; throws where the listing cannot show it. */
  extent(extent: MapExtent<number | bigint>): string
  /** Read after the last extent. */
  readonly end: string
}

/** What qemu-img prints for people: the extents that hold data, and where in which file. */
export function humanMap(): MapWriter {
  const column = (text: string): string => text.padEnd(16)
  return {
    begin: `${column('Offset')}${column('Length')}${column('Mapped to')}File\n`,
    extent({ start, length, data, zero, offset, filename = '', filenameBytes }) {
      if (!data || zero) return ''
      if (offset === undefined) {
        throw new CommandFailure('File contains external, encrypted or compressed clusters.')
      }
      return `${column(hex(start))}${column(hex(length))}${column(hex(offset))}${argumentOf(exactText(filename, filenameBytes))}\n`
    },
    end: '',
  }
}

/** One object a line, in the order of the disk. Where there is nothing to list from `start` on, one empty extent. */
export function jsonMap(start: number | bigint): MapWriter {
  let count = 0
  return {
    begin: '[',
    extent(extent) {
      count += 1
      return `${count === 1 ? '' : ',\n'}${jsonExtent(extent)}`
    },
    get end() {
      return `${count === 0 ? jsonExtent({ ...NOTHING, start }) : ''}]\n`
    },
  }
}

const NOTHING = { length: 0, depth: 0, present: false, zero: false, data: false, compressed: false }

function jsonExtent({
  start,
  length,
  depth,
  present,
  zero,
  data,
  compressed,
  offset,
}: MapExtent<number | bigint>): string {
  const where = offset === undefined ? '' : `, "offset": ${offset}`
  return (
    `{ "start": ${start}, "length": ${length}, "depth": ${depth}, "present": ${present}, ` +
    `"zero": ${zero}, "data": ${data}, "compressed": ${compressed}${where}}`
  )
}
