/**
 * A file that appears under its name once, whole, whichever of several workers made it.
 *
 * Each attempt of a job makes a file of a name of its own beside the target. Only who holds the job's lock gives it the target's name, and
 * only while that file is there: an attempt that takes the job over removes those of all attempts before it first. So one that lost its
 * lock after it asked for it, and goes on at any later moment, finds nothing that it could rename. What the queue was told before the
 * renaming ({@link Intent}) says whether the target is the job's own.
 */

import { createHash, randomBytes } from 'node:crypto'
import { chmod, chown, link, lstat, open as openFile, readdir, rename, unlink } from 'node:fs/promises'
import { join } from 'node:path'
import { AbortError, Qcow2Error } from '../errors.js'
import { open } from '../open.js'
import { answer } from '../support/signals.js'
import { toName } from '../text.js'
import type { Place } from './roots.js'

/** What a job's lock is asked for, and what is kept with the job. */
export interface Fence {
  /** Whether the lock is still this attempt's: then for the whole duration again, and the intent is kept with the job. */
  hold(intent: Intent): Promise<boolean>
  /** What was kept last. */
  intent(): Promise<Intent | undefined>
}

/** A file that is about to get the target's name, and what its job says then. */
export interface Intent {
  readonly made: string
  readonly result: unknown
}

/** The reason of a signal of a job that is another worker's now. */
export class LockLost extends Error {
  override readonly name = 'LockLost'

  constructor() {
    super('the lock of the job was lost: another worker has it, or will')
  }
}

const lost = (): AbortError => new AbortError(new LockLost())

/** The file system cannot give a file a second name. */
const NO_LINKS: ReadonlySet<string> = new Set(['EPERM', 'ENOSYS', 'ENOTSUP', 'EOPNOTSUPP', 'EMLINK'])

export class NewFile {
  /** What the attempt makes. */
  readonly temporary: string
  readonly #place: Place
  readonly #family: string

  /** `job` tells the job from all others of all queues. */
  constructor(place: Place, job: string) {
    this.#place = place
    // A job's id is whatever somebody chose: no part of a file name.
    this.#family = `.qcow2-job-${createHash('sha256').update(job).update('\0').update(place.name).digest('hex').slice(0, 24)}-`
    this.temporary = join(place.folder, `${this.#family}${randomBytes(6).toString('hex')}`)
  }

  /** No attempt before this one can name its file any more. */
  async revokeOthers(): Promise<void> {
    const entries = await readdir(toName(this.#place.folder))
    const others = entries.filter(name => name.startsWith(this.#family))
    await Promise.all(others.map(name => unlinkIfThere(join(this.#place.folder, name))))
  }

  /** What the job said if an attempt before named its file, and ended before it could tell. After {@link revokeOthers}. */
  async done(fence: Fence): Promise<Intent | undefined> {
    const intent = await fence.intent()
    if (intent === undefined || (await this.#named()) !== intent.made) return undefined
    await syncFolder(this.#place.folder)
    return intent
  }

  /** Refuses a target that is there, as naming it would. */
  async refuseExisting(): Promise<void> {
    if ((await this.#named()) !== undefined) throw this.#exists()
  }

  /** Gives the finished file the target's name. Once the lock was held, nothing aborts that any more. */
  async name(fence: Fence, replace: boolean, result: unknown, signal?: AbortSignal): Promise<void> {
    const made = await identityOf(this.temporary)
    if (made === undefined || !(await answer(() => fence.hold({ made, result }), signal))) throw lost()
    try {
      await (replace ? this.#replace() : this.#link())
    } catch (error) {
      // A file system over a network can have done what it says it could not, when it was asked twice.
      if ((await this.#named()) !== made) throw codeOf(error) === 'ENOENT' ? lost() : error
      await unlinkIfThere(this.temporary)
    }
    await syncFolder(this.#place.folder)
  }

  /** Removes what the attempt made, if it did not get its name. */
  discard(): Promise<void> {
    return unlinkIfThere(this.temporary)
  }

  #named(): Promise<string | undefined> {
    return identityOf(this.#place.path)
  }

  async #link(): Promise<void> {
    try {
      await link(toName(this.temporary), toName(this.#place.path))
    } catch (error) {
      const code = codeOf(error)
      if (code === 'EEXIST') throw this.#exists()
      if (code === undefined || !NO_LINKS.has(code)) throw error
      const message = `'${this.#place.path}': the file system has no hard links, by which a target appears that nothing is to replace: say overwrite: true`
      throw new Qcow2Error('ERR_QCOW2_UNSUPPORTED_FEATURE', message, { path: this.#place.path, cause: error })
    }
    await unlinkIfThere(this.temporary)
  }

  /** Nobody may have the old file open for writing; the new one has its permissions, and its owner where that can be. */
  async #replace(): Promise<void> {
    const [from, to] = [toName(this.temporary), toName(this.#place.path)]
    const old = await lstat(to).catch((error: unknown) => {
      if (codeOf(error) !== 'ENOENT') throw error
    })
    if (old === undefined) return rename(from, to)
    const held = await open(to, { format: 'raw', flags: 'r+' })
    try {
      // As far as this process may.
      await chown(from, old.uid, old.gid).catch(() => {})
      await chmod(from, old.mode & 0o7777)
      await rename(from, to)
    } finally {
      await held.close()
    }
  }

  #exists(): Qcow2Error {
    const { path } = this.#place
    return new Qcow2Error('EEXIST', `EEXIST: file already exists: say overwrite: true, link '${path}'`, {
      path,
      syscall: 'link',
    })
  }
}

/** What tells a file from all that were or will be at its place; a new name does not change it. */
async function identityOf(path: string): Promise<string | undefined> {
  try {
    const { ino, size, mtimeNs } = await lstat(toName(path), { bigint: true })
    return `${ino}:${size}:${mtimeNs}`
  } catch (error) {
    if (codeOf(error) === 'ENOENT') return undefined
    throw error
  }
}

async function unlinkIfThere(path: string): Promise<void> {
  try {
    await unlink(toName(path))
  } catch (error) {
    if (codeOf(error) !== 'ENOENT') throw error
  }
}

/** Makes names durable, where the system has that. */
async function syncFolder(folder: string): Promise<void> {
  if (process.platform === 'win32') return
  const handle = await openFile(toName(folder), 'r')
  try {
    await handle.sync()
  } catch (error) {
    if (codeOf(error) !== 'EINVAL') throw error
  } finally {
    await handle.close()
  }
}

export const codeOf = (error: unknown): string | undefined =>
  error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : undefined
