// What every line has: the two command lines, a folder, and inputs that are made when the first line asks for them.

import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { makeDisk } from './input.mjs'
import { trial } from './trial.mjs'

export const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..')
const CLI = join(root, 'dist', 'cli.js')
const QEMU_IMG = process.env.QEMU_IMG_PROG ?? 'qemu-img'
const QEMU_IO = process.env.QEMU_IO_PROG ?? 'qemu-io'

const version = program => spawnSync(program, ['--version'], { encoding: 'utf8' }).stdout?.split('\n')[0]

/** qemu-img's flags that make a convert fast: writes in any order, as many requests as it takes. */
export const FAST = ['-W', '-m', '8']

/** An encrypted image whose key takes no time: what is measured is the cipher. */
export const SECRET = ['--object', 'secret,id=s,data=secret']
export const ENCRYPT = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10'

export class Bench {
  #made = new Map()

  /** `options`: rounds, quick, cold, dataMiB, source (the folder whose files are converted), device (of the installation, else all). */
  constructor(options) {
    Object.assign(this, options)
    this.folder = mkdtempSync(join(process.env.QCOW2_BENCH_DIR ?? tmpdir(), 'qcow2-bench-'))
    this.qemu = version(QEMU_IMG)
  }

  at(name) {
    return join(this.folder, name)
  }

  say(text) {
    process.stderr.write(`${text}\n`)
  }

  /** A visible line about what cannot be measured here. */
  skip(text) {
    process.stderr.write(`SKIPPED ${text}\n`)
  }

  ours(...args) {
    return [process.execPath, CLI, ...args]
  }

  /** `undefined` where qemu-img is not installed: this side alone is measured. */
  theirs(...args) {
    return this.qemu && [QEMU_IMG, ...args]
  }

  qemuIo(...args) {
    return this.qemu && [QEMU_IO, ...args]
  }

  /** Another script of this folder, in a process of its own. */
  worker(name, ...args) {
    return [process.execPath, join(root, 'benchmark', 'workers', `${name}.mjs`), ...args]
  }

  /** Both command lines as the sides of a job, from `args`. */
  both(args) {
    const theirs = this.theirs(...args)
    return { qcow2: { argv: this.ours(...args) }, 'qemu-img': theirs && { argv: theirs } }
  }

  once(name, make) {
    if (!this.#made.has(name)) this.#made.set(name, make())
    return this.#made.get(name)
  }

  /** A raw disk with real files, of which `data` of `dataMiB` is data: what plain jobs copy. */
  disk() {
    return this.once('disk', () => makeDisk(this, 'disk.raw', this.dataMiB))
  }

  /** A quarter of it, for jobs that compute. */
  part() {
    return this.once('part', () => makeDisk(this, 'part.raw', Math.ceil(this.dataMiB / 4)))
  }

  /** An image of `source` in another form, as qemu-img makes it where it is there: both sides read what QEMU wrote. */
  image(name, source, ...flags) {
    return this.once(name, () => {
      const args = ['-f', 'raw', ...flags, source, this.at(name)]
      trial(this.theirs('convert', ...FAST, ...args) ?? this.ours('convert', '-q', ...args))
      return this.at(name)
    })
  }

  /** An image whose clusters are all mapped, as big as a large disk. */
  mapped(name = 'mapped.qcow2') {
    const size = this.quick ? '1G' : '1T'
    trial(this.ours('create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', this.at(name), size))
    return this.at(name)
  }

  /** The path of an example of a Rust crate, built. To see that nothing rots, what the tests have built will do. */
  example(name) {
    return this.once(`example ${name}`, () => {
      const target = process.env.CARGO_TARGET_DIR ?? join(root, 'target')
      const path = profile => join(target, profile, 'examples', name)
      if (this.quick && existsSync(path('debug'))) return path('debug')
      const profile = this.quick ? [] : ['--release']
      const args = ['build', '--quiet', ...profile, '-p', 'qcow2-engine', '--example', name]
      const { status } = spawnSync('cargo', args, { stdio: ['ignore', 2, 2], cwd: root })
      if (status !== 0) throw new Error(`the example ${name} does not build`)
      return path(this.quick ? 'debug' : 'release')
    })
  }

  close() {
    rmSync(this.folder, { recursive: true, force: true })
  }
}
