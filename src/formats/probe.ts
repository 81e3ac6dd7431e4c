/** Telling formats by the bytes of a file. */

import { type FileBytes, startsWith } from './sizes.js'
import { type FormatName, isFormat, ROWS } from './table.js'

/**
 * The format that the first bytes of a file (1024 are enough) have the magic number of. Undefined for everything else: that
 * is not the same as raw.
 */
export function detectFormat(head: Buffer): FormatName | undefined {
  const found = ROWS.find(
    ([, { marks }]) =>
      marks.magics?.some(({ bytes, offset }) => startsWith(head, bytes, offset)) || marks.matches?.(head) === true,
  )
  return found?.[0]
}

/** What a file says about itself of a format that it is not opened in. */
export interface KnownImage {
  readonly format: FormatName
  /** Bytes of the disk; undefined where the file does not say. */
  readonly virtualSize: number | undefined
}

/**
 * What a file is of a format that is not opened, by its first bytes, or of any format that nothing but its last bytes tell; undefined for
 * everything else.
 */
export async function describeKnown(file: FileBytes): Promise<KnownImage | undefined> {
  const detected = detectFormat(await file.at(0, 1024))
  const format = detected ?? (await byFooter(file))
  if (format === undefined || isFormat(detected)) return undefined
  const row = ROWS.find(([name]) => name === format)?.[1]
  // A file that is cut short has a format, and no size.
  const size = await row?.virtualSize?.(file).catch((error: unknown) => {
    if (error instanceof RangeError) return undefined
    throw error
  })
  return { format, virtualSize: Number.isSafeInteger(size) ? size : undefined }
}

async function byFooter(file: FileBytes): Promise<FormatName | undefined> {
  for (const [name, { marks }] of ROWS) {
    if (marks.footer === undefined || file.length === undefined) continue
    const start = file.length - marks.footer.length
    if (start > 0 && startsWith(await file.at(start, marks.footer.length), marks.footer.bytes)) return name
  }
  return undefined
}
