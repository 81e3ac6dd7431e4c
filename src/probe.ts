/** Telling formats apart by their first bytes. */

import { diskBeside, diskOf } from './backing/appliance.js'
import { type ReferencePolicy, referencePolicy } from './backing/policy.js'
import { isOva, isOvf } from './formats/ova.js'
import { detectFormat } from './formats/probe.js'
import { type Format, type KnownFormat, PLAIN_FORMAT } from './formats/table.js'
import { ABORTABLE, type Abortable, readOptions, throwIfAborted } from './options.js'
import { type ImageSource, openFile, release, toLocated } from './source.js'

/** Options of {@link probe}. */
export interface ProbeOptions extends Abortable {
  /** What an OVF descriptor may pull in: the file of its disk. Default `'layer'`: nothing is opened. */
  references?: ReferencePolicy | undefined
}

const PROBE = { ...ABORTABLE, references: referencePolicy } as const

/**
 * What a file looks like, as `qemu-img` guesses it without `-f`: the name of a known format by its magic,
 * `'raw'` for everything else; of an appliance (`.ova`) with one disk, what that disk is, and of
 * a descriptor by itself (`.ovf`) the same where `references` lets its disk be opened. A guess for tools whose user chose the file: a guest can write any magic into its
 * raw disk, so the library itself never acts on this.
 *
 * @example
 * ```js
 * import { probe } from 'qcow2'
 *
 * console.log(await probe('disk.qcow2')) // 'qcow2'
 * ```
 */
export async function probe(source: ImageSource, options?: ProbeOptions): Promise<Format | KnownFormat> {
  const located = toLocated(source, 'source')
  const { signal, references: policy = 'layer' } = readOptions(options, 'probe', PROBE)
  throwIfAborted(signal)
  const { file, head, path } = await openFile(located.header ?? located, {}, signal)
  await release(file)
  throwIfAborted(signal)
  if (located.header === undefined && isOva(head)) return (await diskOf(located, path)).format
  if (located.header !== undefined || policy === 'layer' || !isOvf(head)) return detectFormat(head) ?? PLAIN_FORMAT
  const disk = await openFile((await diskBeside(located, path, { policy, signal })).located, {}, signal)
  await release(disk.file)
  return detectFormat(disk.head) ?? PLAIN_FORMAT
}
