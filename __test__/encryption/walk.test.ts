/**
 * Random histories of encrypted images, opened again and again, against a disk in memory; QEMU reads and checks what came of them.
 * `QCOW2_WALK_SEEDS` makes more and longer ones, from `QCOW2_TEST_SEED` on.
 */

import { rmSync } from 'node:fs'
import { expect, it } from 'vitest'
import { commit, compact, convert, create, type Encrypt, type Image, open, rebase } from '../../dist/index.js'
import { describeWithQemu, ok, qemuIo } from '../interop/qemu.js'
import { drawer, Model } from '../write/model.js'
import { encryptedDisks, MIB, object, SECRET } from './disks.js'

const { at, described, holds } = encryptedDisks()
const many = Number(process.env['QCOW2_WALK_SEEDS'] ?? 0)
const first = Number(process.env['QCOW2_TEST_SEED'] ?? 1)
const [count, steps] = many > 0 ? [many, 25] : [3, 10]

const secret = { secret: SECRET, allowWeak: true } as const
const references = 'allow' as const
const NAME = 'walk.qcow2'
const SHAPES = [
  {},
  { clusterSize: 4096 },
  { extendedL2: true },
  { version: 2, clusterSize: 16_384 },
  { clusterSize: 512, preallocation: 'metadata' },
] as const
const KEYS: readonly Encrypt[] = [
  { secret: SECRET, iterTime: 5 },
  { format: 'aes', secret: SECRET, allowWeak: true },
  { secret: SECRET, iterTime: 5, cipherAlg: 'aes-128', cipherMode: 'cbc', allowWeak: true },
]

class Walk {
  readonly #draw: (bound: number) => number
  readonly #model: Model
  readonly #seed: string
  /** Snapshots by their names. */
  readonly #frozen = new Map<string, Buffer>()
  #number = 0

  constructor(seed: string) {
    this.#seed = seed
    this.#draw = drawer(`encrypted ${seed}`)
    this.#model = new Model(Buffer.alloc(2 * MIB), seed)
  }

  #pick<T>(from: readonly T[]): T {
    return from[this.#draw(from.length)] as T
  }

  #open(): Promise<Image> {
    return open(at(NAME), { flags: 'r+', discard: this.#pick(['ignore', 'unmap']), secret, references })
  }

  async #guest(image: Image): Promise<void> {
    for (let n = 0; n < 6; n++) await this.#model.change(image)
  }

  async #managed(image: Image): Promise<void> {
    const [name] = this.#frozen.keys()
    if (name === undefined || this.#draw(3) === 0) {
      const own = `snapshot ${++this.#number}`
      await image.snapshots.create(own)
      this.#frozen.set(own, Buffer.from(this.#model.bytes))
    } else if (this.#draw(2) === 0) {
      await image.snapshots.apply(name)
      this.#model.bytes = Buffer.from(this.#frozen.get(name) ?? Buffer.alloc(0))
    } else {
      await image.snapshots.delete(name)
      this.#frozen.delete(name)
    }
  }

  async #resized(image: Image): Promise<void> {
    // Snapshots of version 2 do not say the size of their disk.
    if (this.#frozen.size > 0) return
    const size = 512 * (2000 + this.#draw(3000))
    const grows = size > this.#model.bytes.length
    const preallocation = grows ? this.#pick(['off', 'metadata', 'falloc', 'full'] as const) : 'off'
    await image.truncate(size, { shrink: true, preallocation })
    const bytes = Buffer.alloc(size)
    this.#model.bytes.copy(bytes)
    this.#model.bytes = bytes
  }

  /** By way of another file, which takes the image's place or goes into it. */
  async #moved(): Promise<void> {
    const other = at('other.qcow2')
    const encrypt = this.#pick(KEYS)
    if (this.#draw(2) === 0) {
      await convert(at(NAME), other, { to: 'qcow2', secret, create: { ...this.#pick(SHAPES), encrypt } })
      await convert(other, at(NAME), { to: 'qcow2', secret, overwrite: true, create: { encrypt: this.#pick(KEYS) } })
      this.#frozen.clear()
    } else {
      {
        await using image = await this.#open()
        await image.createOverlay(other, { create: { encrypt } })
        await this.#guest(image)
      }
      if (this.#draw(2) === 0) await commit(other, { secret, references })
      else {
        await rebase(other, null, { secret, references })
        await convert(other, at(NAME), { to: 'qcow2', secret, overwrite: true, create: { encrypt } })
        this.#frozen.clear()
      }
    }
    rmSync(other)
  }

  #byQemu(): void {
    const [position, length] = this.#model.range()
    const byte = 1 + this.#draw(255)
    ok(qemuIo(...object(), '-c', `write -P ${byte} ${position} ${length}`, '--image-opts', described(NAME)))
    this.#model.bytes.fill(byte, position, position + length)
  }

  async step(): Promise<string> {
    const kind = this.#draw(8)
    if (kind === 0) await this.#moved()
    else if (kind === 1) this.#byQemu()
    else if (kind === 2) await compact(at(NAME), { mode: this.#pick(['in-place', 'rewrite']), zeroes: true, secret })
    else {
      await using image = await this.#open()
      await this.#guest(image)
      if (kind <= 4) await this.#managed(image)
      if (kind === 5) await this.#resized(image)
      await this.#guest(image)
    }
    return `${this.#seed}: step ${kind}`
  }

  async run(): Promise<void> {
    const shape = this.#pick(SHAPES)
    const made = { ...shape, size: this.#model.bytes.length, encrypt: this.#pick(KEYS), overwrite: true }
    await (await create(at(NAME), made)).close()
    for (let n = 0; n < steps; n++) {
      const what = await this.step()
      await using image = await open(at(NAME), { secret: SECRET })
      const bytes = (await image.read(Buffer.alloc(image.virtualSize), { position: 0 })).buffer
      expect(bytes.equals(this.#model.bytes), `${what}, ${n + 1} of ${steps}`).toBe(true)
    }
    await holds(NAME, this.#model.bytes)
    for (const [snapshot, disk] of this.#frozen) {
      await using image = await open(at(NAME), { secret: SECRET, snapshot })
      const bytes = (await image.read(Buffer.alloc(image.virtualSize), { position: 0 })).buffer
      expect(bytes.equals(disk), `${this.#seed}: ${snapshot}`).toBe(true)
    }
  }
}

describeWithQemu('encrypted images keep their contents', () => {
  it.each(Array.from({ length: count }, (_, n) => String(first + n)))('seed %s', { timeout: 600_000 }, seed =>
    new Walk(seed).run(),
  )
})
