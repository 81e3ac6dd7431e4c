/** All that `report` tells of an image, from its metadata alone. */

import { can, isPlain } from '../formats/table.js'
import { type CheckResult, type CompactResult, type Format, type Image, type ImageInfo, Qcow2Error } from '../index.js'
import { exactText } from '../text.js'
import { describeError } from './errors.js'
import { Allocation, type DiskCaption } from './format/allocation.js'
import { Layout } from './format/layout.js'
import { Runs } from './format/runs.js'
import { svgGrid } from './format/svg.js'
import { type Request, withImage } from './images.js'
import type { Session } from './session.js'
import { shareOut } from './shares.js'
import { captionOf, extentsOf, survey } from './survey.js'

/** What could be had, or why it could not. */
export type Known<T> = { readonly value: T } | { readonly why: string }

export interface SnapshotFact {
  readonly id: string
  readonly name: string
  readonly dateSec: number
  readonly vmStateSize: number
}

export interface BitmapFact {
  readonly name: string
  readonly granularity: number
  readonly flags: readonly string[]
  /** Bytes; undefined for one that is inconsistent. */
  readonly dirty: number | undefined
}

export interface Facts {
  readonly caption: DiskCaption
  readonly chain: readonly ImageInfo<number | bigint>[]
  readonly allocation: Allocation
  readonly layout: Layout | undefined
  readonly runs: Runs
  readonly check: Known<CheckResult>
  readonly compact: Known<readonly [inPlace: CompactResult, rewrite: CompactResult]>
  readonly snapshots: readonly SnapshotFact[]
  /** Bytes of data that each snapshot, in the order of `snapshots`, and last the disk itself, has alone; and those that several have. */
  readonly alone: Known<{ readonly views: readonly number[]; readonly shared: number; readonly compressed: boolean }>
  readonly bitmaps: readonly BitmapFact[]
}

/** Opening an image for every snapshot takes time: more are not looked into. */
const MOST_SNAPSHOTS = 64

export async function gatherFacts(
  image: Image,
  request: Request & { format: Format },
  session: Session,
): Promise<Facts> {
  const { format } = request
  const chain = await image.chain({ bigint: true })
  const range = { start: 0, length: Number(image.virtualSizeBigInt) }
  const [top] = chain
  const own = !isPlain(format) && top?.formatSpecific?.dataFile === undefined
  const layout = own ? new Layout(0, range.length, Number(top?.fileLength ?? 0)) : undefined
  const allocation = new Allocation(svgGrid(0, range.length))
  const runs = new Runs(range.length)
  await survey(image, range, layout === undefined ? [allocation, runs] : [allocation, runs, layout], session)
  const snapshots = (top?.snapshots ?? []).map(({ id, idBytes, name, nameBytes, dateSec, vmStateSize }) => ({
    id: exactText(id, idBytes),
    name: exactText(name, nameBytes),
    dateSec,
    vmStateSize: Number(vmStateSize),
  }))
  const { signal } = session
  return {
    caption: await captionOf(request.filename, image),
    chain,
    allocation,
    layout,
    runs,
    snapshots,
    check: await known(can(format, 'check'), format, () => image.check({ signal })),
    compact: await known(can(format, 'compact'), format, async () => [
      await image.compact({ dryRun: true, signal }),
      await image.compact({ dryRun: true, mode: 'rewrite', signal }),
    ]),
    alone: await heldAlone(image, request, snapshots, session),
    bitmaps: await bitmapFacts(image, top?.formatSpecific?.bitmaps ?? [], session),
  }
}

async function known<T>(possible: boolean, format: Format, ask: () => Promise<T>): Promise<Known<T>> {
  if (!possible) return { why: `${format} images have no such thing` }
  try {
    return { value: await ask() }
  } catch (error) {
    if (!(error instanceof Qcow2Error) || error.code === 'ABORT_ERR') throw error
    return { why: describeError(error) }
  }
}

async function heldAlone(
  image: Image,
  request: Request,
  snapshots: readonly SnapshotFact[],
  session: Session,
): Promise<Facts['alone']> {
  if (snapshots.length === 0) return { why: 'there are no snapshots' }
  if (snapshots.length > MOST_SNAPSHOTS) return { why: `there are more than ${MOST_SNAPSHOTS} snapshots` }
  const views = await shareOut(snapshots.length + 1, async add => {
    const all = async (view: number, of: Image): Promise<void> => {
      const range = { start: 0, length: Number(of.virtualSizeBigInt) }
      if (range.length === 0) return
      for await (const extent of extentsOf(of, range, session)) if (!add(view, extent)) return
    }
    for (const [view, { id }] of snapshots.entries()) {
      await withImage({ ...request, snapshot: id }, session, opened => all(view, opened))
    }
    await all(snapshots.length, image)
  })
  return views === undefined ? { why: 'there are very many extents' } : { value: views }
}

async function bitmapFacts(
  image: Image,
  bitmaps: NonNullable<NonNullable<ImageInfo['formatSpecific']>['bitmaps']>,
  { signal }: Session,
): Promise<BitmapFact[]> {
  const facts: BitmapFact[] = []
  for (const { name, nameBytes, granularity, flags } of bitmaps) {
    let dirty: number | undefined
    if (!flags.includes('in-use')) {
      dirty = 0
      for await (const { length } of image.bitmaps.extents(nameBytes ?? name, { signal })) dirty += length
    }
    facts.push({ name: exactText(name, nameBytes), granularity, flags, dirty })
  }
  return facts
}
