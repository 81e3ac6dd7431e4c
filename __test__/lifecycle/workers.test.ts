/** Environments that start and end in one process, as an Electron window's do when it reloads. */

import { once } from 'node:events'
import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import { check, convert, open } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { pattern, temporaryFolder, writeRaw } from '../api/fixtures.js'
import { library } from './child.js'

const folder = temporaryFolder()
const raw = join(folder, 'disk.raw')
const path = join(folder, 'disk.qcow2')
const MIB = 2 ** 20

beforeAll(async () => {
  writeRaw(raw, 8 * MIB, [[0, 8 * MIB]])
  await convert(raw, path, { from: 'raw', to: 'qcow2', compress: true })
})

const startIn = (program: string): Worker =>
  new Worker(
    `const { parentPort, workerData } = require('node:worker_threads')
     const { library, path, raw, folder } = workerData
     const qcow2 = require(library)
     ${program}`,
    { eval: true, workerData: { library, path, raw, folder } },
  )

/** What a worker said, and its exit code. Both can come at once, where this thread was late to look. */
async function end(worker: Worker): Promise<[message: unknown, code: number]> {
  const [[message], [code]] = await Promise.all([once(worker, 'message'), once(worker, 'exit')])
  return [message, code as number]
}

const threads = (): number => readdirSync('/proc/self/task').length

describe('a worker', () => {
  it('reads, and ends by itself', async () => {
    const worker = startIn(`
      qcow2.open(path).then(async image => {
        const { buffer } = await image.read(Buffer.alloc(16), { position: 4096 })
        parentPort.postMessage(buffer)
        await image.close()
      })`)
    const [message, code] = await end(worker)
    expect(Buffer.from(message as Uint8Array)).toEqual(pattern(4096, 16))
    expect(code).toBe(0)
  })

  it('ends with an image open', async () => {
    const worker = startIn(
      `qcow2.open(path).then(image => { globalThis.image = image; parentPort.postMessage('open') })`,
    )
    expect(await end(worker)).toEqual(['open', 0])
  })

  it('can be terminated in the middle of reads, again and again', async () => {
    for (let round = 0; round < 30; round++) {
      const worker = startIn(`
        qcow2.open(path).then(image => {
          const again = position => image.read(Buffer.alloc(65536), { position }).then(() => again((position + 65536) % ${8 * MIB}))
          for (let i = 0; i < 32; i++) again(i * 65536)
          setTimeout(() => parentPort.postMessage('busy'), ${round % 5})
        })`)
      await once(worker, 'message')
      await worker.terminate()
    }
    await using image = await open(path)
    expect((await image.read(Buffer.alloc(16), { position: 0 })).buffer).toEqual(pattern(0, 16))
  })

  it('can be terminated in the middle of streams, which hold nothing then', async () => {
    for (let round = 0; round < 5; round++) {
      const worker = startIn(`
        const again = async () => {
          const options = { compress: ${round % 2 === 1} && { level: 12 }, create: { clusterSize: 4096 } }
          for await (const _ of await qcow2.createQcow2Stream(path, options)) {}
          await again()
        }
        again()
        parentPort.postMessage('busy')`)
      await once(worker, 'message')
      await new Promise(resolve => setTimeout(resolve, round * 6))
      await worker.terminate()
    }
    await (await open(path, { flags: 'r+' })).close()
  })

  it('can be terminated while it starts', async () => {
    for (let round = 0; round < 20; round++) {
      const worker = startIn(`qcow2.open(path).then(image => image.close())`)
      await new Promise(resolve => setTimeout(resolve, round * 3))
      await worker.terminate()
    }
    expect((await check(path)).ok).toBe(true)
  })

  it('can be terminated in the middle of jobs, which leave nothing behind', async () => {
    for (let round = 0; round < 10; round++) {
      const worker = startIn(`
        const started = () => parentPort.postMessage('busy')
        qcow2.convert(raw, folder + '/worker.qcow2', {
          from: 'raw', to: 'qcow2', compress: { level: 12 }, onProgress: started, progressInterval: 1,
        })
        qcow2.compare(raw, path, { formatA: 'raw' })`)
      await once(worker, 'message')
      await worker.terminate()
    }
    expect(readdirSync(folder).toSorted()).toEqual(['disk.qcow2', 'disk.raw'])
  })

  it.skipIf(process.platform !== 'linux')('takes its threads with it', async () => {
    const cycle = async (): Promise<void> => {
      const worker = startIn(`
        qcow2.open(path).then(async image => {
          await Promise.all(Array.from({ length: 32 }, (_, i) => image.read(Buffer.alloc(4096), { position: i * 4096 })))
          parentPort.postMessage('done')
          setInterval(() => {}, 1000)
        })`)
      await once(worker, 'message')
      await worker.terminate()
    }
    await cycle()
    const before = threads()
    for (let round = 0; round < 5; round++) await cycle()
    expect(threads()).toBeLessThanOrEqual(before)
  })

  it.skipIf(process.platform !== 'linux')(
    'leaves no memory, descriptor or thread behind, however often it comes and goes',
    async () => {
      const times = Number(process.env['QCOW2_ENVIRONMENTS'] ?? 50)
      const used = () => ({
        threads: threads(),
        files: readdirSync('/proc/self/fd').length,
        memory: process.memoryUsage.rss(),
      })
      const cycle = async (): Promise<void> => {
        const worker = startIn(`
        qcow2.open(path).then(async image => {
          await image.read(Buffer.alloc(65536), { position: 0 })
          parentPort.postMessage('done')
        })`)
        await once(worker, 'message')
        await worker.terminate()
      }
      for (let round = 0; round < 10; round++) await cycle()
      const before = used()
      for (let round = 0; round < times; round++) await cycle()
      const after = used()
      if (times > 50) process.stderr.write(`${times} environments: ${JSON.stringify({ before, after })}\n`)
      expect(after.threads).toBeLessThanOrEqual(before.threads)
      expect(after.files).toBeLessThanOrEqual(before.files)
      // An environment has some 4 MiB while it is there: one in ten that stayed would be seen.
      expect(after.memory - before.memory).toBeLessThan(32 * MIB + times * 0.1 * MIB)
    },
  )

  it('works beside others, each with images of its own', async () => {
    const workers = Array.from({ length: 4 }, (_, i) =>
      startIn(`
        qcow2.open(path).then(async image => {
          let sum = 0
          for (let round = 0; round < 50; round++) {
            const { buffer } = await image.read(Buffer.alloc(4096), { position: ${i} * 4096 + round * 16384 })
            sum += buffer[0]
          }
          await image.close()
          parentPort.postMessage(sum)
        })`),
    )
    const sums = await Promise.all(workers.map(async worker => (await once(worker, 'message'))[0] as number))
    const expected = Array.from({ length: 4 }, (_, i) =>
      Array.from({ length: 50 }, (_, round) => pattern(i * 4096 + round * 16384, 1)[0] ?? 0).reduce((a, b) => a + b),
    )
    expect(sums).toEqual(expected)
  })
})
