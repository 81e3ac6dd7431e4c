/** New images of the geometries that a walk goes through, and what is in them. */

import { writeFileSync } from 'node:fs'
import { convert } from 'qcow2'
import type { Layer, Shape, World } from './world.js'

export const SECTOR = 512

export function randomShape(world: World): Shape {
  if (world.packed) {
    const clusterSize = world.pick([512, 512, 1024, 2048, 4096])
    return {
      version: 3,
      clusterSize,
      refcountBits: world.pick([4, 8, 16, 16, 32]),
      extendedL2: false,
      zstd: world.chance(3),
    }
  }
  const clusterSize = world.pick([512, 512, 1024, 4096, 65536, 65536, 2 ** 21])
  const extendedL2 = world.chance(5)
  const version = !extendedL2 && world.chance(5) ? 2 : 3
  const dataFile = version === 3 && world.chance(7) ? world.file('data-file') : undefined
  return {
    version,
    clusterSize: extendedL2 ? world.pick([16384, 16384, 65536, 2 ** 21]) : clusterSize,
    refcountBits: version === 3 ? world.pick([1, 2, 4, 8, 16, 16, 16, 32, 64]) : 16,
    extendedL2,
    zstd: version === 3 && world.chance(3),
    ...(dataFile !== undefined && { dataFile, dataFileRaw: world.chance(2) }),
  }
}

export function randomSize(world: World, { clusterSize }: Pick<Shape, 'clusterSize'>): number {
  const most = Math.min(Math.max(clusterSize * 300, 300_000), 5 * 2 ** 20)
  const size = world.pick([
    0,
    SECTOR,
    clusterSize - SECTOR,
    clusterSize,
    world.draw(most),
    world.draw(most),
    world.draw(most),
    world.draw(most),
    world.draw(most),
    world.draw(2 * most),
    world.draw(8 * 2 ** 20),
  ])
  return Math.ceil(size / SECTOR) * SECTOR
}

export const optionsOf = (shape: Shape): string =>
  [
    `compat=${shape.version === 2 ? '0.10' : '1.1'}`,
    `cluster_size=${shape.clusterSize}`,
    ...(shape.version === 3
      ? [`refcount_bits=${shape.refcountBits}`, `extended_l2=${shape.extendedL2 ? 'on' : 'off'}`]
      : []),
    ...(shape.zstd ? ['compression_type=zstd'] : []),
    ...(shape.dataFile === undefined
      ? []
      : [`data_file=${shape.dataFile},data_file_raw=${shape.dataFileRaw ? 'on' : 'off'}`]),
  ].join(',')

export const createOf = (shape: Shape) => ({
  version: shape.version,
  clusterSize: shape.clusterSize,
  ...(shape.version === 3 && { refcountBits: shape.refcountBits as 16, extendedL2: shape.extendedL2 }),
  ...(shape.zstd && { compressionType: 'zstd' as const }),
  ...(shape.dataFile !== undefined && { dataFile: shape.dataFile, dataFileRaw: shape.dataFileRaw ?? false }),
})

export const layerOf = (path: string, shape: Shape | undefined, disk: Buffer): Layer => ({
  path,
  shape,
  disk,
  snapshots: [],
  bitmaps: new Map(),
  leaks: false,
  stateBehind: false,
})

export const formatOf = (layer: Layer): 'qcow2' | 'raw' => (layer.shape === undefined ? 'raw' : 'qcow2')

/** A disk that has pieces of data in it. */
function patchwork(world: World, size: number): Buffer {
  const disk = Buffer.alloc(size)
  for (let n = world.draw(6); n > 0 && size > 0; n--) {
    const at = world.draw(size)
    world.bytes(Math.min(size - at, 1 + world.draw(size))).copy(disk, at)
  }
  return disk
}

/** A layer with contents and nothing below it. */
export async function newLayer(world: World, size: number, mayBeRaw: boolean): Promise<Layer> {
  const disk = patchwork(world, size)
  const raw = world.file('raw')
  writeFileSync(raw, disk)
  if (mayBeRaw && world.chance(2)) return layerOf(raw, undefined, disk)
  const shape = randomShape(world)
  const path = world.file('qcow2')
  const compressed = shape.dataFile === undefined && (world.packed || world.chance(2))
  if (world.theirs()) {
    world.img(
      false,
      'convert',
      '-f',
      'raw',
      '-O',
      'qcow2',
      ...(compressed ? ['-c'] : []),
      '-o',
      optionsOf(shape),
      raw,
      path,
    )
  } else {
    await world.ours(`convert ${raw} ${path} ${compressed} ${optionsOf(shape)}`, false, () =>
      convert(raw, path, { from: 'raw', to: 'qcow2', compress: compressed, create: createOf(shape) }),
    )
  }
  return layerOf(path, shape, disk)
}
