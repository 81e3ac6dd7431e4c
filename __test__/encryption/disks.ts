/** Encrypted disks for tests: what both tools read of them, and whether a mark can be seen in their files. */

import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect } from 'vitest'
import { check, type Image, open, type Secrets } from '../../dist/index.js'
import { temporaryFolder } from '../api/fixtures.js'
import { ok, qemuImg } from '../interop/qemu.js'

export const MIB = 1 << 20
export const SECRET = 'a secret that is long enough'
/** Nothing that compresses, repeats or is zero. */
const MARKER = Buffer.from('PLAIN-MARKER-0123456789-abcdefgh')

/** Marked bytes for a place of the disk: each mark lies on a multiple of its length there. */
export function marked(length: number, position = 0): Buffer {
  const front = position % MARKER.length
  return Buffer.alloc(front + length, MARKER).subarray(front)
}

export const hasMark = (path: string): boolean => readFileSync(path).includes(MARKER)

/** `--object` for a secret, as both command lines take it. */
export const object = (secret = SECRET, id = 's'): string[] => ['--object', `secret,id=${id},data=${secret}`]

/** Writes to an image and to what it must read as. */
export async function put(image: Image, disk: Buffer, position: number, bytes: Buffer): Promise<void> {
  bytes.copy(disk, position)
  await image.write(bytes, { position })
}

/** A folder of encrypted disks. */
export interface Disks {
  readonly folder: string
  readonly at: (name: string) => string
  /** The value of `--image-opts`. */
  readonly described: (name: string, more?: string) => string
  /** A disk as qemu-img reads it. */
  readonly theirs: (name: string, more?: string, secrets?: readonly string[]) => Buffer
  /** A disk as it is read here. */
  readonly ours: (name: string, secret?: Secrets) => Promise<Buffer>
  /** Both read the same, QEMU finds nothing wrong, and no mark is in the file. */
  readonly holds: (name: string, disk: Buffer) => Promise<void>
}

export function encryptedDisks(): Disks {
  const folder = temporaryFolder()
  const at = (name: string): string => join(folder, name)
  const described = (name: string, more = ''): string =>
    `driver=qcow2,encrypt.key-secret=s,file.filename=${at(name)}${more}`
  const theirs = (name: string, more = '', secrets: readonly string[] = object()): Buffer => {
    ok(qemuImg('convert', ...secrets, '--image-opts', described(name, more), '-O', 'raw', at('theirs.raw')))
    return readFileSync(at('theirs.raw'))
  }
  const ours = async (name: string, secret: Secrets = SECRET): Promise<Buffer> => {
    await using image = await open(at(name), { secret, references: 'allow' })
    const bytes = Buffer.alloc(image.virtualSize)
    await image.read(bytes, { position: 0 })
    return bytes
  }
  const holds = async (name: string, disk: Buffer): Promise<void> => {
    expect((await ours(name)).equals(disk), `${name}: read here`).toBe(true)
    ok(qemuImg('check', ...object(), '--image-opts', described(name)))
    expect(theirs(name).equals(disk), `${name}: read by qemu-img`).toBe(true)
    expect((await check(at(name))).corruptions).toBe(0)
    expect(hasMark(at(name)), `${name}: a plain marker`).toBe(false)
  }
  return { folder, at, described, theirs, ours, holds }
}
