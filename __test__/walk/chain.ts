/** Chains: overlays, commit, rebase, and images that are made of the top, by us and by QEMU. */

import { readFileSync, writeFileSync } from 'node:fs'
import { commit, convert, create, rebase } from 'qcow2'
import { assertSameBytes } from '../interop/qemu.js'
import { createOf, formatOf, layerOf, newLayer, optionsOf, randomShape, randomSize, SECTOR } from './layers.js'
import type { World } from './world.js'

/** An empty layer over the top. */
export async function overlay(world: World): Promise<void> {
  const below = world.top
  const { dataFileRaw: _, ...shape } = randomShape(world)
  const path = world.file('qcow2')
  const other = world.chance(2)
  const size = other ? randomSize(world, shape) : below.disk.length
  if (world.theirs()) {
    const sizes = other ? [String(size)] : []
    world.img(
      false,
      'create',
      '-q',
      '-f',
      'qcow2',
      '-b',
      below.path,
      '-F',
      formatOf(below),
      '-o',
      optionsOf(shape),
      path,
      ...sizes,
    )
  } else {
    await world.ours(`create ${path} on ${below.path} ${size} ${optionsOf(shape)}`, false, async () => {
      const options = {
        ...createOf(shape),
        backingFile: below.path,
        backingFormat: formatOf(below),
        references: 'allow',
      } as const
      await (await create(path, { ...options, ...(other && { size }) })).close()
    })
  }
  const disk = Buffer.alloc(size)
  below.disk.copy(disk)
  world.layers.unshift(layerOf(path, shape, disk))
}
export async function commitTop(world: World): Promise<void> {
  if (world.layers.length < 2) return
  const { top } = world
  const depth = world.layers.length > 2 && world.chance(4) ? 2 : 1
  const base = world.layers[depth]
  if (base === undefined) return
  const drop = depth > 1 || world.chance(3)
  const grows = base.disk.length < top.disk.length
  const mayRefuse = (grows && base.shape?.version === 2 && base.snapshots.length > 0) || (grows && base.stateBehind)
  // QEMU cannot write zeroes to an image of version 2 with a backing file.
  if (!(grows && base.stateBehind) && base.shape?.version !== 2 && world.theirs()) {
    const how = [...(drop ? ['-d'] : []), ...(depth > 1 ? ['-b', base.path] : [])]
    world.img(mayRefuse, 'commit', '-q', '-f', 'qcow2', ...how, top.path)
  } else {
    await world.ours(`commit ${depth} ${drop}`, mayRefuse, () =>
      commit(top.path, { references: 'allow', drop, ...(depth > 1 && { base: base.path }) }),
    )
  }
  world.resized(base, Math.max(base.disk.length, top.disk.length))
  const committed = base.disk
  top.disk.copy(committed)
  if (depth > 1) {
    // What the layers between do not have reads differently in them now, and in their snapshots.
    base.disk = await world.adopt(base.path, formatOf(base))
    const middle = world.layers[1]
    if (middle !== undefined) middle.disk = await world.adopt(middle.path, formatOf(middle))
  } else assertSameBytes(committed, await world.read(base.path, formatOf(base)), 'the base')
  for (const layer of world.layers.slice(0, depth)) for (const each of layer.snapshots) each.disk = undefined
  world.unsure(base)
  world.unsure(top)
}

export async function rebaseTop(world: World): Promise<void> {
  const { top, layers } = world
  const compressed = world.shape.dataFile === undefined && world.chance(3)
  const kind = world.draw(4)
  if (kind === 0 && layers.length > 1) {
    // The same contents in another file.
    const [, below] = layers
    if (below === undefined) return
    const path = world.file('raw')
    writeFileSync(path, below.disk)
    if (world.theirs()) world.img(false, 'rebase', '-u', '-f', 'qcow2', '-b', path, '-F', 'raw', top.path)
    else {
      await world.ours(`rebase unsafe ${path}`, false, () =>
        rebase(top.path, path, { backingFormat: 'raw', unsafe: true, acknowledgeDataLoss: true, references: 'allow' }),
      )
    }
    world.layers = [top, layerOf(path, undefined, Buffer.from(below.disk))]
  } else {
    const none = kind === 1
    if (none && layers.length === 1) return
    if (world.shape.dataFileRaw) return
    const size = world.chance(2) ? top.disk.length : randomSize(world, world.shape)
    const base = none ? undefined : await newLayer(world, size, true)
    if (base !== undefined && base.shape === undefined && world.chance(2)) {
      // Much that is the same.
      top.disk.copy(base.disk, 0, 0, world.draw(base.disk.length + 1))
      writeFileSync(base.path, base.disk)
    }
    const options = { compress: compressed, detectZeroes: world.chance(2), references: 'allow' } as const
    // QEMU fails an assertion of its own where it compresses into subclusters.
    // And zeroes of version 2 with no backing file before read what is below afterwards.
    const theirs = !(compressed && world.shape.extendedL2) && (world.shape.version === 3 || layers.length > 1)
    if (theirs && world.theirs()) {
      const onto = base === undefined ? ['-b', ''] : ['-b', base.path, '-F', formatOf(base)]
      world.img(false, 'rebase', '-q', '-f', 'qcow2', ...(compressed ? ['-c'] : []), ...onto, top.path)
    } else if (base === undefined) await world.ours('rebase null', false, () => rebase(top.path, null, options))
    else {
      await world.ours(`rebase ${base.path} ${JSON.stringify(options)}`, false, () =>
        rebase(top.path, base.path, { ...options, backingFormat: formatOf(base) }),
      )
    }
    world.layers = base === undefined ? [top] : [top, base]
  }
  for (const snapshot of top.snapshots) snapshot.disk = undefined
  world.unsure(top)
}

/** The top is given up. */
export async function dropTop(world: World): Promise<void> {
  if (world.layers[1]?.shape === undefined) return
  world.say('the top is given up')
  world.layers.shift()
}

/** A new image of the disk, or of a snapshot, which may take the place of the old one. */
export async function convertTop(world: World): Promise<void> {
  const { top, layers } = world
  const snapshot = top.snapshots.length > 0 && world.chance(3) ? world.pick(top.snapshots) : undefined
  if (snapshot !== undefined) snapshot.disk ??= await world.adopt(top.path, 'qcow2', snapshot.id)
  const disk = snapshot?.disk ?? top.disk
  const shape = randomShape(world)
  const base = snapshot === undefined && world.chance(3) && !shape.dataFileRaw ? layers[1] : undefined
  const bitmaps = top.bitmaps.size > 0 && shape.version === 3 && snapshot === undefined && world.chance(2)
  const compress = shape.dataFile === undefined && world.chance(2)
  const path = world.file('qcow2')
  // QEMU reads a snapshot with the size of the disk.
  if (disk.length === top.disk.length && world.theirs()) {
    const args = [...(compress ? ['-c'] : []), ...(bitmaps ? ['--bitmaps'] : [])]
    if (snapshot !== undefined) args.push('-l', `snapshot.id=${snapshot.id}`)
    if (base !== undefined) args.push('-B', base.path, '-F', formatOf(base))
    world.img(false, 'convert', '-f', 'qcow2', '-O', 'qcow2', ...args, '-o', optionsOf(shape), top.path, path)
  } else {
    const onto = base && { backingFile: base.path, backingFormat: formatOf(base) }
    await world.ours(
      `convert ${path} ${JSON.stringify({ compress, bitmaps, snapshot: snapshot?.id, base: base?.path, shape })}`,
      false,
      () =>
        convert(top.path, path, {
          to: 'qcow2',
          references: 'allow',
          compress,
          bitmaps,
          create: { ...createOf(shape), ...onto },
          ...(base !== undefined && { base: base.path }),
          ...(snapshot !== undefined && { snapshot: snapshot.id }),
        }),
    )
  }
  const made = layerOf(path, shape, Buffer.from(disk))
  assertSameBytes(disk, await world.read(path), 'the new image')
  await world.check(path, false)
  if (!world.chance(2)) return
  if (bitmaps) made.bitmaps = top.bitmaps
  world.say('it takes the place of the top')
  world.layers = base === undefined ? [made] : [made, ...layers.slice(1)]
}

/** The disk goes into an image that exists, or a part of it into a new one. */
export async function convertInto(world: World): Promise<void> {
  const { top } = world
  const { disk } = top
  if (world.chance(3)) {
    const [start = 0, length = 0] = world.range() ?? []
    const path = world.file('part.raw')
    await world.ours(`convert a part ${start} ${length}`, false, () =>
      convert(top.path, path, { to: 'raw', references: 'allow', start, length }),
    )
    const expected = Buffer.alloc(Math.ceil(length / SECTOR) * SECTOR)
    disk.copy(expected, 0, start, start + length)
    assertSameBytes(expected, readFileSync(path), 'a part')
    return
  }
  if (world.chance(3)) return ddTop(world)
  if (world.chance(3)) return deltaTop(world)
  const target = await newLayer(world, disk.length + SECTOR * world.draw(400), false)
  const compress = target.shape?.dataFile === undefined && world.chance(3)
  // QEMU does not write compressed data over other data.
  if (world.theirs())
    world.img(
      compress,
      'convert',
      '-n',
      ...(compress ? ['-c'] : []),
      '-f',
      'qcow2',
      '-O',
      'qcow2',
      top.path,
      target.path,
    )
  else {
    await world.ours(`convert into ${target.path} ${compress}`, false, () =>
      convert(top.path, target.path, { to: 'qcow2', references: 'allow', existingTarget: true, compress }),
    )
  }
  disk.copy(target.disk)
  assertSameBytes(target.disk, await world.read(target.path), 'the target')
  assertSameBytes(target.disk, world.readByQemu(target.path), 'the target, read by QEMU')
  await world.check(target.path, false)
  if (!world.chance(3)) return
  world.say('it takes the place of the top')
  world.layers = [target]
}

/** The same blocks, by both. */
async function ddTop(world: World): Promise<void> {
  const { path } = world.top
  const size = world.pick([512, 1000, 4096, 65536])
  const part = [
    `bs=${size}`,
    `skip=${world.draw(20)}`,
    ...(world.chance(2) ? [`count=${world.draw(Math.ceil(500_000 / size) + 20)}`] : []),
  ]
  const [ours, theirs] = [world.file('ours'), world.file('theirs')]
  const args = ['dd', '-f', 'qcow2', '-O', 'raw', ...part, `if=${path}`]
  world.img(false, ...args, `of=${theirs}`)
  await world.cli(...args, `of=${ours}`)
  assertSameBytes(readFileSync(theirs), readFileSync(ours), 'dd')
}

/** What the base lacks goes into an empty image over it. */
async function deltaTop(world: World): Promise<void> {
  const { top, layers } = world
  const [, base] = layers
  if (base === undefined) return
  const { dataFileRaw: _, ...shape } = randomShape(world)
  const path = world.file('qcow2')
  const size = top.disk.length
  world.img(
    false,
    'create',
    '-q',
    '-f',
    'qcow2',
    '-b',
    base.path,
    '-F',
    formatOf(base),
    '-o',
    optionsOf(shape),
    path,
    String(size),
  )
  if (world.theirs()) {
    const compress = shape.dataFile === undefined && world.chance(2)
    world.img(
      false,
      'convert',
      '-n',
      ...(compress ? ['-c'] : []),
      '-f',
      'qcow2',
      '-O',
      'qcow2',
      '-B',
      base.path,
      top.path,
      path,
    )
  } else {
    await world.ours(`convert what ${base.path} lacks into ${path}`, false, () =>
      convert(top.path, path, { to: 'qcow2', references: 'allow', existingTarget: true, base: base.path }),
    )
  }
  assertSameBytes(top.disk, await world.read(path), 'the delta')
  assertSameBytes(top.disk, world.readByQemu(path), 'the delta, read by QEMU')
  await world.check(path, false)
  if (!world.chance(2)) return
  world.say('it takes the place of the top')
  world.layers = [layerOf(path, shape, Buffer.from(top.disk)), ...layers.slice(1)]
}
