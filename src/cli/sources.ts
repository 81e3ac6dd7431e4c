/** What an argument names, as the library opens it. */

import { type DetachedImage, type NbdSource, nbdSource, Qcow2Error } from '../index.js'
import { describeError } from './errors.js'
import { CommandFailure } from './failure.js'
import { imagePath, isExport, localPath } from './filename.js'
import type { Session } from './session.js'

/** The export that an argument names. */
export function exportOf(argument: string): NbdSource {
  try {
    return nbdSource(argument)
  } catch (error) {
    if (!(error instanceof Qcow2Error)) throw error
    const why = / names no export: (.*?)(?: \(field uri\))?$/s.exec(error.message)?.[1] ?? describeError(error)
    throw new CommandFailure(`Could not open '${argument}': ${why}`, { cause: error })
  }
}

/** What an argument names, as the library opens it: a file, or an export. */
export const imageSource = (filename: string): string | Buffer | NbdSource =>
  isExport(filename) ? exportOf(filename) : imagePath(filename)

/** By which path errors name the file or export of an argument. */
export const placeOf = (filename: string): string => (isExport(filename) ? exportOf(filename).uri : localPath(filename))

/** What an image is opened by: its name, and that of its header where its description has one. */
export function sourceOf(
  filename: string,
  { objects }: Pick<Session, 'objects'>,
): string | Buffer | DetachedImage | NbdSource {
  const header = objects.headerOf(filename)
  return header === undefined ? imageSource(filename) : { file: imagePath(filename), header: imagePath(header) }
}
