/** What an argument names, as the library opens it. */

import {
  type DetachedImage,
  httpSource,
  type ImageInAppliance,
  type NbdSource,
  type NbdSourceOptions,
  nbdSource,
  Qcow2Error,
  type RandomAccessSource,
} from '../index.js'
import { describeError } from './errors.js'
import { CommandFailure } from './failure.js'
import { imagePath, isExport, isWebAddress, localPath, shownName } from './filename.js'
import type { Objects } from './secrets.js'
import type { Session } from './session.js'

type HasObjects = Pick<Session, 'objects'>
type WithSources = Pick<Session, 'objects' | 'signal'>

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

/** Disks on web servers, by the arguments that name them: one command reads one version of each. */
const onTheWeb = new WeakMap<Objects, Map<string, Promise<RandomAccessSource>>>()

/** The disk on a web server that an argument names. */
function webSource(argument: string, { objects, signal }: WithSources): Promise<RandomAccessSource> {
  const known = onTheWeb.get(objects) ?? new Map<string, Promise<RandomAccessSource>>()
  onTheWeb.set(objects, known)
  const source = known.get(argument) ?? httpSource(argument, { signal })
  known.set(argument, source)
  return source
}

/** What an argument names, as the library opens it: a file, a disk in one, an export, or a disk on a web server, which is asked now. */
export async function imageSource(
  filename: string,
  session: WithSources,
): Promise<string | Buffer | ImageInAppliance | NbdSource | RandomAccessSource> {
  return isWebAddress(filename) ? webSource(filename, session) : writtenSource(filename, session)
}

/** What an argument names that is read and written to, as the library opens it. */
export function writtenSource(filename: string, session: HasObjects): string | Buffer | ImageInAppliance | NbdSource {
  const member = session.objects.memberOf(filename)
  return member === undefined ? targetSource(filename, session) : { file: imagePath(filename), member }
}

/** What an argument names that is written to: no disk of an appliance. */
export const targetSource = (filename: string, session: HasObjects): string | Buffer | NbdSource =>
  isExport(filename) ? exportOf(filename, session) : imagePath(filename)

/** By which path errors name the file or export of an argument. */
export const placeOf = (filename: string): string =>
  isExport(filename) ? named(filename, {}).uri : isWebAddress(filename) ? shownName(filename) : localPath(filename)

/** What an image is opened by: its name, and that of its header where its description has one. */
export async function sourceOf(
  filename: string,
  session: WithSources,
): Promise<string | Buffer | DetachedImage | ImageInAppliance | NbdSource | RandomAccessSource> {
  const header = session.objects.headerOf(filename)
  return header === undefined
    ? await imageSource(filename, session)
    : { file: imagePath(filename), header: imagePath(header) }
}
