/** The folders that jobs may name files in. */

import { lstat } from 'node:fs/promises'
import { basename, dirname, isAbsolute, join, relative, resolve, sep } from 'node:path'
import { KINDS, type ReferencePolicy } from '../backing/policy.js'
import { Qcow2Error } from '../errors.js'
import { exactStat, realPath } from '../support/files.js'
import { decodeText, exactText, toName } from '../text.js'

/** A file that a job makes: its folder, which is below a root, and its name there. */
export interface Place {
  readonly folder: string
  readonly name: string
  readonly path: string
}

/** Folders, symbolic links resolved: what is asked of them is resolved too, and lies in one of them or is refused. */
export class Roots {
  readonly #first: string
  readonly #real: readonly string[]
  readonly #named: readonly string[]

  private constructor(named: readonly string[], real: readonly string[]) {
    this.#named = named
    this.#real = real
    this.#first = named[0] ?? ''
  }

  /** Folders that are there. */
  static async of(folders: readonly string[]): Promise<Roots> {
    const named = folders.map(folder => resolve(folder))
    const real = await Promise.all(named.map(resolved))
    for (const [index, path] of real.entries()) {
      if ((await exactStat(toName(path))).isDirectory()) continue
      const message = `ENOTDIR: not a directory: the root '${named[index]}'`
      throw new Qcow2Error('ENOTDIR', message, { path: named[index], syscall: 'open' })
    }
    return new Roots(named, real)
  }

  /** The file of a path: a regular one, or a block device, below a root. */
  async source(path: string): Promise<string> {
    const real = await this.#inside(this.#absolute(path), path)
    const stat = await exactStat(toName(real))
    if (!stat.isFile() && !stat.isBlockDevice()) throw refused(path, 'it is neither a file nor a block device')
    return real
  }

  /** Where a file of that path is made, or replaced. */
  async target(path: string): Promise<Place> {
    const absolute = this.#absolute(path)
    const folder = await this.#inside(dirname(absolute), path)
    const name = basename(absolute)
    const place = { folder, name, path: join(folder, name) }
    if (name === '' || this.#real.includes(place.path)) throw refused(path, 'it is no name of a file')
    const found = await lstat(toName(place.path)).catch(() => undefined)
    if (found !== undefined && !found.isFile()) throw refused(path, 'what is there is no regular file')
    return place
  }

  /** What images may name: files below the roots, by the rules of `references: 'allow'`. */
  get references(): ReferencePolicy {
    return async ({ kind, filename, filenameBytes, from, fromBytes }) => {
      const found = KINDS[kind].read(exactText(filename, filenameBytes), exactText(from, fromBytes))
      if ('refused' in found) return null
      const real = await resolved(resolve(found.path)).catch(() => undefined)
      return real !== undefined && isBelow(real, this.#real) ? toName(real) : null
    }
  }

  #absolute(path: string): string {
    const absolute = resolve(this.#first, path)
    // Nothing that lies elsewhere is looked at: not even whether it is there.
    if (!isBelow(absolute, this.#named) && !isBelow(absolute, this.#real)) throw outside(path)
    return absolute
  }

  async #inside(absolute: string, path: string): Promise<string> {
    const real = await resolved(absolute)
    if (!isBelow(real, this.#real)) throw outside(path)
    return real
  }
}

const resolved = async (path: string): Promise<string> => decodeText(await realPath(toName(path)))

function isBelow(path: string, roots: readonly string[]): boolean {
  return roots.some(root => {
    const way = relative(root, path)
    return way === '' || (way !== '..' && !way.startsWith(`..${sep}`) && !isAbsolute(way))
  })
}

const outside = (path: string): Qcow2Error => refused(path, 'it does not lie under a root of this worker')

function refused(path: string, reason: string): Qcow2Error {
  const message = `the job names '${path}', which is not used: ${reason}`
  return new Qcow2Error('ERR_QCOW2_REFERENCE_DENIED', message, { path, field: 'roots' })
}
