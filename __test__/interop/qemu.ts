/** QEMU's tools, the judges. Tests that need them are skipped, visibly, where they are absent; with `QCOW2_REQUIRE_QEMU=1` they fail. */

import { execFileSync, spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { describe } from 'vitest'

const root = fileURLToPath(new URL('../..', import.meta.url))
const cli = join(root, 'dist', 'cli.js')

/** What a program printed and how it ended. */
export interface Ended {
  readonly code: number | null
  readonly stdout: string
  readonly stderr: string
}

function run(program: string, args: readonly string[]): Ended {
  const { status, stdout, stderr, error } = spawnSync(program, args, {
    encoding: 'utf8',
    env: { ...process.env, LC_ALL: 'C', PATH: `${process.env['PATH']}:/usr/sbin:/sbin` },
    maxBuffer: 2 ** 28,
  })
  if (error !== undefined) throw error
  return { code: status, stdout, stderr }
}

/** Runs qemu-img. */
export const qemuImg = (...args: string[]): Ended => run(process.env['QEMU_IMG_PROG'] ?? 'qemu-img', args)

/** Runs qemu-io. */
export const qemuIo = (...args: string[]): Ended => run(process.env['QEMU_IO_PROG'] ?? 'qemu-io', args)

/** Runs this package's command line. */
export const qcow2 = (...args: string[]): Ended => run(process.execPath, [cli, ...args])

/** The output of a program that must succeed. */
export function ok(ended: Ended): string {
  if (ended.code !== 0) throw new Error(`exit code ${ended.code}\n${ended.stdout}${ended.stderr}`)
  return ended.stdout
}

function installed(): boolean {
  try {
    return qemuImg('--version').code === 0
  } catch {
    return false
  }
}

const available = installed()
const required = !['', '0', undefined].includes(process.env['QCOW2_REQUIRE_QEMU'])
if (!available) {
  if (required) throw new Error('qemu-img is not installed and QCOW2_REQUIRE_QEMU is set')
  process.stderr.write('SKIPPED qemu-img is not installed: nothing is compared with QEMU\n')
}

/** A suite that needs QEMU. */
export const describeWithQemu = describe.skipIf(!available)

/** A folder that vanishes with the test process. */
export function temporaryFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'qcow2-interop-'))
  process.on('exit', () => rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** An image that QEMU wrote, and what its disk must contain. */
export interface Sample {
  readonly name: string
  readonly path: string
  /** A raw file with the guest's bytes. */
  readonly guest: string
  readonly snapshots: readonly { readonly name: string; readonly guest: string }[]
}

/** The bounded sample of the geometry matrix of `crates/testkit`; empty without QEMU. */
export function samples(): readonly Sample[] {
  if (!available) return []
  const folder = temporaryFolder()
  const args = ['run', '--quiet', '--package', 'qcow2-testkit', '--example', 'matrix', '--', folder]
  execFileSync('cargo', args, { cwd: root, stdio: ['ignore', 'ignore', 'inherit'] })
  return JSON.parse(readFileSync(join(folder, 'manifest.json'), 'utf8')) as Sample[]
}

/** Fails with the first difference; `expect` on megabytes would print them. */
export function assertSameBytes(expected: Uint8Array, actual: Uint8Array, what: string): void {
  if (expected.length !== actual.length) {
    throw new Error(`${what}: ${actual.length} bytes instead of ${expected.length}`)
  }
  const [a, b] = [Buffer.from(expected.buffer, expected.byteOffset, expected.length), Buffer.from(actual)]
  if (a.equals(b)) return
  const at = a.findIndex((byte, index) => byte !== b[index])
  throw new Error(`${what}: the first difference is at guest offset ${at}: ${a[at]} expected, ${b[at]} read`)
}

/** A raw ext4 image of 48 MiB with files in it, or undefined, with a visible line, where mke2fs is absent. */
export function fileSystemImage(folder: string): string | undefined {
  const path = join(folder, 'filesystem.raw')
  writeFileSync(path, '')
  truncateSync(path, 48 * 2 ** 20)
  try {
    const { code, stderr } = run('mke2fs', ['-q', '-F', '-t', 'ext4', '-d', join(root, 'src'), path])
    if (code === 0) return path
    throw new Error(stderr)
  } catch (error) {
    process.stderr.write(`SKIPPED mke2fs makes no file system here: ${error}\n`)
    return undefined
  }
}
