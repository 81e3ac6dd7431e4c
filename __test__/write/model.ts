/** What a disk must contain after random changes, and the changes. */

import { createHash } from 'node:crypto'
import type { Image } from 'qcow2'
import { assertSameBytes } from '../interop/qemu.js'

/** Deterministic numbers below `bound`. */
export function* numbers(seed: string): Generator<(bound: number) => number, never> {
  for (let i = 0; ; i++) {
    const value = createHash('sha256').update(`${seed}/${i}`).digest().readUIntBE(0, 6)
    yield bound => value % bound
  }
}

/** Draws from `numbers`. */
export function drawer(seed: string): (bound: number) => number {
  const source = numbers(seed)
  return bound => source.next().value(bound)
}

/** A disk in memory that goes through the same changes as an image. */
export class Model {
  bytes: Buffer
  readonly #draw: (bound: number) => number
  #mark = 0

  constructor(bytes: Buffer, seed: string) {
    this.bytes = Buffer.from(bytes)
    this.#draw = drawer(seed)
  }

  /** A range of the disk: often aligned to sectors or clusters, often small. */
  range(): [position: number, length: number] {
    const draw = this.#draw
    const unit = [1, 512, 4096, 65536][draw(4)] ?? 1
    const position = Math.floor(draw(this.bytes.length) / unit) * unit
    const length = Math.ceil((1 + draw([600, 9000, 70_000, 300_000][draw(4)] ?? 1)) / unit) * unit
    return [position, Math.min(length, this.bytes.length - position)]
  }

  /** One random change of `image`, made here too. */
  async change(image: Image): Promise<void> {
    const [position, length] = this.range()
    switch (this.#draw(8)) {
      case 0:
        await image.writeZeroes(position, length, { unmap: this.#draw(2) === 0 })
        this.bytes.fill(0, position, position + length)
        return
      case 1: {
        const part = Buffer.alloc(Math.ceil(length / 3), this.#next())
        const buffers = [part, part.subarray(0, Math.floor(length / 3)), Buffer.alloc(1, this.#next())]
        const all = Buffer.concat(buffers).subarray(0, length)
        await image.writev([all.subarray(0, all.length >> 1), all.subarray(all.length >> 1)], position)
        all.copy(this.bytes, position)
        return
      }
      case 2:
        return this.#compare(image, position, length)
      case 3:
        return this.#draw(3) === 0 ? image.datasync() : this.#compare(image, position, length)
      default: {
        const data = Buffer.alloc(length, this.#next())
        const { bytesWritten } = await image.write(data, { position })
        if (bytesWritten !== length) throw new Error(`${bytesWritten} of ${length} bytes written`)
        data.copy(this.bytes, position)
      }
    }
  }

  async #compare(image: Image, position: number, length: number): Promise<void> {
    const { buffer } = await image.read(Buffer.alloc(length, 0xa5), { position })
    assertSameBytes(this.bytes.subarray(position, position + length), buffer, `${length} bytes at ${position}`)
  }

  /** Compares the whole disk. */
  async compare(image: Image): Promise<void> {
    await this.#compare(image, 0, this.bytes.length)
  }

  #next(): number {
    this.#mark = (this.#mark % 250) + 1
    return this.#mark
  }
}
