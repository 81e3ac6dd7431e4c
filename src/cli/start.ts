/**
 * What is started: it runs the command line, `command-line.js`, compiled once. V8's compiled form of it, with the functions that a
 * command has called, is kept in the user's cache folder, because to compile is half of what a short command costs. Node's own cache
 * (22.1 and newer) keeps a script as it is before it runs, so without most of its functions.
 *
 * A cache is used only if it is the user's own and of this very bundle and Node; where there is none, none can be kept, or
 * `NODE_DISABLE_COMPILE_CACHE` is set, everything works the same, a little slower.
 */

import {
  closeSync,
  constants,
  fstatSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  statSync,
  unlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { wrap } from 'node:module'
import { dirname, isAbsolute, join } from 'node:path'
import { Script } from 'node:vm'

/** A hash of `command-line.js`, put in when the package is built. */
declare const BUNDLE: string

const MONTH = 30 * 86_400_000
const PREFIX = 'command-line-'

const bundle = join(__dirname, 'command-line.js')
const folder = cacheFolder()
const name = `${PREFIX}${BUNDLE}-${process.version}-${process.arch}`
const kept = folder === undefined ? undefined : read(join(folder, name))
const script = new Script(wrap(readFileSync(bundle, 'utf8')), {
  filename: bundle,
  ...(kept !== undefined && { cachedData: kept }),
})
if (folder !== undefined && (kept === undefined || script.cachedDataRejected === true)) {
  process.once('exit', () => keep(folder))
}
const run = script.runInThisContext() as (...values: readonly unknown[]) => void
try {
  run.call(exports, exports, require, module, bundle, __dirname)
} catch (error) {
  // All that a command says goes through the command line, which is not there without the addon.
  if (!(error instanceof Error && 'code' in error && error.code === 'ERR_QCOW2_ADDON_MISSING')) throw error
  writeSync(2, `qcow2: ${error.message}\n`)
  process.exitCode = 1
}

function cacheFolder(): string | undefined {
  const { NODE_DISABLE_COMPILE_CACHE, XDG_CACHE_HOME, HOME, LOCALAPPDATA } = process.env
  if (NODE_DISABLE_COMPILE_CACHE) return undefined
  const home = HOME === undefined ? undefined : join(HOME, process.platform === 'darwin' ? 'Library/Caches' : '.cache')
  const base = process.platform === 'win32' ? LOCALAPPDATA : (XDG_CACHE_HOME ?? home)
  return base === undefined || !isAbsolute(base) ? undefined : join(base, 'qcow2')
}

/** The kept code, unless somebody else can have written it: it is run as it is. */
function read(path: string): Buffer | undefined {
  let file: number | undefined
  try {
    file = openSync(path, constants.O_RDONLY)
    const { uid, mode } = fstatSync(file)
    const own = process.getuid === undefined || (uid === process.getuid() && (mode & 0o022) === 0)
    return own ? readFileSync(file) : undefined
  } catch {
    return undefined
  } finally {
    if (file !== undefined) closeSync(file)
  }
}

/** Keeps what has been compiled, at once and whole; removes what nobody has used for a month. Fails silently: it is only a cache. */
function keep(cache: string): void {
  const path = join(cache, name)
  const own = `${path}.${process.pid}`
  try {
    makeFolder(dirname(cache))
    makeFolder(cache)
    const file = openSync(own, 'wx', 0o600)
    try {
      writeFileSync(file, script.createCachedData())
      fsyncSync(file)
    } finally {
      closeSync(file)
    }
    renameSync(own, path)
    for (const entry of readdirSync(cache)) {
      const old = join(cache, entry)
      if (entry.startsWith(PREFIX) && Date.now() - statSync(old).mtimeMs > MONTH) unlinkSync(old)
    }
  } catch {
    // The folder cannot be written, or is full, or belongs to others: then there may be no looking for the file either.
    try {
      unlinkSync(own)
    } catch {}
  }
}

/**
 * One level: `recursive` never ends where the system makes no folders, as in /proc. Root works in others' homes (`sudo` leaves `HOME` as it
 * is), and makes nothing there that they could not write to afterwards.
 */
function makeFolder(path: string): void {
  if (isOfOthers(dirname(path))) throw new Error('somebody else has a home here')
  try {
    mkdirSync(path, 0o700)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error
  }
  if (isOfOthers(path)) throw new Error('somebody else has a cache here')
}

function isOfOthers(folder: string): boolean {
  const user = process.getuid?.()
  const { uid } = statSync(folder)
  return user !== undefined && uid !== user && uid !== 0
}
