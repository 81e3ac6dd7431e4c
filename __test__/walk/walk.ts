/** A walk at random: an image, and operations on it by both tools. */

import * as chain from './chain.js'
import { guestHere, guestOfQemu } from './guest.js'
import { newLayer, randomSize } from './layers.js'
import * as manage from './manage.js'
import { Refused, World } from './world.js'

type Operation = (world: World) => Promise<void>

const OPERATIONS: readonly (readonly [number, Operation])[] = [
  [6, guestHere],
  [5, guestOfQemu],
  [3, manage.snapshotCreate],
  [4, manage.snapshotChange],
  [4, manage.bitmapChange],
  [3, manage.resize],
  [4, manage.compactTop],
  [3, manage.amendTop],
  [2, chain.commitTop],
  [2, chain.rebaseTop],
  [1, chain.dropTop],
  [2, chain.convertTop],
  [1, chain.convertInto],
  [1, manage.damage],
]

async function start(world: World): Promise<void> {
  const size = randomSize(world, { clusterSize: world.pick([512, 4096, 65536, 2 ** 21]) })
  const bases = world.pick([0, 0, 0, 1, 1, 2])
  world.layers = [await newLayer(world, size, bases > 0)]
  for (let n = 0; n < bases; n++) await chain.overlay(world)
}

/** Walks; an error has the steps that led to it. */
export async function walk(seed: string, folder: string, steps: number): Promise<void> {
  const world = new World(seed, folder)
  const all = OPERATIONS.flatMap(([weight, operation]) => Array.from({ length: weight }, () => operation))
  try {
    await start(world)
    await world.verify(true)
    for (let n = 0; n < steps; n++) {
      const operation = world.layers.length < 4 && world.chance(25) ? chain.overlay : world.pick(all)
      try {
        await operation(world)
      } catch (error) {
        if (!(error instanceof Refused)) throw error
        world.say(`refused: ${error.message}`)
      }
      await world.verify(n + 1 === steps || world.chance(3))
    }
  } catch (error) {
    throw new Error(`seed ${seed}:\n${world.steps.join('\n')}\n${error instanceof Error ? error.stack : error}`)
  }
}
