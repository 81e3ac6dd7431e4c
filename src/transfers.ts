/** The arguments of reads and writes. */

import { invalidArgument } from './errors.js'
import { type Reader, readOptions } from './options.js'
import { toBytesView } from './support/buffers.js'
import { describe, type Size, toBytes } from './units.js'

/** There can be very many transfers: the full check runs only where something is out of the ordinary. */
export function checkTransfer<T extends object>(
  options: T | undefined,
  owner: string,
  table: Readonly<Record<string, Reader<unknown>>>,
): T | undefined {
  if (typeof options === 'object' && options !== null) {
    let known = true
    for (const name in options) {
      if (name !== 'position' && name !== 'offset' && name !== 'length') known = false
    }
    if (known) return options
  }
  readOptions(options, owner, table)
  return options
}

/** The range of the buffer, and where it belongs on the disk. */
export function toTransfer(
  owner: 'Image.read' | 'Image.write',
  view: Uint8Array,
  options: { offset?: number | undefined; length?: number | undefined; position: Size } | undefined,
): { offset: number; length: number; position: number } {
  const offset = options?.offset === undefined ? 0 : toBytes(options.offset, `${owner}: offset`)
  const length = options?.length === undefined ? view.length - offset : toBytes(options.length, `${owner}: length`)
  if (offset > view.length || length < 0 || offset + length > view.length) {
    const message = `${owner}: ${length} bytes from offset ${offset} are not inside the buffer of ${view.length} bytes`
    throw invalidArgument(offset > view.length ? `${owner}: offset` : `${owner}: length`, message)
  }
  return { offset, length, position: toBytes(options?.position, `${owner}: position`) }
}

/** Where numbers are not all exact, every buffer must begin where they are: at whole sectors. */
export function checkPlaces(owner: string, views: readonly Uint8Array[], position: number): void {
  const length = views.reduce((sum, view) => sum + view.length, 0)
  if (position + length <= Number.MAX_SAFE_INTEGER || views.length < 2) return
  const sectors = (bytes: number): boolean => bytes % 512 === 0
  if (sectors(position) && views.slice(0, -1).every(view => sectors(view.length))) return
  const message = `${owner}: beyond 2^53 - 1, buffers must be whole sectors of 512 bytes`
  throw invalidArgument(`${owner}: buffers`, message)
}

/** The bytes of several views. */
export function toViews(buffers: unknown, owner: string): Uint8Array[] {
  if (!Array.isArray(buffers)) {
    throw invalidArgument('buffers', `${owner}: buffers must be an array, not ${describe(buffers)}`)
  }
  return buffers.map((buffer: unknown, index) => toBytesView(buffer, `${owner}: buffers[${index}]`))
}
