/** How writing ends: closed, forgotten, exited, terminated, killed; and streams into an image. */

import { once } from 'node:events'
import { createReadStream, readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { Worker } from 'node:worker_threads'
import { check, create, open } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { failure, pattern, temporaryFolder, writeRaw } from '../api/fixtures.js'
import { assertSameBytes } from '../interop/qemu.js'
import { library, runNode } from '../lifecycle/child.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const SIZE = 8 * 2 ** 20

async function fresh(name: string): Promise<string> {
  await (await create(at(name), { size: SIZE, overwrite: true })).close()
  return at(name)
}

/** Writes to 40 clusters, and does not flush. */
const WRITES = `
  Promise.all(Array.from({ length: 40 }, (_, i) => image.write(Buffer.alloc(5000, i + 1), { position: i * 100000 })))`

async function hasThem(path: string): Promise<boolean> {
  await using image = await open(path)
  for (let i = 0; i < 40; i++) {
    const { buffer } = await image.read(Buffer.alloc(5000), { position: i * 100_000 })
    if (!buffer.equals(Buffer.alloc(5000, i + 1))) return false
  }
  return true
}

describe('what was written', () => {
  it('is there after closing, with nothing reserved left over', async () => {
    const path = await fresh('closed.qcow2')
    const image = await open(path, { flags: 'r+' })
    await image.write(Buffer.alloc(1, 1), { position: 0 })
    await image.close()
    const found = await check(path)
    expect(found).toMatchObject({ ok: true, allocatedClusters: 1 })
    expect(statSync(path).size).toBe(found.imageEndOffset)
  })

  it('is all in the file while the image is checked, and writing goes on', async () => {
    const path = await fresh('checked.qcow2')
    await using image = await open(path, { flags: 'r+' })
    for (let i = 0; i < 5; i++) {
      const position = i * 10 * 65536
      const writes = Promise.all([
        image.write(Buffer.alloc(200_000, i), { position }),
        image.write(Buffer.alloc(200_000, i), { position: position + 200_000 }),
      ])
      expect(await image.check()).toMatchObject({ ok: true, leaks: 0 })
      await writes
      expect((await image.check()).allocatedClusters).toBeGreaterThan(i * 6)
      await image.truncate(image.virtualSize + 2 ** 30)
    }
    await image.close()
    expect((await check(path)).ok).toBe(true)
  })

  it('is there after the process ends with the image open', async () => {
    const path = await fresh('ended.qcow2')
    const program = `qcow2.open(process.argv[1], { flags: 'r+' }).then(async image => {
      globalThis.image = image
      await ${WRITES}
    })`
    expect(runNode(program, { args: [path] })).toMatchObject({ code: 0, stderr: '' })
    expect(await hasThem(path)).toBe(true)
    expect((await check(path)).ok).toBe(true)
  })

  it('is there after process.exit() in the middle of other writes', async () => {
    const path = await fresh('exit.qcow2')
    const program = `qcow2.open(process.argv[1], { flags: 'r+' }).then(async image => {
      await ${WRITES}
      for (let i = 0; i < 100; i++) image.write(Buffer.alloc(10000, 9), { position: 5e6 + i * 10000 }).catch(() => {})
      process.exit(3)
    })`
    expect(runNode(program, { args: [path] })).toMatchObject({ code: 3, stderr: '' })
    expect(await hasThem(path)).toBe(true)
    expect((await check(path)).ok).toBe(true)
  })

  it('is there after datasync and SIGKILL, with leaks at worst', async () => {
    const path = await fresh('killed.qcow2')
    const program = `qcow2.open(process.argv[1], { flags: 'r+' }).then(async image => {
      await ${WRITES}
      await image.datasync()
      for (let i = 0; i < 100; i++) image.write(Buffer.alloc(10000, 9), { position: 5e6 + i * 10000 }).catch(() => {})
      setImmediate(() => process.kill(process.pid, 'SIGKILL'))
    })`
    expect(runNode(program, { args: [path] }).signal).toBe('SIGKILL')
    expect(await hasThem(path)).toBe(true)
    expect(await check(path)).toMatchObject({ corruptions: 0, checkErrors: 0 })
    await using again = await open(path, { flags: 'r+' })
    await again.write(Buffer.alloc(1), { position: SIZE - 1 })
  })

  it('is there after a worker was terminated, and the lock is free', async () => {
    const path = await fresh('worker.qcow2')
    const program = `
      const { parentPort } = require('node:worker_threads')
      require(${JSON.stringify(library)}).open(${JSON.stringify(path)}, { flags: 'r+' }).then(async image => {
        await ${WRITES}
        parentPort.postMessage('written')
        for (;;) await image.write(Buffer.alloc(10000, 9), { position: 5e6 })
      })`
    const worker = new Worker(program, { eval: true })
    await once(worker, 'message')
    expect((await failure(() => open(path))).code).toBe('ERR_QCOW2_LOCKED')
    await worker.terminate()
    expect(await hasThem(path)).toBe(true)
    expect((await check(path)).ok).toBe(true)
  })

  it.skipIf(process.platform !== 'linux')('is there after the handle was collected, with a warning', async () => {
    const path = await fresh('collected.qcow2')
    const program = `
      const path = process.argv[1]
      async function use() {
        const image = await qcow2.open(path, { flags: 'r+' })
        await ${WRITES}
      }
      const pause = () => new Promise(resolve => setTimeout(resolve, 20))
      use().then(async () => {
        for (let i = 0; i < 200; i++) {
          gc()
          await pause()
          const again = await qcow2.open(path, { flags: 'r+' }).catch(error => error.code)
          if (again !== 'ERR_QCOW2_LOCKED') return again.close().then(() => console.log('free'))
        }
      })`
    const ended = runNode(program, { args: [path], flags: ['--expose-gc'] })
    expect(ended).toMatchObject({ code: 0, stdout: 'free\n' })
    expect(ended.stderr).toContain(`[QCOW2_UNCLOSED] Warning: Closing image '${path}'`)
    expect(await hasThem(path)).toBe(true)
    expect((await check(path)).ok).toBe(true)
  })
})

describe('a write stream', () => {
  it('takes a file through a pipeline, and leaves the image open', async () => {
    const raw = writeRaw(at('source.raw'), SIZE, [[0, SIZE]])
    const path = await fresh('stream.qcow2')
    await using image = await open(path, { flags: 'r+' })
    await pipeline(createReadStream(raw, { highWaterMark: 77_777 }), image.createWriteStream({ flush: true }))
    expect(image.closed).toBe(false)
    const { buffer } = await image.read(Buffer.alloc(SIZE), { position: 0 })
    assertSameBytes(readFileSync(raw), buffer, 'read back')
    expect((await image.check()).ok).toBe(true)
  })

  it('begins at start, gathers small chunks, and several run at once', async () => {
    const path = await fresh('streams.qcow2')
    await using image = await open(path, { flags: 'r+' })
    const chunks = (start: number): Buffer[] => Array.from({ length: 3000 }, (_, i) => pattern(start + i * 333, 333))
    const starts = [0, 1_000_000, 5_000_001]
    await Promise.all(starts.map(start => pipeline(Readable.from(chunks(start)), image.createWriteStream({ start }))))
    for (const start of starts) {
      const { buffer } = await image.read(Buffer.alloc(999_000), { position: start })
      assertSameBytes(pattern(start, 999_000), buffer, `from ${start}`)
    }
  })

  it('fails where the disk ends, with what fits written', async () => {
    const path = await fresh('end.qcow2')
    await using image = await open(path, { flags: 'r+' })
    const stream = image.createWriteStream({ start: SIZE - 1000 })
    const chunks = [Buffer.alloc(1000, 1), Buffer.alloc(1, 2)]
    const error = await failure(() => pipeline(Readable.from(chunks, { objectMode: true }), stream))
    expect(error.code).toBe('ERR_QCOW2_INVALID_ARGUMENT')
  })

  it('ends with an AbortError when its signal says so', async () => {
    const path = await fresh('aborted.qcow2')
    await using image = await open(path, { flags: 'r+' })
    const controller = new AbortController()
    const stream = image.createWriteStream({ signal: controller.signal })
    stream.write(Buffer.alloc(100_000, 1))
    controller.abort()
    const [error] = await once(stream, 'error')
    expect(error.name).toBe('AbortError')
  })
})
