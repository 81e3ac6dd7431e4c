// The demonstration that a bare `npm start` runs: a file-system image becomes a compressed qcow2 image and comes back.
import { spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, mkdtempSync, opendirSync, rmSync, statfsSync, statSync } from 'node:fs'
import { open as openFile } from 'node:fs/promises'
import { createRequire } from 'node:module'
import { cpus, tmpdir } from 'node:os'
import { dirname, join, relative } from 'node:path'
import { root, run } from './lib.mjs'

const require = createRequire(import.meta.url)
const { compare, convert, open } = require('../dist/index.js')
const { SingleBar } = require('cli-progress')

const MIB = 1024 * 1024
const MOST_FILES = 20_000
const mib = bytes => `${(bytes / MIB).toFixed(1)} MiB`
const print = line => process.stdout.write(`${line}\n`)

/** Copies regular files from `sources` below `target` until `budget` bytes are there. Links and what is unreadable stay out. */
function collect(sources, target, budget) {
  let total = 0
  let files = 0
  const waiting = sources.filter(existsSync)
  while (waiting.length > 0 && total < budget && files < MOST_FILES) {
    const folder = waiting.shift()
    let entries
    try {
      entries = opendirSync(folder)
    } catch {
      continue
    }
    let entry = entries.readSync()
    for (; entry && total < budget && files < MOST_FILES; entry = entries.readSync()) {
      const path = join(folder, entry.name)
      if (entry.isDirectory()) waiting.unshift(path)
      if (!entry.isFile()) continue
      try {
        if (statSync(path).size > budget / 8) continue
        const to = join(target, relative('/', path))
        mkdirSync(dirname(to), { recursive: true })
        cpSync(path, to)
        total += Math.ceil(statSync(to).size / 4096) * 4096
        files++
      } catch {
        // Not ours to read: the next one will do.
      }
    }
    entries.closeSync()
  }
  return { total, files }
}

/** An ext4 file system filled with files of this machine; false where mke2fs is missing. */
function makeFileSystem(path, folder, size) {
  const mke2fs = ['mke2fs', '/sbin/mke2fs', '/usr/sbin/mke2fs'].find(name => !spawnSync(name, ['-V']).error)
  if (!mke2fs || process.platform !== 'linux') return false
  const staging = join(folder, 'files')
  mkdirSync(staging)
  const { total, files } = collect(
    ['/usr/share', '/usr/lib', '/usr/bin', dirname(process.execPath)],
    staging,
    size * 0.55,
  )
  const made = spawnSync(mke2fs, ['-q', '-F', '-t', 'ext4', '-d', staging, path, `${size / MIB}M`], {
    encoding: 'utf8',
  })
  rmSync(staging, { recursive: true })
  if (made.status !== 0) return false
  print(`disk.raw: an ext4 file system of ${mib(size)} with ${files} files of this machine, ${mib(total)}`)
  return true
}

/** Where no file system can be made: text, records, noise and holes in turn. */
async function makeStructured(path, size) {
  const file = await openFile(path, 'w')
  const block = Buffer.alloc(MIB)
  let state = 1
  const random = () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0)
  for (let at = 0, n = 0; at < size; at += MIB, n++) {
    if (n % 8 > 4) continue // a hole
    if (n % 8 === 4) for (let i = 0; i < MIB; i += 4) block.writeUInt32LE(random(), i)
    else if (n % 2)
      for (let i = 0; i < MIB; i += 32) block.write(`record ${random() % 9999} of volume ${n}`.padEnd(32), i)
    else for (let i = 0; i < MIB; i += 16) block.writeBigUInt64LE(BigInt(at + i), i)
    await file.write(block, 0, MIB, at)
  }
  await file.truncate(size)
  await file.close()
  print(`disk.raw: ${mib(size)} of text, records, noise and holes (no file system could be made)`)
}

/** Whether two files hold the same bytes, compared by Node alone. */
async function sameBytes(one, two) {
  const [a, b] = [await openFile(one), await openFile(two)]
  const [left, right] = [Buffer.alloc(4 * MIB), Buffer.alloc(4 * MIB)]
  try {
    if ((await a.stat()).size !== (await b.stat()).size) return false
    for (let at = 0; ; ) {
      const { bytesRead } = await a.read(left, 0, left.length, at)
      await b.read(right, 0, right.length, at)
      if (bytesRead === 0) return true
      if (left.compare(right, 0, bytesRead, 0, bytesRead) !== 0) return false
      at += bytesRead
    }
  } finally {
    await Promise.all([a.close(), b.close()])
  }
}

/** Runs one conversion under a progress bar; gives its speed over the whole virtual size. */
async function timed(label, source, target, options) {
  const bar = new SingleBar({
    format: `  ${label} {bar} {percentage}% | {done} of {all}`,
    barsize: 32,
    hideCursor: true,
    noTTYOutput: true,
    notTTYSchedule: 1000,
    emptyOnZero: true,
  })
  let started = false
  const begin = performance.now()
  await convert(source, target, {
    ...options,
    progressInterval: 50,
    onProgress: ({ current, total }) => {
      const shown = { done: mib(current), all: mib(total) }
      if (started) bar.update(current, shown)
      else bar.start(total, current, shown)
      started = true
    },
  })
  const seconds = (performance.now() - begin) / 1000
  if (started) bar.stop()
  const virtual = Math.max(statSync(source).size, statSync(target).size)
  print(`  ${label} ${seconds.toFixed(2)} s, ${(virtual / MIB / seconds).toFixed(0)} MiB/s`)
}

/** A second opinion, where QEMU's own tool is installed. */
function askQemu(raw, image) {
  for (const args of [
    ['compare', '-f', 'raw', '-F', 'qcow2', raw, image],
    ['check', '-q', image],
  ]) {
    const { error, status, stdout, stderr } = spawnSync('qemu-img', args, { encoding: 'utf8' })
    if (error) return
    if (status !== 0) throw new Error(`qemu-img ${args[0]} ended with ${status}: ${stdout}${stderr}`)
  }
  print('  verified: qemu-img compare and qemu-img check say the same')
}

const folder = mkdtempSync(join(tmpdir(), 'qcow2-demo-'))
const clean = () => rmSync(folder, { recursive: true, force: true })
for (const [signal, code] of [
  ['SIGINT', 130],
  ['SIGTERM', 143],
]) {
  process.once(signal, () => {
    clean()
    process.exit(code)
  })
}

try {
  const { bavail, bsize } = statfsSync(folder)
  const size = (bavail * bsize > 2048 * MIB ? 512 : 128) * MIB
  const [raw, image, back] = ['disk.raw', 'disk.qcow2', 'back.raw'].map(name => join(folder, name))
  print(`In ${folder}, removed at the end; ${cpus().length} cores, Node ${process.versions.node}`)
  if (!makeFileSystem(raw, folder, size)) await makeStructured(raw, size)

  print('\nConvert to compressed qcow2, and back to raw:')
  await timed('raw -> qcow2', raw, image, { from: 'raw', to: 'qcow2', compress: true })
  await timed('qcow2 -> raw', image, back, { from: 'qcow2', to: 'raw' })

  if (!(await sameBytes(raw, back))) throw new Error('the bytes that came back differ')
  const { identical } = await compare(raw, image, { formatA: 'raw' })
  if (!identical) throw new Error('compare finds a difference between disk.raw and disk.qcow2')
  print('  verified: every byte came back, and compare finds the images identical')

  const opened = await open(image)
  const result = await opened.check()
  await opened.close()
  if (!result.ok) throw new Error(`check finds the image damaged: ${JSON.stringify(result)}`)
  print('  verified: check finds no errors and no leaks')
  askQemu(raw, image)

  print('\nSizes:')
  for (const path of [raw, image, back]) {
    const { size: length, blocks } = statSync(path)
    print(
      `  ${relative(folder, path).padEnd(10)} ${mib(length).padStart(10)}, on disk ${mib(blocks * 512).padStart(10)}`,
    )
  }
  print('\nWhere the data is (qcow2 map --picture disk.qcow2):')
  const code = await run(process.execPath, [join(root, 'dist/cli.js'), 'map', '--picture', image])
  if (code !== 0) throw new Error(`qcow2 map ended with ${code}`)
  print('\nTry your own: npm start -- convert -c -O qcow2 DISK.raw DISK.qcow2')
} catch (error) {
  process.stderr.write(`qcow2: ${error.code ? `${error.code}: ` : ''}${error.message}\n`)
  process.exitCode = 1
} finally {
  clean()
}
