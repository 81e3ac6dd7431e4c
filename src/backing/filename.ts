/** The names by which images refer to others, read as QEMU reads them. */

/** What a stored name turned out to be. */
export type FileName =
  | { readonly path: string }
  /** Not the name of a file: a JSON description or a protocol. Never opened. */
  | { readonly refused: string }

/** What stands before the first colon is a protocol, unless a slash comes first. */
const PROTOCOL = /^[^/:]*:/

const WINDOWS = process.platform === 'win32'
const ABSOLUTE = WINDOWS ? /^(?:[A-Za-z]:|[/\\])/ : /^\//
const DIRECTORY = WINDOWS ? /^.*[/\\]/s : /^.*\//s

/** What can be said without knowing where a relative name starts. */
function decide(name: string): FileName | undefined {
  if (name === '') return { refused: 'it is empty' }
  if (name.startsWith('uuid:')) {
    return {
      refused:
        'the image knows it by its UUID, and names no file: references has to be a function that says which one it is',
    }
  }
  if (name.startsWith('json:')) return { refused: 'it is a JSON description of a block device, not a file name' }
  // The protocol `file:` means the file of that name as the process sees it.
  if (name.startsWith('file:')) return { path: name.slice('file:'.length) }
  if (ABSOLUTE.test(name)) return { path: name }
  const protocol = PROTOCOL.exec(name)?.[0]
  if (protocol === undefined) return undefined
  return { refused: `'${protocol}' is a protocol; the name of a file with a colon is written './${name}'` }
}

/**
 * Reads the name that the image at `from` stores for its backing file. A relative name starts from the directory of the image;
 * the parts are joined as they are, since `..` behind a symbolic link is the system's to resolve.
 */
export function readFileName(name: string, from: string | undefined): FileName {
  const decided = decide(name)
  if (decided !== undefined) return decided
  if (from === undefined) return { refused: 'it is relative, and the image was opened without a path' }
  return { path: `${DIRECTORY.exec(from)?.[0] ?? ''}${name}` }
}

/** What separates folders on any system that images come from, or ends a name. */
const SEPARATOR = /[/\\:\0]/

/**
 * Reads the name of a file that a disk is made of. It lies in the folder of the image at `from`, and nowhere else: an image is not to
 * read what its owner could not name.
 */
export function readExtentName(name: string, from: string | undefined): FileName {
  if (name === '' || name === '.' || name === '..') return { refused: 'it is none of a file' }
  if (SEPARATOR.test(name)) return { refused: 'the parts of a disk lie in its own folder, and it names another place' }
  if (from === undefined) return { refused: 'it is relative, and the image was opened without a path' }
  return { path: `${DIRECTORY.exec(from)?.[0] ?? ''}${name}` }
}

/** Reads the name of an external data file, which is as the process sees it: so does QEMU. */
export function readDataFileName(name: string): FileName {
  return decide(name) ?? { path: name }
}
