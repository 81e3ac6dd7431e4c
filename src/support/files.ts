/**
 * The calls on files that are not the addon's, as promises. Node's own `fs/promises` is as large as all else that a short command
 * loads: it is left to those who hand a `FileHandle` over.
 */

import { type BigIntStats, close, fstat, open, read, realpath, type Stats, stat, writeFile } from 'node:fs'
import { promisify } from 'node:util'

export const fileStat: (path: string | Buffer) => Promise<Stats> = promisify(stat)
export const exactStat = (path: string | Buffer): Promise<BigIntStats> => promisify(stat)(path, { bigint: true })
export const descriptorStat = promisify(fstat)
export const openDescriptor = promisify(open)
export const closeDescriptor = promisify(close)
export const readDescriptor = promisify(read)
export const writeWhole = promisify(writeFile)
/** As bytes: a name need not be text. */
export const realPath = (path: string | Buffer): Promise<Buffer> =>
  new Promise((resolve, reject) => {
    realpath.native(path, { encoding: 'buffer' }, (error, found) => (error === null ? resolve(found) : reject(error)))
  })
