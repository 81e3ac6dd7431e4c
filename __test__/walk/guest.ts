/** What a guest does to the disk, by us and by QEMU, and what may happen to the process that has it open. */

import { copyFileSync, rmSync, writeFileSync } from 'node:fs'
import { check, type Image, open } from 'qcow2'
import { assertSameBytes, qemuIo } from '../interop/qemu.js'
import { bitmapChange, canRepair, compactTop, resize, snapshotChange, snapshotCreate } from './manage.js'
import { DIRTY, type Layer, MAYBE, Refused, readAll, type World } from './world.js'

/** One request of ours. */
async function request(world: World, image: Image, unmap: boolean): Promise<void> {
  const { top } = world
  const { clusterSize, dataFile } = world.shape
  const kind = world.draw(10)
  const compressed = kind >= (world.packed ? 5 : 8) && dataFile === undefined
  const range = world.range(compressed)
  if (range === undefined) return
  const [position, length] = range
  const where = `${position} ${length}`
  if (kind === 0) {
    const unmapped = world.chance(2)
    await world.ours(` writeZeroes ${where} ${unmapped}`, false, () =>
      image.writeZeroes(position, length, { unmap: unmapped }),
    )
    top.disk.fill(0, position, position + length)
    world.mark(position, length, DIRTY)
  } else if (kind === 1) {
    await world.ours(` discard ${where}`, false, () => image.discard(position, length))
    world.mark(position, length, MAYBE)
    await discarded(world, image, position, length, unmap)
  } else if (kind === 2) {
    await world.ours(' datasync', false, () => image.datasync())
  } else if (kind === 3) {
    const several = Array.from({ length: 4 }, () => world.range()).filter(each => each !== undefined)
    world.say(` writes at once ${several.join(' / ')}`)
    const disjoint = several.filter(([at, size], i) =>
      several.slice(0, i).every(([a, s]) => at + size <= a || a + s <= at),
    )
    await Promise.all(
      disjoint.map(async ([at, size]) => {
        const data = world.bytes(size)
        data.copy(top.disk, at)
        world.mark(at, size, DIRTY)
        await image.write(data, { position: at })
      }),
    )
  } else {
    const data = world.bytes(length)
    const whole = compressed && position % clusterSize === 0
    await world.ours(` write ${where} ${whole ? 'compressed' : ''}`, false, () =>
      image.write(data, { position, compressed: whole }),
    )
    data.copy(top.disk, position)
    world.mark(position, length, DIRTY)
  }
}

/** What was discarded is as before, or zero; without `unmap` it is as before. */
async function discarded(world: World, image: Image, position: number, length: number, unmap: boolean): Promise<void> {
  const now = await readAll(image)
  adoptDiscarded(world, now, position, length, unmap)
}

function adoptDiscarded(world: World, now: Buffer, position: number, length: number, unmap: boolean): void {
  const { disk } = world.top
  if (unmap) {
    for (let at = position; at < position + length; at++) if (now[at] === 0) disk[at] = 0
  }
  assertSameBytes(disk, now, 'after a discard')
}

/** An image open for writing here, and requests of a guest. */
export async function guestHere(world: World): Promise<void> {
  const { top } = world
  const { version } = world.shape
  const unmap = world.chance(2)
  const options = {
    flags: 'r+',
    references: 'allow',
    discard: unmap ? 'unmap' : 'ignore',
    detectZeroes: world.pick(['off', 'on', 'unmap'] as const),
    lazyRefcounts: version === 3 && world.chance(4),
    cache: world.pick(['writeback', 'writethrough', 'unsafe'] as const),
    ...(world.chance(4) && { l2CacheSize: 4096 }),
  } as const
  const image = await world.ours(`open ${top.path} ${JSON.stringify(options)}`, false, () => open(top.path, options))
  try {
    world.handle = image
    for (let n = 1 + world.draw(8); n > 0; n--) {
      if (!world.chance(6)) await request(world, image, unmap)
      else if (await among(world, image)) await compareOpen(world, image)
    }
    const end = world.draw(8)
    if (end === 0 && options.cache !== 'unsafe') return await killedHere(world, image, options.lazyRefcounts)
    if (end === 1) await cloned(world, image)
    if (end === 2 && world.layers.length < 4) await overlaid(world, image, unmap)
    if (world.chance(4)) await compareOpen(world, image)
  } finally {
    world.handle = undefined
    await image.close()
  }
}

async function compareOpen(world: World, image: Image): Promise<void> {
  assertSameBytes(world.top.disk, await readAll(image), 'the open disk')
}

/** What an administrator does while the guest runs; false where it was refused. */
async function among(world: World, image: Image): Promise<boolean> {
  const operation = world.pick([
    snapshotCreate,
    snapshotChange,
    snapshotChange,
    bitmapChange,
    resize,
    compactTop,
    meanwhile,
  ])
  try {
    await operation(world, image)
    return true
  } catch (error) {
    if (!(error instanceof Refused)) throw error
    world.say(` refused: ${error.message}`)
    return true
  }
}

/** A snapshot, or a compaction, with requests in flight. */
async function meanwhile(world: World, image: Image): Promise<void> {
  const { top } = world
  const { dataFile, refcountBits } = world.shape
  const ranges = Array.from({ length: 6 }, () => world.range()).filter(each => each !== undefined)
  const disjoint = ranges.filter(([at, size], i) => ranges.slice(0, i).every(([a, s]) => at + size <= a || a + s <= at))
  const name = `m${world.draw(2 ** 40)}`
  const snapshot = dataFile === undefined && refcountBits > 8 && world.chance(2)
  world.say(` meanwhile ${snapshot ? `snapshot create ${name}` : 'compact'}: writes ${disjoint.join(' / ')}`)
  const write = async ([at, size]: [number, number]): Promise<void> => {
    const data = world.bytes(size)
    data.copy(top.disk, at)
    world.mark(at, size, DIRTY)
    await image.write(data, { position: at })
  }
  const writes = disjoint.map(write)
  const other = snapshot ? image.snapshots.create(name) : image.compact({ mode: world.pick(['in-place', 'rewrite']) })
  const [made] = await Promise.all([other, ...writes])
  if ('id' in made) top.snapshots.push({ id: made.id, name, disk: undefined })
  else top.leaks = false
}

/** The process ends without closing: all that was flushed is there. */
async function killedHere(world: World, image: Image, lazy: boolean): Promise<void> {
  const { top } = world
  world.say(' killed')
  await image.datasync()
  const files = [top.path, ...(world.shape.dataFile === undefined ? [] : [world.shape.dataFile])]
  for (const file of files) copyFileSync(file, `${file}.killed`)
  await image.close()
  for (const file of files) {
    copyFileSync(`${file}.killed`, file)
    rmSync(`${file}.killed`)
  }
  await recovered(world, lazy)
}

/** Afterwards: leaks, bitmaps that nobody can rely on, and refcounts that were to be written later. */
async function recovered(world: World, lazy: boolean): Promise<void> {
  const { top } = world
  top.leaks = true
  const mode = lazy ? 'all' : 'leaks'
  const how = world.draw(lazy ? 3 : 5)
  if (how === 0) {
    await world.ours(`check, repair ${mode}`, false, () => check(top.path, { repair: mode }))
    top.leaks = false
  } else if (how === 1 && canRepair(top)) {
    world.img(false, 'check', '-q', '-f', 'qcow2', '-r', mode, top.path)
    top.leaks = false
  } else if (how <= 2) {
    await world.ours('opened and closed', false, async () => {
      await (await open(top.path, { flags: 'r+', references: 'allow' })).close()
    })
  }
  await dropBroken(world, top)
}

async function dropBroken(world: World, layer: Layer): Promise<void> {
  const image = await open(layer.path, { references: 'allow' })
  const list = await image.bitmaps.list()
  await image.close()
  for (const { name, flags } of list.filter(each => each.flags.includes('in-use'))) {
    layer.bitmaps.delete(name)
    if (world.chance(2)) world.img(false, 'bitmap', '-f', 'qcow2', '--remove', layer.path, name)
    else {
      await world.ours(`remove bitmap ${name} ${flags}`, false, async () => {
        const writable = await open(layer.path, { flags: 'r+', references: 'allow' })
        await writable.bitmaps.remove(name).finally(() => writable.close())
      })
    }
  }
}

/** A copy of one moment, while writes go on. */
async function cloned(world: World, image: Image): Promise<void> {
  const path = world.file('clone.qcow2')
  const compress = world.chance(2)
  const clusterSize = 2 ** (9 + world.draw(13))
  const moment = Buffer.from(world.top.disk)
  await world.ours(`clone ${path} ${compress} ${clusterSize}`, false, async () => {
    let begun = (): void => {}
    const start = new Promise<void>(resolve => {
      begun = resolve
    })
    const clone = image.clone(path, { to: 'qcow2', compress, create: { clusterSize }, onPointInTime: begun })
    await Promise.race([start, clone])
    for (let n = 3; n > 0; n--) {
      const range = world.range()
      if (range === undefined) break
      const data = world.bytes(range[1])
      await image.write(data, { position: range[0] })
      data.copy(world.top.disk, range[0])
      world.mark(...range, DIRTY)
    }
    await clone
  })
  assertSameBytes(moment, await world.read(path), 'the clone')
  assertSameBytes(moment, world.readByQemu(path), 'the clone, read by QEMU')
  await world.check(path, false)
}

/** A new layer on top, while the image is open. */
async function overlaid(world: World, image: Image, unmap: boolean): Promise<void> {
  const path = world.file('qcow2')
  const clusterSize = 2 ** (9 + world.draw(13))
  await world.ours(`createOverlay ${path} ${clusterSize}`, false, () =>
    image.createOverlay(path, { create: { clusterSize } }),
  )
  const shape = { version: 3, clusterSize, refcountBits: 16, extendedL2: false, zstd: false } as const
  const disk = Buffer.from(world.top.disk)
  world.layers.unshift({ path, shape, disk, snapshots: [], bitmaps: new Map(), leaks: false, stateBehind: false })
  for (let n = world.draw(4); n > 0; n--) await request(world, image, unmap)
}

/** A command of qemu-io, and what it does to the disk. */
interface Command {
  readonly text: string
  readonly position: number
  readonly length: number
  /** Undefined for a discard. */
  readonly data?: Buffer
  /** QEMU writes compressed data only where there is none. */
  readonly compressed?: boolean
}

function commandsOfQemu(world: World): Command[] {
  const { clusterSize, dataFile } = world.shape
  const kind = world.draw(8)
  const compressed = kind >= 6 && dataFile === undefined
  const range = world.range(compressed)
  if (range === undefined) return []
  const [position, length] = range
  if (kind === 0) {
    const how = world.chance(2) ? '-u' : ''
    return [{ text: `write -z ${how} ${position} ${length}`, position, length, data: Buffer.alloc(length) }]
  }
  if (kind === 1) return [{ text: `discard ${position} ${length}`, position, length }]
  const all = world.bytes(length)
  const write = (at: number, size: number, option: string): Command => {
    const data = all.subarray(at - position, at - position + size)
    const file = world.file('data')
    writeFileSync(file, data)
    return {
      text: `write ${option} -s ${file} ${at} ${size}`,
      position: at,
      length: size,
      data,
      compressed: option === '-c',
    }
  }
  if (!compressed || position % clusterSize > 0) return [write(position, length, '')]
  const commands: Command[] = []
  for (let at = position; at < position + length && commands.length < 20; at += clusterSize) {
    commands.push(write(at, Math.min(clusterSize, position + length - at), '-c'))
  }
  return commands
}

/** The same by qemu-io. */
export async function guestOfQemu(world: World): Promise<void> {
  // Seldom where QEMU does little: its processes take most of a walk's time.
  if (world.chance(2) && !world.theirs()) return guestHere(world)
  const { top } = world
  // What qemu-io does of itself, too.
  const unmap = ['-d', 'unmap']
  const cache = world.pick(['writeback', 'writethrough', 'unsafe'] as const)
  const commands: Command[] = []
  for (let n = 1 + world.draw(8); n > 0; n--) {
    commands.push(...commandsOfQemu(world))
    // What a discard leaves is seen before anything else is written.
    const last = commands.at(-1)
    if (last !== undefined && last.data === undefined) break
  }
  const killed = world.chance(10) && cache !== 'unsafe'
  const end = killed ? ['flush', 'sigraise 9'] : []
  const texts = [...commands.map(({ text }) => text), ...end].flatMap(text => ['-c', text])
  const args = ['-f', 'qcow2', '-t', cache, ...(world.chance(2) ? unmap : []), ...texts, top.path]
  world.say(`qemu-io ${args.join(' ')}`)
  const { stdout, stderr } = qemuIo(...args)
  const results = stdout
    .split('\n')
    .concat(stderr.split('\n'))
    .filter(line => /^(wrote|discard|write failed)/.test(line))
  if (results.length < commands.length) throw new Error(`qemu-io: ${stdout}${stderr}`)
  let discard: Command | undefined
  for (const [i, command] of commands.entries()) {
    const { position, length, data, compressed } = command
    const done = !results[i]?.includes('failed')
    if (!done && !compressed) throw new Error(`qemu-io: ${stdout}${stderr}`)
    if (done) data?.copy(top.disk, position)
    if (data === undefined) discard = command
    world.mark(position, length, data !== undefined && done ? DIRTY : MAYBE)
  }
  if (killed) await recovered(world, true)
  if (discard !== undefined) adoptDiscarded(world, await world.read(top.path), discard.position, discard.length, true)
}
