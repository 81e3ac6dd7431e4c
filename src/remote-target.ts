/** Targets that are no files: exports, and objects of the caller's. */

import { invalidArgument, Qcow2Error } from './errors.js'
import { openFile, type RemoteLocated, release, toPath, toRemote } from './source.js'

/** Where a disk is made: in a file, or in what is none. */
export type TargetPlace = { readonly path: string } | RemoteLocated

/** Checks a target. */
export const toPlace = (target: unknown): TargetPlace =>
  toRemote(target, 'target') ?? { path: toPath(target, 'target') }

/** What errors call one. */
export const nameOf = (remote: RemoteLocated): string => ('nbd' in remote ? remote.nbd.uri : remote.random.name)

/** What is asked of a target. */
interface Order {
  readonly existingTarget?: boolean | undefined
  readonly overwrite?: boolean | undefined
  readonly create?: { readonly dataFile?: unknown } | undefined
}

/** An export, and an object that has bytes, is there: what would make it anew says that it may be written over. */
export function refuseNew(owner: string, remote: RemoteLocated, { existingTarget, overwrite, create }: Order): void {
  const isEmpty = 'random' in remote && remote.random.size === 0
  if (!existingTarget && !overwrite && !isEmpty) {
    const path = nameOf(remote)
    const what = 'nbd' in remote ? 'export' : 'source'
    const ways = owner === 'convert' ? 'overwrite: true, or existingTarget: true' : 'overwrite: true'
    throw new Qcow2Error('EEXIST', `EEXIST: the ${what} exists: say ${ways}, open '${path}'`, { path, syscall: 'open' })
  }
  if (create?.dataFile !== undefined) {
    throw invalidArgument('dataFile', `${owner}: an image in what is no file has no external data file`)
  }
}

/** Opens what a disk is made in, which is none of what is read; the addon's number of it. */
export async function openTargetFile(
  owner: string,
  remote: RemoteLocated,
  inUse: readonly string[],
  signal: AbortSignal | undefined,
): Promise<number> {
  const { file, identity, path } = await openFile(remote, { writable: true }, signal)
  if (identity === undefined || !inUse.includes(identity)) return file
  await release(file)
  throw isSource(owner, path)
}

/** The target is what is read. */
export function isSource(owner: string, path: string | undefined): Qcow2Error {
  const message = `${owner}: ${path === undefined ? 'the target' : `'${path}'`} is also a source of this operation`
  return new Qcow2Error('ERR_QCOW2_INVALID_ARGUMENT', message, { path, field: 'target' })
}
