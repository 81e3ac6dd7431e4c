/** Telling formats apart by their first bytes. */

import type { Abortable } from './options.js'
import type { Format, ImageSource } from './source.js'

/**
 * What a file looks like, as `qemu-img` guesses it without `-f`: `'qcow2'` by its magic, the name of another known format by
 * its own, `'raw'` for everything else. A guess for tools whose user chose the file: a guest can write any magic into its
 * raw disk, so the library itself never acts on this.
 */
export declare function probe(source: ImageSource, options?: Abortable): Promise<Format | KnownFormat>

/** Formats that are recognised in order to refuse them. */
export type KnownFormat =
  | 'bochs'
  | 'cloop'
  | 'dmg'
  | 'luks'
  | 'parallels'
  | 'qcow'
  | 'qed'
  | 'vdi'
  | 'vhdx'
  | 'vmdk'
  | 'vpc'
