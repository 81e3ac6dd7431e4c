/** What keeps a process alive, what does not, and how it ends. */

import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { convert } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder, writeRaw } from '../api/fixtures.js'
import { library, runNode } from './child.js'

const folder = temporaryFolder()
const raw = join(folder, 'disk.raw')
const path = join(folder, 'disk.qcow2')
const MIB = 2 ** 20

beforeAll(async () => {
  writeRaw(raw, 16 * MIB, [[0, 16 * MIB]])
  await convert(raw, path, { from: 'raw', to: 'qcow2' })
})

const run = (program: string, flags: string[] = []) => runNode(program, { flags, args: [path, raw, folder] })
const given = 'const [path, raw, folder] = process.argv.slice(1)\n'

describe('a process', () => {
  it('ends when nothing is left to do, with an image open', () => {
    const ended = run(`${given}qcow2.open(path).then(image => { globalThis.image = image; console.log('open') })`)
    expect(ended).toMatchObject({ code: 0, signal: null, stdout: 'open\n' })
  })

  it('does not end before requests that are under way, with nobody waiting for them', () => {
    const program = `${given}
      qcow2.open(path).then(image => {
        image.read(Buffer.alloc(${16 * MIB}), { position: 0 }).then(({ bytesRead }) => console.log('read', bytesRead))
        qcow2.check(path).then(({ ok }) => console.log('check', ok))
      })`
    const ended = run(program)
    expect(ended).toMatchObject({ code: 0, stderr: '' })
    expect(ended.stdout.trim().split('\n').toSorted()).toEqual(['check true', `read ${16 * MIB}`])
  })

  it('can exit in the middle of reads and a job, and leaves no file', () => {
    const program = `${given}
      qcow2.open(path).then(image => {
        for (let i = 0; i < 100; i++) image.read(Buffer.alloc(65536), { position: i * 65536 }).catch(() => {})
        qcow2.convert(raw, folder + '/exit.qcow2', { from: 'raw', to: 'qcow2', compress: { level: 12 } }).catch(() => {})
        setTimeout(() => process.exit(7), 20)
      })`
    const ended = run(program)
    expect(ended).toMatchObject({ code: 7, signal: null, stderr: '' })
    expect(readdirSync(folder).toSorted()).toEqual(['disk.qcow2', 'disk.raw'])
  })

  it('can be killed in the middle of a convert, and leaves no file', () => {
    const program = `${given}
      qcow2.convert(raw, folder + '/killed.qcow2', {
        from: 'raw', to: 'qcow2', compress: { level: 12 }, progressInterval: 1,
        onProgress: ({ current }) => { if (current > 0) process.kill(process.pid, 'SIGKILL') },
      })`
    const ended = run(program)
    expect(ended.signal).toBe('SIGKILL')
    expect(existsSync(join(folder, 'killed.qcow2'))).toBe(false)
  })
})

describe('an image that nobody closed', () => {
  const forget = (then: string) => `${given}
    const { readdirSync, readlinkSync } = require('node:fs')
    const link = fd => { try { return readlinkSync('/proc/self/fd/' + fd) } catch { return '' } }
    const descriptors = () => readdirSync('/proc/self/fd').filter(fd => link(fd) === path).length
    async function use() {
      const image = await qcow2.open(path)
      await image.read(Buffer.alloc(16), { position: 0 })
      ${then}
    }
    const pause = () => new Promise(resolve => setTimeout(resolve, 10))
    use().then(async () => {
      for (let i = 0; i < 100 && (i < 5 || descriptors() > 0); i++) { gc(); await pause() }
      console.log(descriptors())
    })`

  it.skipIf(process.platform !== 'linux')('is closed when it is collected, with a warning', () => {
    const ended = run(forget(''), ['--expose-gc'])
    expect(ended).toMatchObject({ code: 0, stdout: '0\n' })
    expect(ended.stderr).toContain(`[QCOW2_UNCLOSED] Warning: Closing image '${path}' on garbage collection`)
  })

  it.skipIf(process.platform !== 'linux')('is not warned about where it was closed', () => {
    const ended = run(forget('await image.close()'), ['--expose-gc'])
    expect(ended).toMatchObject({ code: 0, stdout: '0\n', stderr: '' })
  })

  it('is not collected while a request is under way', () => {
    const program = `${given}
      const pause = () => new Promise(resolve => setTimeout(resolve, 1))
      let reads
      qcow2.open(path).then(async image => {
        reads = Array.from({ length: 50 }, (_, i) => image.read(Buffer.alloc(${MIB}), { position: i * 4096 }))
      }).then(async () => {
        for (let i = 0; i < 20; i++) { gc(); await pause() }
        const done = await Promise.all(reads)
        console.log(done.every(({ bytesRead }) => bytesRead === ${MIB}))
      })`
    expect(run(program, ['--expose-gc'])).toMatchObject({ code: 0, stdout: 'true\n' })
  })
})

describe('where the addon is looked for', () => {
  it('is where the environment says', () => {
    const missing = join(folder, 'missing.node')
    const program = 'process.exit(0)'
    const ended = runNode(program, { env: { NAPI_RS_NATIVE_LIBRARY_PATH: missing } })
    expect(ended.code).not.toBe(0)
    expect(ended.stderr).toContain('ERR_QCOW2_ADDON_MISSING')
    expect(ended.stderr).toContain(missing)
  })

  it('is told for a platform that has none', () => {
    const { status, stderr } = runElsewhere('sunos', 'sparc')
    expect(status).not.toBe(0)
    expect(stderr).toContain('qcow2 has no addon for sunos-sparc; it has one for linux-x64')
  })

  it('is told where it is there and does not load', () => {
    const broken = join(folder, 'broken.node')
    writeFileSync(broken, 'no addon')
    const ended = runNode('process.exit(0)', { env: { NAPI_RS_NATIVE_LIBRARY_PATH: broken } })
    rmSync(broken)
    expect(ended.code).not.toBe(0)
    expect(ended.stderr).toContain(`the addon ${broken} (NAPI_RS_NATIVE_LIBRARY_PATH) cannot be loaded: `)
  })

  it('is told with the package that is missing', () => {
    const { status, stderr } = runElsewhere('win32', 'arm64')
    expect(status).not.toBe(0)
    expect(stderr).toContain('the package qcow2-win32-arm64-msvc with the addon for this platform is not installed')
  })
})

/** Loads the library in a process that takes itself for another platform's. */
function runElsewhere(platform: string, arch: string) {
  const program = `
    Object.defineProperty(process, 'platform', { value: '${platform}' })
    Object.defineProperty(process, 'arch', { value: '${arch}' })
    require(${JSON.stringify(library)})`
  return spawnSync(process.execPath, ['-e', program], { encoding: 'utf8' })
}
