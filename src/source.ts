/** What can be opened as a disk image. */

import type { FileHandle } from 'node:fs/promises'

/** A file name as Node's `fs` takes it. A `URL` must have the scheme `file:`. */
export type PathLike = string | Buffer | URL

/**
 * What can be opened: a file name, or a `FileHandle` of Node's. A handle stays the caller's: the library reads through a
 * descriptor of its own and leaves the handle, its cursor and its closing alone.
 */
export type ImageSource = PathLike | FileHandle

/** The formats that images are read and written in. */
export type Format = 'qcow2' | 'raw'
