/** Telling formats apart by their first bytes. */

import { diskOf } from './backing/appliance.js'
import { isOva } from './formats/ova.js'
import { detectFormat } from './formats/probe.js'
import { type Format, type KnownFormat, PLAIN_FORMAT } from './formats/table.js'
import { ABORTABLE, type Abortable, readOptions, throwIfAborted } from './options.js'
import { type ImageSource, openFile, release, toLocated } from './source.js'

/**
 * What a file looks like, as `qemu-img` guesses it without `-f`: the name of a known format by its magic,
 * `'raw'` for everything else; of an appliance (`.ova`) with one disk, what that disk is. A guess for tools whose user chose the file: a guest can write any magic into its
 * raw disk, so the library itself never acts on this.
 */
export async function probe(source: ImageSource, options?: Abortable): Promise<Format | KnownFormat> {
  const located = toLocated(source, 'source')
  const { signal } = readOptions(options, 'probe', ABORTABLE)
  throwIfAborted(signal)
  const { file, head, path } = await openFile(located.header ?? located, {}, signal)
  await release(file)
  throwIfAborted(signal)
  if (located.header === undefined && isOva(head)) return (await diskOf(located, path)).format
  return detectFormat(head) ?? PLAIN_FORMAT
}
