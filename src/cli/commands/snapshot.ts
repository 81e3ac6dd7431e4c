import type { Command } from 'commander'
import type { Image } from '../../index.js'
import { exactText, toName } from '../../text.js'
import { describeError } from '../errors.js'
import { CommandFailure, UsageFailure } from '../failure.js'
import { formatSnapshots } from '../format/info.js'
import { snapshotDocuments } from '../format/snapshots.js'
import { formatsThat, oneFile, takeDriverSyntax } from '../grammar.js'
import { warnOfDamage, withImage } from '../images.js'
import type { Runner } from '../program.js'
import type { Session } from '../session.js'

interface SnapshotArguments {
  readonly format?: string
  readonly create?: string
  readonly apply?: string
  readonly delete?: string
  readonly forceShare?: boolean
}

export function declareSnapshot(program: Command, run: Runner): void {
  const command = program
    .command('snapshot')
    .summary('list, create, apply or delete internal snapshots')
    .description('List the internal snapshots of an image, or create, apply or delete one.')
    .usage('[options] [-l | -c NAME | -a SNAPSHOT | -d SNAPSHOT] FILENAME')
    .argument('[files...]', 'the image')
    .option('-f, --format <fmt>', `format of the image: ${formatsThat('snapshots')} (default: what it looks like)`)
    .option('-l, --list', 'list the snapshots (the default)')
    .option('-c, --create <name>', 'create a snapshot of the disk as it is')
    .option('-a, --apply <snapshot>', 'make the disk what the snapshot holds, by id or name')
    .option('-d, --delete <snapshot>', 'delete the snapshot, by name')
    .option('-U, --force-share', 'list the snapshots of an image that another process uses')
    .option('-q, --quiet', 'print nothing but errors')
  // One thing at a time: the last of several names would win silently.
  let actions = 0
  for (const action of ['list', 'create', 'apply', 'delete']) {
    command.on(`option:${action}`, () => {
      actions += 1
      if (actions > 1) throw new UsageFailure("Cannot mix '-l', '-a', '-c', '-d'")
    })
  }
  takeDriverSyntax(command)
  command.action((files: string[], options: SnapshotArguments) =>
    run(session => snapshot(oneFile(files), options, session)),
  )
}

async function snapshot(filename: string, options: SnapshotArguments, session: Session): Promise<number> {
  const { create, apply, delete: remove, format, forceShare } = options
  const at = { filename, format } as const
  const named = create ?? apply ?? remove
  if (named === undefined) {
    return withImage({ ...at, references: 'layer', forceShare }, session, async image => {
      const snapshots = await image.snapshots.list()
      warnOfDamage(filename, await image.info({ bigint: true }), session)
      if (snapshots.length > 0) session.stdout.write(formatSnapshots(snapshotDocuments(snapshots)))
      return 0
    })
  }
  if (forceShare) {
    throw new CommandFailure(`Could not open '${filename}': force-share=on can only be used with read-only images`)
  }
  const verb = create !== undefined ? 'create' : apply !== undefined ? 'apply' : 'delete'
  const unwritable = `Could not ${verb} snapshot '${named}': ${UNSUPPORTED[verb]}`
  return withImage({ ...at, flags: 'r+', unwritable }, session, async image => {
    await change(image, verb, named).catch(error => {
      if (session.signal.aborted || error instanceof CommandFailure) throw error
      throw new CommandFailure(`Could not ${verb} snapshot '${named}': ${describeError(error)}`, { cause: error })
    })
    return 0
  })
}

/** What qemu-img says where the format has no snapshots. */
const UNSUPPORTED = {
  create: 'Operation not supported',
  apply: 'Block driver does not support snapshots',
  delete: 'snapshot not found',
} as const

async function change(image: Image, verb: 'create' | 'apply' | 'delete', named: string): Promise<void> {
  if (verb === 'create') {
    await image.snapshots.create(toName(named))
  } else if (verb === 'apply') {
    await image.snapshots.apply(toName(named))
  } else {
    // Like qemu-img, by name only: a name that looks like another one's id must not delete that one.
    const found = (await image.snapshots.list()).find(each => exactText(each.name, each.nameBytes) === named)
    if (found === undefined) throw new CommandFailure(`Could not delete snapshot '${named}': snapshot not found`)
    await image.snapshots.delete(found.idBytes ?? found.id)
  }
}
