/** Targets that are there already, or are no plain path. */

import { spawnSync } from 'node:child_process'
import { chmodSync, chownSync, linkSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { CLI, qcow2, workspace } from './run.js'

const folder = workspace()
const at = (name: string): string => join(folder, name)
const SIZE = 2 ** 20
const convert = (target: string) => qcow2(['convert', '-f', 'raw', '-O', 'raw', 'disk.raw', target], folder)

describe('a target', () => {
  beforeAll(() => writeFileSync(at('disk.raw'), Buffer.alloc(SIZE, 5)))

  it.skipIf(process.platform !== 'linux')('that is an open file is written through its descriptor', () => {
    // The first has a name no more, the second keeps its own.
    const script = `
      exec 7<>gone 8<>kept; rm gone
      for target in /proc/self/fd/7 /dev/fd/8; do "$0" "$1" convert -f raw -O raw disk.raw $target || exit 1; done
      cmp disk.raw /proc/self/fd/7 && cmp disk.raw /proc/self/fd/8 && ls`
    const { status, stdout, stderr } = spawnSync('sh', ['-c', script, process.execPath, CLI], {
      cwd: folder,
      encoding: 'utf8',
    })
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    expect(stdout.split('\n').filter(Boolean)).toEqual(['disk.raw', 'kept', 'qemu-img'])
  })

  it('keeps its owner, its permissions and all its names', async () => {
    writeFileSync(at('owned'), 'old')
    chmodSync(at('owned'), 0o640)
    if (process.getuid?.() === 0) chownSync(at('owned'), 1234, 2345)
    const { uid, gid, mode } = statSync(at('owned'))
    expect((await convert('owned')).code).toBe(0)
    expect(statSync(at('owned'))).toMatchObject({ uid, gid, mode, size: SIZE })
    linkSync(at('owned'), at('again'))
    writeFileSync(at('owned'), Buffer.alloc(3 * SIZE, 1))
    expect((await convert('again')).code).toBe(0)
    expect(readFileSync(at('owned')).equals(Buffer.alloc(SIZE, 5))).toBe(true)
  })

  it('may have the longest of names, and none that is a folder', async () => {
    const name = 'n'.repeat(255)
    for (const _ of [1, 2]) expect((await convert(name)).code).toBe(0)
    expect(statSync(at(name)).size).toBe(SIZE)
    mkdirSync(at('folder'))
    const before = readdirSync(folder)
    for (const target of ['out/', 'folder/', 'folder']) {
      const { code, stderr } = await convert(target)
      expect(code).toBe(1)
      expect(stderr).toBe(
        `qcow2: ${target}: error while converting raw: Could not create '${target}': Is a directory\n`,
      )
    }
    expect(readdirSync(folder)).toEqual(before)
  })
})
