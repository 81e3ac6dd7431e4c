/** Images that a random walk goes through, and what each must read as. */

import { closeSync, copyFileSync, openSync, readFileSync, readSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { PassThrough } from 'node:stream'
import { type CheckResult, check, type Image, open } from 'qcow2'
import { assertSameBytes, type Ended, ok, qemuImg, qemuIo } from '../interop/qemu.js'
import { drawer } from '../write/model.js'

/** The geometry of a qcow2 image. */
export interface Shape {
  version: 2 | 3
  readonly clusterSize: number
  refcountBits: number
  readonly extendedL2: boolean
  readonly zstd: boolean
  readonly dataFile?: string
  readonly dataFileRaw?: boolean
}

export interface Snapshot {
  readonly id: string
  name: string
  /** Undefined where what is below the image has changed since. */
  disk: Buffer | undefined
  /** The byte that its VM state is made of, and how much there is. */
  readonly state?: { readonly byte: number; readonly length: number }
}

/** Of each granule: clean, dirty, or nobody says. */
export const CLEAN = 0
export const DIRTY = 1
export const MAYBE = 2

export interface Bitmap {
  readonly granularity: number
  enabled: boolean
  marks: Uint8Array
}

/** One file of the chain. */
export interface Layer {
  readonly path: string
  /** Undefined: a raw file. */
  readonly shape: Shape | undefined
  disk: Buffer
  snapshots: Snapshot[]
  bitmaps: Map<string, Bitmap>
  /** A process was killed: leaked clusters are no fault. */
  leaks: boolean
  /** The L1 table of the active disk may have VM state behind its end. */
  stateBehind: boolean
}

/** A failure of an operation that may be refused. */
export class Refused extends Error {}

const require = createRequire(import.meta.url)

export class World {
  readonly draw: (bound: number) => number
  readonly seed: string
  readonly #folder: string
  readonly steps: string[] = []
  /** From the top down. */
  layers: Layer[] = []
  /** The top, where a session of ours has it open for writing: nobody else can change it then. */
  handle: Image | undefined
  /** Much compressed data of all lengths in small clusters. */
  readonly packed: boolean
  #files = 0
  #noise: number
  /** One in how many operations is QEMU's. */
  readonly #rare: number

  constructor(seed: string, folder: string) {
    this.seed = seed
    this.#folder = folder
    this.draw = drawer(seed)
    this.packed = this.chance(4)
    this.#rare = this.pick([2, 2, 8])
    this.#noise = (this.draw(2 ** 31) | 1) >>> 0
  }

  get top(): Layer {
    const [top] = this.layers
    if (top === undefined) throw new Error('there is no image')
    return top
  }

  /** The shape of the top, which is always qcow2. */
  get shape(): Shape {
    const { shape } = this.top
    if (shape === undefined) throw new Error('the top is raw')
    return shape
  }

  chance(one: number): boolean {
    return this.draw(one) === 0
  }

  /** Whether QEMU does it. */
  theirs(): boolean {
    return this.chance(this.#rare) && this.handle === undefined
  }

  pick<T>(from: readonly T[]): T {
    return from[this.draw(from.length)] as T
  }

  file(suffix: string): string {
    return join(this.#folder, `${++this.#files}.${suffix}`)
  }

  say(step: string): void {
    this.steps.push(step)
    if (process.env['QCOW2_WALK_TRACE']) process.stderr.write(`${step}\n`)
  }

  /** Bytes of one of many kinds: what compresses well, a little, not at all, or to any length. */
  bytes(length: number): Buffer {
    const kind = this.draw(6)
    const buffer = Buffer.alloc(length, kind === 5 ? 0 : 1 + this.draw(255))
    if (kind <= 1 && !this.packed) return buffer
    if ((kind === 2 && !this.packed) || kind === 5) return this.#scramble(buffer, 0, length)
    // Pieces of noise, so that each cluster compresses to a length of its own.
    for (let at = 0; at < length; ) {
      const unit = this.packed ? 512 << this.draw(3) : this.pick([512, 4096, 65536, 1 << 21])
      this.#scramble(buffer, at, Math.min(length, at + 1 + this.draw(unit)))
      at += unit
    }
    return buffer
  }

  #scramble(buffer: Buffer, from: number, to: number): Buffer {
    for (let at = from; at < to; at++) {
      this.#noise ^= this.#noise << 13
      this.#noise ^= this.#noise >>> 17
      this.#noise ^= this.#noise << 5
      buffer[at] = this.#noise & 0xff
    }
    return buffer
  }

  /** A range of the disk, not empty; undefined for a disk of no bytes. */
  range(aligned = false): [position: number, length: number] | undefined {
    const { length: size } = this.top.disk
    if (size === 0) return undefined
    const { clusterSize } = this.shape
    const unit = aligned ? clusterSize : this.pick([1, 512, Math.max(1, clusterSize / 32), clusterSize])
    const position = Math.floor(this.draw(size) / unit) * unit
    const most = this.pick([1, 2000, clusterSize, 8 * clusterSize, Math.ceil(size / 3)])
    const length = Math.ceil((1 + this.draw(most)) / unit) * unit
    return [position, Math.min(length, size - position)]
  }

  /** Marks what a change of the guest must, or may, make dirty. */
  mark(position: number, length: number, how: typeof DIRTY | typeof MAYBE): void {
    if (length === 0) return
    for (const { granularity, enabled, marks } of this.top.bitmaps.values()) {
      if (!enabled) continue
      for (let i = Math.floor(position / granularity); i <= Math.floor((position + length - 1) / granularity); i++) {
        if (marks[i] !== DIRTY) marks[i] = how
      }
    }
  }

  /** The disk has another size: what is new in bitmaps nobody says. */
  resized(layer: Layer, size: number): void {
    const { length } = layer.disk
    if (size === length) return
    const disk = Buffer.alloc(size)
    layer.disk.copy(disk)
    layer.disk = disk
    for (const bitmap of layer.bitmaps.values()) {
      const marks = new Uint8Array(Math.ceil(size / bitmap.granularity)).fill(MAYBE)
      const kept = Math.floor(Math.min(size, length) / bitmap.granularity)
      marks.set(bitmap.marks.subarray(0, kept))
      if (bitmap.marks[kept] === DIRTY && size > length) marks[kept] = DIRTY
      bitmap.marks = marks
    }
  }

  unsure(layer: Layer): void {
    for (const { marks } of layer.bitmaps.values()) {
      for (const [i, mark] of marks.entries()) if (mark === CLEAN) marks[i] = MAYBE
    }
  }

  /** Runs qemu-img. What fails is refused where that is fine, else an error. */
  img(mayRefuse: boolean, ...args: string[]): string {
    this.say(`qemu-img ${args.join(' ')}`)
    return this.#judge(qemuImg(...args), mayRefuse)
  }

  io(...args: string[]): string {
    this.say(`qemu-io ${args.join(' ')}`)
    return this.#judge(qemuIo(...args), false)
  }

  #judge(ended: Ended, mayRefuse: boolean): string {
    if (ended.code !== 0 && mayRefuse) throw new Refused(ended.stderr.trim())
    return ok(ended)
  }

  /** Runs one of our own operations. */
  async ours<T>(what: string, mayRefuse: boolean, work: () => Promise<T>): Promise<T> {
    this.say(what)
    try {
      return await work()
    } catch (error) {
      if (mayRefuse && error instanceof Error && 'code' in error && error.code !== 'ERR_QCOW2_INTERNAL') {
        throw new Refused(`${error.code}: ${error.message}`)
      }
      throw error
    }
  }

  /** Runs our command line in this process. */
  async cli(...args: string[]): Promise<string> {
    const { runProgram } = require('../../dist/cli/program.js')
    const { Objects } = require('../../dist/cli/secrets.js')
    const { Output } = require('../../dist/cli/session.js')
    const [out, err] = [new PassThrough(), new PassThrough()]
    const [stdout, stderr] = [new Output(out), new Output(err)]
    const texts = [out, err].map(async stream => {
      let text = ''
      for await (const part of stream) text += part
      return text
    })
    const code = await runProgram(args, {
      program: 'qemu-img',
      stdout,
      stderr,
      env: {},
      signal: new AbortController().signal,
      objects: new Objects(),
    })
    stdout.flush()
    stderr.flush()
    out.end()
    err.end()
    const [text = '', complaint] = await Promise.all(texts)
    if (code !== 0) throw new Error(`qcow2 ${args.join(' ')}: ${code}: ${complaint}`)
    return text
  }

  /** The whole disk, as we read it. */
  async read(path: string, format: 'qcow2' | 'raw' = 'qcow2', snapshot?: string): Promise<Buffer> {
    await using image = await open(path, { format, references: 'allow', ...(snapshot !== undefined && { snapshot }) })
    return await readAll(image)
  }

  /** The whole disk, as QEMU reads it. */
  readByQemu(path: string, format: 'qcow2' | 'raw' = 'qcow2', snapshot?: string): Buffer {
    const raw = join(this.#folder, 'read.raw')
    const which = snapshot === undefined ? [] : ['-l', `snapshot.id=${snapshot}`]
    ok(qemuImg('convert', '-f', format, '-O', 'raw', ...which, path, raw))
    return readFileSync(raw)
  }

  /** Takes over what a layer reads as where nobody can say; both tools must agree. */
  async adopt(path: string, format: 'qcow2' | 'raw' = 'qcow2', snapshot?: string): Promise<Buffer> {
    const disk = await this.read(path, format, snapshot)
    if (snapshot !== undefined && disk.length !== this.top.disk.length) return disk
    assertSameBytes(this.readByQemu(path, format, snapshot), disk, `${path} ${snapshot}: read by QEMU and by us`)
    return disk
  }

  async verify(thorough: boolean): Promise<void> {
    await this.check(this.top.path, this.top.leaks)
    const { path, disk } = this.top
    assertSameBytes(disk, await this.read(path), 'the disk')
    await this.#verifyBitmaps()
    if (!thorough) return
    assertSameBytes(disk, this.readByQemu(path), 'the disk, read by QEMU')
    await this.#verifySnapshots()
    await this.#verifyDescriptions()
    this.#verifyDataFile()
    for (const layer of this.layers.slice(1)) {
      const format = layer.shape === undefined ? 'raw' : 'qcow2'
      assertSameBytes(layer.disk, await this.read(layer.path, format), `the layer ${layer.path}`)
      if (layer.shape !== undefined) await this.check(layer.path, layer.leaks)
    }
  }

  /** Both checks, which must count alike. */
  async check(path: string, leaks: boolean): Promise<void> {
    const found = await check(path)
    const wrong = found.corruptions + found.checkErrors + (leaks ? 0 : found.leaks)
    if (wrong > 0) throw new Error(`check: ${JSON.stringify(found, undefined, 1)}`)
    if (!this.chance(this.#rare)) return
    const ended = qemuImg('check', '-f', 'qcow2', '--output=json', path)
    if (ended.code !== 0 && !(ended.code === 3 && leaks))
      throw new Error(`qemu-img check: ${ended.code} ${ended.stdout}${ended.stderr}`)
    const theirs = JSON.parse(ended.stdout)
    const counters: readonly [keyof CheckResult, string][] = [
      ['leaks', 'leaks'],
      ['totalClusters', 'total-clusters'],
      ['allocatedClusters', 'allocated-clusters'],
      ['fragmentedClusters', 'fragmented-clusters'],
      ['compressedClusters', 'compressed-clusters'],
      ['imageEndOffset', 'image-end-offset'],
    ]
    for (const [our, their] of counters) {
      if (found[our] !== (theirs[their] ?? 0))
        throw new Error(`check: ${our} ${found[our]}, qemu-img's ${theirs[their] ?? 0}`)
    }
  }

  async #verifySnapshots(): Promise<void> {
    const { path, snapshots, disk } = this.top
    for (const snapshot of snapshots) {
      const { id, name, state } = snapshot
      snapshot.disk ??= await this.adopt(path, 'qcow2', id)
      assertSameBytes(snapshot.disk, await this.read(path, 'qcow2', id), `snapshot ${name}`)
      // QEMU reads a snapshot with the size of the disk.
      if (snapshot.disk.length === disk.length && this.chance(2))
        assertSameBytes(snapshot.disk, this.readByQemu(path, 'qcow2', id), `snapshot ${name}, read by QEMU`)
      // QEMU applies none where there are bitmaps.
      if (state === undefined || this.top.bitmaps.size > 0) continue
      const scratch = join(this.#folder, 'state.qcow2')
      copyFileSync(path, scratch)
      ok(qemuImg('snapshot', '-a', id, scratch))
      const read = qemuIo('-f', 'qcow2', '-c', `read -b -P ${state.byte} 0 ${state.length}`, scratch)
      if (/failed/.test(ok(read))) throw new Error(`the VM state of ${name}: ${read.stdout}`)
    }
    const listed = (
      await open(path, { references: 'allow' }).then(async image => {
        const { snapshots } = await image.info()
        await image.close()
        return snapshots
      })
    ).map(({ id, name }) => `${id} ${name}`)
    const expected = snapshots.map(({ id, name }) => `${id} ${name}`)
    if (listed.join() !== expected.join()) throw new Error(`snapshots ${listed.join()}, not ${expected.join()}`)
  }

  async #verifyBitmaps(): Promise<void> {
    const { path, bitmaps, disk } = this.top
    await using image = await open(path, { references: 'allow' })
    const listed = await image.bitmaps.list()
    if (
      listed
        .map(({ name }) => name)
        .sort()
        .join() !== [...bitmaps.keys()].sort().join()
    ) {
      throw new Error(`bitmaps ${JSON.stringify(listed)}, not ${[...bitmaps.keys()].join()}`)
    }
    for (const [name, { granularity, enabled, marks }] of bitmaps) {
      const info = listed.find(each => each.name === name)
      if (info?.granularity !== granularity || info.flags.includes('auto') !== enabled) {
        throw new Error(`bitmap ${name}: ${JSON.stringify(info)}, not ${granularity} ${enabled}`)
      }
      const dirty = new Uint8Array(marks.length)
      for await (const { start, length } of image.bitmaps.extents(name)) {
        if (start % granularity > 0 || length === 0 || start + length > disk.length) {
          throw new Error(`bitmap ${name}: dirty ${start} ${length}`)
        }
        dirty.fill(1, start / granularity, Math.ceil((start + length) / granularity))
      }
      for (const [i, mark] of marks.entries()) {
        if (mark !== MAYBE && mark !== dirty[i])
          throw new Error(`bitmap ${name}: granule ${i} of ${granularity} is ${dirty[i]}, not ${mark}`)
        // What it says now is what it says until something changes.
        marks[i] = dirty[i] ?? CLEAN
      }
    }
  }

  async #verifyDescriptions(): Promise<void> {
    const { path } = this.top
    for (const args of [
      ['map', '-f', 'qcow2', '--output=json', path],
      ['measure', '-f', 'qcow2', '-O', 'qcow2', '--output=json', path],
      ['info', '-f', 'qcow2', '--output=json', path],
    ]) {
      const [ours, theirs] = [await this.cli(...args), ok(qemuImg(...args))]
      if (ours !== theirs && JSON.stringify(JSON.parse(ours)) !== JSON.stringify(JSON.parse(theirs))) {
        throw new Error(`${args[0]}:\n${ours}\nqemu-img's:\n${theirs}`)
      }
    }
  }

  #verifyDataFile(): void {
    const { shape, disk } = this.top
    if (!shape?.dataFileRaw || shape.dataFile === undefined) return
    const raw = readFileSync(shape.dataFile)
    assertSameBytes(disk, raw.subarray(0, disk.length), 'the raw data file')
  }

  /** Writes a number into a file. */
  poke(path: string, at: number, bytes: Uint8Array): void {
    const file = readFileSync(path)
    file.set(bytes, at)
    writeFileSync(path, file)
  }

  peek(path: string, at: number, length: number): Buffer {
    const buffer = Buffer.alloc(length)
    const file = openSync(path, 'r')
    readSync(file, buffer, 0, length, at)
    closeSync(file)
    return buffer
  }
}

export async function readAll(image: Image): Promise<Buffer> {
  const disk = Buffer.alloc(image.virtualSize, 0xa5)
  if (disk.length > 0) await image.read(disk, { position: 0 })
  return disk
}
