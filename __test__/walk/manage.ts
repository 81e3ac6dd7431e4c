/** What an administrator does to an image, by us and by QEMU. */

import { readFileSync, statSync } from 'node:fs'
import { amend, check, compact, type Image, open } from 'qcow2'
import { assertSameBytes, qemuImg } from '../interop/qemu.js'
import { randomSize, SECTOR } from './layers.js'
import { CLEAN, DIRTY, type Layer, MAYBE, type World } from './world.js'

/** Opens the top for writing, does something, and closes it. */
async function writable<T>(
  world: World,
  what: string,
  mayRefuse: boolean,
  work: (image: Image) => Promise<T>,
): Promise<T> {
  const { handle } = world
  return world.ours(what, mayRefuse, async () => {
    if (handle !== undefined) return work(handle)
    const image = await open(world.top.path, { flags: 'r+', references: 'allow' })
    try {
      return await work(image)
    } finally {
      await image.close()
    }
  })
}
/** Mostly short; a long one makes tables that fill clusters. */
const randomName = (world: World): string => `n${world.draw(2 ** 40)}${'x'.repeat(world.pick([0, 0, world.draw(230)]))}`

export async function snapshotCreate(world: World): Promise<void> {
  const { top } = world
  const { refcountBits, dataFile } = world.shape
  const name = randomName(world)
  const mayRefuse = dataFile !== undefined || refcountBits <= 8
  const before = top.disk
  let state: { byte: number; length: number } | undefined
  const simple = !mayRefuse && !top.stateBehind && world.handle === undefined
  if (simple && world.chance(4)) {
    state = { byte: 1 + world.draw(255), length: SECTOR * (1 + world.draw(400)) }
    world.io('-f', 'qcow2', '-c', `write -b -P ${state.byte} 0 ${state.length}`, top.path)
    top.stateBehind = true
  }
  let id: string | undefined
  if (refcountBits > 8 && dataFile === undefined && world.theirs()) {
    world.img(mayRefuse, 'snapshot', '-c', name, top.path)
    await using image = await open(top.path, { references: 'allow' })
    id = (await image.snapshots.find(name))?.id
  } else id = (await writable(world, `snapshot create ${name}`, mayRefuse, image => image.snapshots.create(name))).id
  if (id === undefined) throw new Error(`there is no snapshot ${name}`)
  if (state !== undefined) sayState(world, top.snapshots.length, state.length)
  top.snapshots.push({ id, name, disk: Buffer.from(before), ...(state && { state }) })
}

/** Writes the length of the VM state into the table, as QEMU does when it saves a machine. */
function sayState(world: World, index: number, length: number): void {
  const { path } = world.top
  let at = Number(world.peek(path, 64, 8).readBigUInt64BE())
  for (let i = 0; i < index; i++) {
    const head = world.peek(path, at, 40)
    at += Math.ceil((40 + head.readUInt32BE(36) + head.readUInt16BE(12) + head.readUInt16BE(14)) / 8) * 8
  }
  const bytes = Buffer.alloc(8)
  bytes.writeUInt32BE(length, 0)
  world.poke(path, at + 32, bytes.subarray(0, 4))
  if (world.peek(path, at, 40).readUInt32BE(36) >= 8) {
    bytes.writeBigUInt64BE(BigInt(length))
    world.poke(path, at + 40, bytes)
  }
}

export async function snapshotChange(world: World): Promise<void> {
  const { top } = world
  if (top.snapshots.length === 0) return
  const snapshot = world.pick(top.snapshots)
  const { id } = snapshot
  const kind = world.draw(5)
  if (kind === 0) {
    const name = `r${world.draw(2 ** 40)}`
    await writable(world, `snapshot rename ${id} ${name}`, false, image => image.snapshots.rename(id, name))
    snapshot.name = name
    return
  }
  const theirs = world.theirs()
  if (kind <= 2) {
    if (theirs) world.img(false, 'snapshot', '-d', snapshot.name, top.path)
    else await writable(world, `snapshot delete ${id}`, false, image => image.snapshots.delete(id))
    top.snapshots = top.snapshots.filter(each => each !== snapshot)
    return
  }
  if (snapshot.disk === undefined && world.handle !== undefined) return
  snapshot.disk ??= await world.adopt(top.path, 'qcow2', id)
  const resizes = snapshot.disk.length !== top.disk.length
  const narrow = world.shape.refcountBits <= 8
  if (theirs && !narrow && !resizes)
    world.img(world.shape.version === 2 || top.bitmaps.size > 0, 'snapshot', '-a', snapshot.name, top.path)
  else await writable(world, `snapshot apply ${id}`, narrow || resizes, image => image.snapshots.apply(id))
  world.resized(top, snapshot.disk.length)
  top.disk = Buffer.from(snapshot.disk)
  top.stateBehind ||= snapshot.state !== undefined
  for (const bitmap of top.bitmaps.values()) bitmap.marks.fill(MAYBE)
}

export async function bitmapChange(world: World): Promise<void> {
  const { top } = world
  const { bitmaps } = top
  const names = [...bitmaps.keys()]
  const theirs = world.theirs() && top.disk.length > 0
  const run = async (option: string, args: string[], what: (image: Image) => Promise<void>): Promise<void> => {
    const [name = '', ...rest] = args
    if (theirs) world.img(false, 'bitmap', '-f', 'qcow2', option, ...rest, top.path, name)
    else await writable(world, `bitmap ${option} ${args.join(' ')}`, top.disk.length === 0, what)
  }
  if (names.length < 3 && world.chance(2)) {
    if (world.shape.version === 2) return
    const name = randomName(world)
    const granularity = 2 ** (9 + world.draw(world.pick([2, 8, 14])))
    await run('--add', [name, '-g', String(granularity)], image => image.bitmaps.add(name, { granularity }))
    bitmaps.set(name, { granularity, enabled: true, marks: new Uint8Array(Math.ceil(top.disk.length / granularity)) })
    return
  }
  if (names.length === 0) return
  const name = world.pick(names)
  const bitmap = bitmaps.get(name)
  const other = world.pick(names)
  const source = bitmaps.get(other)
  if (bitmap === undefined || source === undefined) return
  switch (world.draw(5)) {
    case 0:
      await run('--clear', [name], image => image.bitmaps.clear(name))
      bitmap.marks.fill(CLEAN)
      return
    case 1:
      await run('--remove', [name], image => image.bitmaps.remove(name))
      bitmaps.delete(name)
      return
    case 2:
      await run('--enable', [name], image => image.bitmaps.enable(name))
      bitmap.enabled = true
      return
    case 3:
      await run('--disable', [name], image => image.bitmaps.disable(name))
      bitmap.enabled = false
      return
    default: {
      if (other === name) return
      await run('--merge', [name, other], image => image.bitmaps.merge(name, [other]))
      for (const [i, mark] of source.marks.entries()) {
        if (mark === CLEAN) continue
        const from = Math.floor((i * source.granularity) / bitmap.granularity)
        const to = Math.min(bitmap.marks.length, Math.ceil(((i + 1) * source.granularity) / bitmap.granularity))
        for (let j = from; j < to; j++) if (bitmap.marks[j] !== DIRTY) bitmap.marks[j] = mark
      }
    }
  }
}

export async function resize(world: World): Promise<void> {
  const { top } = world
  const { version, extendedL2 } = world.shape
  const now = top.disk.length
  const nearby = Math.max(0, now + SECTOR * (world.draw(200) - 100))
  const size = world.chance(2) ? nearby : randomSize(world, world.shape)
  if (size === now) return
  const mayRefuse = version === 2 && top.snapshots.length > 0
  const preallocation = size > now && world.chance(3) ? world.pick(['metadata', 'falloc', 'full'] as const) : 'off'
  const overBacking = world.layers.length > 1
  // QEMU cannot write zeroes to an image of version 2 over a longer backing file.
  const refuses =
    mayRefuse ||
    ((version === 2 || extendedL2) && overBacking) ||
    (size === 0 && top.bitmaps.size > 0) ||
    (preallocation !== 'off' && overBacking)
  // QEMU does not look at the VM state behind the end of a disk that grows.
  // Nor, where it preallocates, at compressed data in the cluster that the end is in.
  const whole = preallocation === 'off' || now % world.shape.clusterSize === 0
  const theirs =
    world.theirs() &&
    whole &&
    !top.stateBehind &&
    size > 0 &&
    !(world.shape.dataFileRaw && preallocation === 'metadata')
  if (theirs) {
    const how = [
      ...(size < now ? ['--shrink'] : []),
      ...(preallocation === 'off' ? [] : [`--preallocation=${preallocation}`]),
    ]
    world.img(refuses, 'resize', '-q', '-f', 'qcow2', ...how, top.path, String(size))
  } else {
    const options = { shrink: size < now, ...(preallocation !== 'off' && { preallocation }) }
    await writable(world, `truncate ${size} ${JSON.stringify(options)}`, refuses, image =>
      image.truncate(size, options),
    )
  }
  world.resized(top, size)
}

export async function compactTop(world: World): Promise<void> {
  const { top } = world
  const options = {
    mode: world.pick(['in-place', 'rewrite'] as const),
    zeroes: world.chance(2),
    dryRun: world.chance(5),
  }
  const files = [top.path, ...(world.shape.dataFile === undefined ? [] : [world.shape.dataFile])]
  const before = options.dryRun && world.handle === undefined ? files.map(file => readFileSync(file)) : []
  const result = await world.ours(`compact ${JSON.stringify(options)}`, false, () =>
    world.handle === undefined ? compact(top.path, { ...options, references: 'allow' }) : world.handle.compact(options),
  )
  if (options.dryRun) {
    for (const [i, bytes] of before.entries()) assertSameBytes(bytes, readFileSync(files[i] ?? ''), 'after a dry run')
    return
  }
  top.leaks = false
  const length = statSync(top.path).size
  if (world.handle === undefined && result.fileLengthAfter !== length)
    throw new Error(`compact: ${JSON.stringify(result)}, length ${length}`)
}

export async function amendTop(world: World): Promise<void> {
  const { top, shape } = world
  const kind = world.draw(4)
  const theirs = world.theirs()
  if (kind === 0) {
    const version = shape.version === 2 ? 3 : 2
    const fits =
      shape.refcountBits === 16 &&
      !shape.extendedL2 &&
      !shape.zstd &&
      shape.dataFile === undefined &&
      top.bitmaps.size === 0
    if (version === 2 && !fits) return
    // QEMU refuses snapshots of another size, or with a size at all.
    const mayRefuse = version === 2 && top.snapshots.length > 0
    if (theirs) world.img(mayRefuse, 'amend', '-f', 'qcow2', '-o', `compat=${version === 2 ? '0.10' : '1.1'}`, top.path)
    else await world.ours(`amend version ${version}`, mayRefuse, () => amend(top.path, { version }))
    shape.version = version
  } else if (kind === 1) {
    if (shape.version === 2) return
    const refcountBits = world.pick([1, 2, 4, 8, 16, 32, 64] as const)
    // QEMU looks at each refcount that a block has room for.
    if (theirs && shape.clusterSize <= 16384)
      world.img(refcountBits <= 8, 'amend', '-f', 'qcow2', '-o', `refcount_bits=${refcountBits}`, top.path)
    else
      await world.ours(`amend refcount_bits ${refcountBits}`, refcountBits <= 8, () =>
        amend(top.path, { refcountBits }),
      )
    shape.refcountBits = refcountBits
  } else if (kind === 2) {
    if (shape.version === 2) return
    const lazyRefcounts = world.chance(2)
    if (theirs)
      world.img(false, 'amend', '-f', 'qcow2', '-o', `lazy_refcounts=${lazyRefcounts ? 'on' : 'off'}`, top.path)
    else await world.ours(`amend lazy_refcounts ${lazyRefcounts}`, false, () => amend(top.path, { lazyRefcounts }))
  } else {
    const size = top.disk.length + SECTOR * world.draw(300)
    const overBacking = (shape.version === 2 || shape.extendedL2) && world.layers.length > 1
    const mayRefuse = overBacking || (shape.version === 2 && top.snapshots.length > 0)
    if (theirs && !top.stateBehind) world.img(mayRefuse, 'amend', '-f', 'qcow2', '-o', `size=${size}`, top.path)
    else await world.ours(`amend size ${size}`, mayRefuse, () => amend(top.path, { size, references: 'allow' }))
    world.resized(top, size)
  }
}
/** Whether QEMU can: it loses the snapshots of an image that has bitmaps when it opens it for a repair. */
export const canRepair = ({ bitmaps, snapshots }: Layer): boolean => bitmaps.size === 0 || snapshots.length === 0

/** Refcounts that are wrong, and a repair. */
export async function damage(world: World): Promise<void> {
  const { top } = world
  const { clusterSize } = world.shape
  const header = world.peek(top.path, 48, 12)
  const table = Number(header.readBigUInt64BE())
  const blocks: number[] = []
  const entries = world.peek(top.path, table, header.readUInt32BE(8) * clusterSize)
  for (let at = 0; at < entries.length; at += 8) {
    const block = Number(entries.readBigUInt64BE(at))
    blocks.push(block)
  }
  const index = world.draw(blocks.length)
  const block = blocks[index] ?? 0
  // Behind the end of the file nobody looks.
  const clusters =
    Math.ceil(statSync(top.path).size / clusterSize) - (index * clusterSize * 8) / world.shape.refcountBits
  const inUse = Math.min(clusterSize, Math.floor((clusters * world.shape.refcountBits) / 8))
  if (inUse < 1 || block === 0) return
  const at = world.draw(inUse)
  const wrong = Buffer.alloc(1 + world.draw(Math.min(8, inUse - at)), world.draw(256))
  world.say(`refcounts ${wrong.toString('hex')} at ${block + at}`)
  world.poke(top.path, block + at, wrong)
  if (world.chance(3) && canRepair(top)) {
    world.say('qemu-img check -r all')
    const { code, stdout, stderr } = qemuImg('check', '-f', 'qcow2', '-r', 'all', top.path)
    if (code !== 0) throw new Error(`qemu-img check -r all: ${code} ${stdout}${stderr}`)
  } else {
    const repaired = await world.ours('check repair all', false, () => check(top.path, { repair: 'all' }))
    if (!repaired.ok) throw new Error(`repair: ${JSON.stringify(repaired)}`)
  }
  top.leaks = false
}
