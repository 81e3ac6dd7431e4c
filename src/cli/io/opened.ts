import type { Context } from './context.js'
import type { OpenDisk } from './disk.js'
import { LineFailure } from './line.js'

/** The image that is open. */
export function opened({ disk }: Context): OpenDisk {
  if (disk === undefined) throw new LineFailure({ err: "no file open, try 'help open'" })
  return disk
}
