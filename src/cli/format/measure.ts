import { toJson } from './json.js'

/** Bytes that the target file will need; `bitmaps` only where the source has persistent bitmaps' room to measure. */
export interface Measurement {
  readonly required: number | bigint
  readonly fullyAllocated: number | bigint
  readonly bitmaps?: number | bigint | undefined
}

export function formatMeasure({ required, fullyAllocated, bitmaps }: Measurement): string {
  const lines = [`required size: ${required}`, `fully allocated size: ${fullyAllocated}`]
  if (bitmaps !== undefined) lines.push(`bitmaps size: ${bitmaps}`)
  return `${lines.join('\n')}\n`
}

export const measureJson = ({ required, fullyAllocated, bitmaps }: Measurement): string =>
  `${toJson({ bitmaps, required, 'fully-allocated': fullyAllocated })}\n`
