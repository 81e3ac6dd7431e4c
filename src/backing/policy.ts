/** Who decides what an image may pull in. */

import type { ImageSource } from '../source.js'

/** A file that an image names. */
export interface Reference {
  readonly kind: 'backing' | 'data-file'
  /** The name exactly as the image has it: not resolved, not trusted. */
  readonly filename: string
  /** The format that the image claims for it, if any. A data file is always raw. */
  readonly format?: string
  /** The file that names it, as it was opened. */
  readonly from: string
}

/**
 * What an image may pull in:
 *
 * - `'deny'` (the default): an image that names a backing file or a data file is refused
 * - `'layer'`: the image is opened alone; what only a backing file has reads as zeroes. For tools that look at one layer;
 *   `convert` refuses it unless `base` says what the layer stands on. An external data file is still refused
 * - `'allow'`: names are followed as QEMU follows them, relative ones from the directory of the image that names
 *   them. Never `json:` descriptions or protocols (`nbd:`, `http:`)
 * - a function: called for every reference, returns what to open instead, or `null` to refuse
 */
export type ReferencePolicy =
  | 'deny'
  | 'layer'
  | 'allow'
  | ((reference: Reference) => ImageSource | null | Promise<ImageSource | null>)
