/** What an argument that names a file means. */

import { withoutCredentials } from '../remote/address.js'
import { toName } from '../text.js'
import { CommandFailure } from './failure.js'

/** Whether an argument names an export of an NBD server. Only what is typed is asked: a name that an image stores never is. */
export const isExport = (argument: string): boolean => /^(?:nbd:|nbds?(?:\+[a-z]+)?:\/\/)/i.test(argument)

/** Whether an argument names a disk on a web server. Again only what is typed. */
export const isWebAddress = (argument: string): boolean => /^https?:\/\//i.test(argument)

/** Whether an argument names what is no file. */
export const isRemote = (argument: string): boolean => isExport(argument) || isWebAddress(argument)

/**
 * The path that an argument names. Like qemu-img, a colon before the first slash makes it a protocol, of which only
 * `file:` is followed here.
 */
export function localPath(filename: string): string {
  if (process.platform === 'win32' && /^[a-z]:/i.test(filename)) return filename
  const protocol = /^([^/:]*):/.exec(filename)?.[1]
  if (protocol === undefined) return filename
  if (protocol === 'file') return filename.slice('file:'.length)
  if (protocol === 'json') {
    throw new CommandFailure(`Could not open '${filename}': json: descriptions are not followed, only file names`)
  }
  if (isExport(filename)) {
    throw new CommandFailure(
      `Could not open '${filename}': an export of an NBD server is no file, which is needed here`,
    )
  }
  if (isWebAddress(filename)) {
    throw new CommandFailure(
      `Could not open '${filename}': a disk on a web server can only be read, and is no file, which is needed here`,
    )
  }
  throw new CommandFailure(`Could not open '${filename}': Unknown protocol '${protocol}'`, {
    hint: `A file with a colon in its name is written './${filename}'.`,
  })
}

/** {@link localPath} as the library takes it. */
export const imagePath = (filename: string): string | Buffer => toName(localPath(filename))

/** A path as an argument: one that would be taken for a protocol says that it is none. */
export const argumentOf = (path: string): string => (/^[^/]*:/.test(path) ? `./${path}` : path)

/** An image's name as it is shown: without `file:`, unless a colon would make a protocol of what is left. */
export function shownName(filename: string): string {
  if (isExport(filename)) return filename
  if (isWebAddress(filename)) return withoutCredentials(filename)
  const path = localPath(filename)
  return path === filename ? path : argumentOf(path)
}
