import { chmodSync, lstatSync, mkdirSync, realpathSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import type { Command } from 'commander'
import { isText } from '../../text.js'
import { describeError, pathOf } from '../errors.js'
import { CommandFailure, UsageFailure, unsupported } from '../failure.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'

/** The programs that this command line stands in for. It speaks as what it is called by. */
const NAMES = ['qemu-img', 'qemu-io', 'qemu-nbd'] as const

/** Where the links lie that give the command line those names. */
const LINKS = '.qcow2-shims'

interface ShimsArguments {
  readonly force?: boolean
}

export function declareShims(program: Command, run: Runner): void {
  program
    .command('shims')
    .summary('write qemu-img, qemu-io and qemu-nbd that run this program')
    .description(
      'Write programs called qemu-img, qemu-io and qemu-nbd into a folder. They run this program under those names. Nothing uses ' +
        'them unless the folder is on the PATH.',
    )
    .usage('[options] FOLDER')
    .argument('[folders...]', 'the folder; it is made')
    .option('--force', 'replace programs of these names that are there')
    .action((folders: string[], options: ShimsArguments) => run(async session => writeShims(folders, options, session)))
}

function writeShims(folders: readonly string[], { force = false }: ShimsArguments, session: Session): number {
  const [given] = folders
  if (given === undefined || folders.length !== 1) throw new UsageFailure('Expecting one folder')
  if (process.platform === 'win32') throw unsupported("Command 'shims'", 'Windows has no shell scripts')
  const script = process.argv[1]
  if (script === undefined) throw new CommandFailure('The program does not know its own file')
  const folder = resolve(given)
  if (!isText(folder)) throw new CommandFailure(`'${folder}': Node starts no program whose name is not UTF-8`)
  const target = realpathSync(script)
  try {
    // All or none: what is there is looked for first.
    if (!force) for (const name of NAMES) refuseExisting(join(folder, name))
    makeFolders(join(folder, LINKS))
    for (const shim of linkTo(target, folder)) session.stdout.write(`${shim}\n`)
  } catch (error) {
    if (error instanceof CommandFailure) throw error
    throw new CommandFailure(describeError(error, pathOf(error)), { cause: error })
  }
  return 0
}

/** Makes a script for each tool; yields those that are there. */
function* linkTo(target: string, folder: string): Generator<string> {
  for (const name of NAMES) {
    const link = join(folder, LINKS, name)
    const shim = join(folder, name)
    for (const path of [link, shim]) rmSync(path, { force: true })
    symlinkSync(target, link)
    writeFileSync(shim, `#!/bin/sh\nexec ${quoted(process.execPath)} ${quoted(link)} "$@"\n`, { flag: 'wx' })
    chmodSync(shim, 0o755)
    yield shim
  }
}

/** Level by level: Node's `recursive` never ends where the system makes no folders, as in /proc. */
function makeFolders(path: string): void {
  if (statSync(path, { throwIfNoEntry: false })?.isDirectory()) return
  const above = dirname(path)
  if (above !== path) makeFolders(above)
  mkdirSync(path)
}

function refuseExisting(path: string): void {
  if (lstatSync(path, { throwIfNoEntry: false }) === undefined) return
  throw new CommandFailure(`'${path}' exists already: --force replaces it`)
}

/** One word of the shell. */
const quoted = (word: string): string => `'${word.replaceAll("'", "'\\''")}'`
