/** What an argument names, as the library opens it. */

import {
  type DetachedImage,
  type ImageInAppliance,
  type NbdSource,
  type NbdSourceOptions,
  nbdSource,
  Qcow2Error,
} from '../index.js'
import { describeError } from './errors.js'
import { CommandFailure } from './failure.js'
import { imagePath, isExport, localPath } from './filename.js'
import type { Session } from './session.js'

type HasObjects = Pick<Session, 'objects'>

/** The export that an argument names. */
export function exportOf(argument: string, { objects }: HasObjects): NbdSource {
  return named(argument, objects.connectionOf(argument))
}

function named(argument: string, connection: NbdSourceOptions): NbdSource {
  try {
    return nbdSource(argument, connection)
  } catch (error) {
    if (!(error instanceof Qcow2Error)) throw error
    if (error.field === 'hostname') {
      throw new CommandFailure(`Could not open '${argument}': No hostname for certificate validation`, { cause: error })
    }
    const why = / names no export: (.*?)(?: \(field uri\))?$/s.exec(error.message)?.[1] ?? describeError(error)
    throw new CommandFailure(`Could not open '${argument}': ${why}`, { cause: error })
  }
}

/** What an argument names, as the library opens it: a file, a disk in one, or an export. */
export function imageSource(filename: string, session: HasObjects): string | Buffer | ImageInAppliance | NbdSource {
  const member = session.objects.memberOf(filename)
  return member === undefined ? targetSource(filename, session) : { file: imagePath(filename), member }
}

/** What an argument names that is written to: no disk of an appliance. */
export const targetSource = (filename: string, session: HasObjects): string | Buffer | NbdSource =>
  isExport(filename) ? exportOf(filename, session) : imagePath(filename)

/** By which path errors name the file or export of an argument. */
export const placeOf = (filename: string): string =>
  isExport(filename) ? named(filename, {}).uri : localPath(filename)

/** What an image is opened by: its name, and that of its header where its description has one. */
export function sourceOf(
  filename: string,
  session: HasObjects,
): string | Buffer | DetachedImage | ImageInAppliance | NbdSource {
  const header = session.objects.headerOf(filename)
  return header === undefined
    ? imageSource(filename, session)
    : { file: imagePath(filename), header: imagePath(header) }
}
