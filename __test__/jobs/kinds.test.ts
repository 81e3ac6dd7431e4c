/** Each kind of job through a real queue and a worker: what comes back, what is refused, and where the dead lie. */

import {
  chmodSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { Queue } from 'bullmq'
import { AbortError, compare, convert, create, open } from 'qcow2'
import { type JobProgress, type JobQueue, type JobWorker, openQueue, startWorker, type WorkerEvent } from 'qcow2/jobs'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { NewFile } from '../../dist/jobs/target.js'
import { failure, temporaryFolder, writeRaw } from '../api/fixtures.js'
import { describeWithRedis, RedisServer } from './redis.js'

const folder = temporaryFolder()
const root = join(folder, 'root')
const at = (name: string): string => join(root, name)
const MIB = 2 ** 20
const events: WorkerEvent[] = []
const puts: { url: string | undefined; length: string | undefined; key: string | undefined; bytes: Buffer }[] = []
let answerWith = 201
let redis: RedisServer
let server: Server
let address: string
let worker: JobWorker
let queue: JobQueue

describeWithRedis('jobs of a queue', () => {
  beforeAll(async () => {
    mkdirSync(root)
    redis = new RedisServer(folder)
    await redis.start()
    server = createServer((request, response) => {
      const chunks: Buffer[] = []
      request.on('data', (chunk: Buffer) => chunks.push(chunk))
      request.on('end', () => {
        const { url, headers } = request
        const key = headers['x-key']
        puts.push({ url, length: headers['content-length'], key: String(key), bytes: Buffer.concat(chunks) })
        response.writeHead(answerWith, { etag: '"abc"', location: '/elsewhere' }).end()
      })
    })
    await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
    address = `http://127.0.0.1:${(server.address() as AddressInfo).port}/images`
    const connection = redis.url
    worker = await startWorker({
      connection,
      roots: root,
      uploads: `${address}/`,
      uploadHeaders: () => ({ 'x-key': 'secret' }),
      progressInterval: 1,
      references: 'roots',
      onEvent: event => events.push(event),
    })
    queue = await openQueue({ connection })
    writeRaw(at('disk.raw'), 64 * MIB, [
      [0, MIB],
      [32 * MIB, MIB],
    ])
    await convert(at('disk.raw'), at('disk.qcow2'), { from: 'raw', to: 'qcow2' })
  })
  afterAll(async () => {
    await Promise.allSettled([queue.close(), worker.close()])
    await redis.stop()
    server.close()
  })

  it('does each kind, and tells how far it is', async () => {
    const told: JobProgress[] = []
    const onProgress = (progress: JobProgress): unknown => told.push(progress)
    const source = 'disk.raw'
    const job = await queue.add('convert', { source, target: 'new.qcow2', from: 'raw', to: 'qcow2', compress: true })
    expect(await job.finished({ onProgress })).toMatchObject({ virtualSize: 64 * MIB, bytesRead: 2 * MIB })
    expect(told.at(-1)).toEqual({ phase: 'convert', current: 64 * MIB, total: 64 * MIB })
    expect(await job.progress()).toEqual(told.at(-1))
    expect(await job.state()).toBe('completed')
    expect((await compare(at('disk.raw'), at('new.qcow2'), { formatA: 'raw' })).identical).toBe(true)

    const checked = await (await queue.add('check', { source: at('new.qcow2') })).finished({ onProgress })
    expect(checked).toMatchObject({ ok: true, format: 'qcow2', corruptions: 0, findings: [] })
    const inspected = await (await queue.add('inspect', { source: 'new.qcow2' })).finished()
    expect(inspected).toMatchObject({ format: 'qcow2', virtualSize: 64 * MIB, safe: true })

    await convert(at('disk.raw'), at('roomy.qcow2'), { from: 'raw', to: 'qcow2' })
    const image = await open(at('roomy.qcow2'), { flags: 'r+' })
    await image.write(Buffer.alloc(MIB), { position: 0 })
    await image.close()
    const compacting = await queue.add('compact', { source: 'roomy.qcow2', mode: 'rewrite', zeroes: true })
    const compacted = await compacting.finished({ onProgress })
    expect(compacted.fileLengthAfter).toBeLessThan(compacted.fileLengthBefore)
    unlinkSync(at('roomy.qcow2'))
    const upload = await queue.add('upload', { source: 'disk.qcow2', url: `${address}/a.qcow2?sign=1` })
    const { size } = statSync(at('disk.qcow2'))
    expect(await upload.finished({ onProgress })).toMatchObject({ bytesSent: size, status: 201, etag: '"abc"' })
    expect(puts).toMatchObject([{ url: '/images/a.qcow2?sign=1', length: String(size), key: 'secret' }])
    expect(puts[0]?.bytes.equals(readFileSync(at('disk.qcow2')))).toBe(true)
    expect(new Set(told.map(({ phase }) => phase))).toEqual(new Set(['convert', 'check', 'compact', 'upload']))
    expect(readdirSync(root).sort()).toEqual(['disk.qcow2', 'disk.raw', 'new.qcow2'])
  })

  it('refuses what is wrong when it is added, and what lies elsewhere when it is done', async () => {
    const source = 'disk.qcow2'
    const wrong = async (kind: string, data: unknown): Promise<unknown> =>
      (await failure(() => queue.add(kind as 'convert', data as never))).field
    expect(await wrong('format', { source })).toBe('kind')
    expect(await wrong('convert', { source, target: 'x' })).toBe('to')
    expect(await wrong('convert', { source, target: 'x', to: 'raw', references: 'allow' })).toBe('references')
    expect(await wrong('convert', { source, target: 'x', to: 'qcow2', create: { dataFile: 'y' } })).toBe('dataFile')
    expect(await wrong('convert', { source, target: 'x', to: 'raw', length: 2n ** 60n })).toBe('length')
    expect(await wrong('upload', { source, url: 'file:///etc/passwd' })).toBe('url')

    symlinkSync('/etc', at('etc'))
    symlinkSync('/etc/hostname', at('link'))
    mkdirSync(join(folder, 'root-beside'))
    await (await create(at('top.qcow2'), { backingFile: '/etc/hostname', backingFormat: 'raw' })).close()
    await (await create(at('fine.qcow2'), { backingFile: 'disk.qcow2', backingFormat: 'qcow2' })).close()
    const denied = [
      { source: '/etc/hostname', target: 'x', to: 'raw' },
      { source: '../root-beside/x', target: 'x', to: 'raw' },
      { source: 'link', target: 'x', to: 'raw', from: 'raw' },
      { source: 'etc/hostname', target: 'x', to: 'raw', from: 'raw' },
      { source, target: 'etc/x', to: 'raw' },
      { source, target: 'link', to: 'raw', overwrite: true },
      { source, target: '../x', to: 'raw' },
      { source: 'top.qcow2', target: 'x', to: 'raw' },
    ] as const
    const jobs = await Promise.all(denied.map(data => queue.add('convert', data)))
    const elsewhere = await queue.add('upload', { source, url: `${address}/../b` })
    for (const job of [...jobs, elsewhere]) {
      expect(await failure(() => job.finished())).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    }
    const fine = await queue.add('convert', { source: 'fine.qcow2', target: 'whole.qcow2', to: 'qcow2' })
    expect(await fine.finished()).toMatchObject({ virtualSize: 64 * MIB })
    expect(puts).toHaveLength(1)
    for (const name of ['etc', 'link', 'top.qcow2', 'fine.qcow2', 'whole.qcow2']) unlinkSync(at(name))
    expect(readdirSync(root).sort()).toEqual(['disk.qcow2', 'disk.raw', 'new.qcow2'])
    for (const { id } of await queue.dead()) expect(await queue.drop(id)).toBe(true)
  })

  it('keeps the dead with their reason, to be tried again or dropped', async () => {
    const data = { source: 'later.raw', target: 'late.qcow2', from: 'raw', to: 'qcow2' } as const
    const job = await queue.add('convert', data, { id: 'late', attempts: 2, backoff: 1 })
    expect(await failure(() => job.finished())).toMatchObject({ code: 'ENOENT' })
    const own = (): string[] => events.filter(event => 'id' in event && event.id === 'late').map(({ type }) => type)
    await expect.poll(own).toEqual(['started', 'failed', 'started', 'failed'])
    const [dead] = await queue.dead()
    expect(dead).toMatchObject({ id: 'late', kind: 'convert', data, code: 'ENOENT', attempts: 2 })
    expect(await queue.counts()).toMatchObject({ dead: 1, waiting: 0 })
    writeRaw(at('later.raw'), MIB, [[0, 512]])
    expect(await queue.retry('late')).toBe(true)
    await job.finished()
    expect(await queue.retry('late')).toBe(false)
    expect(await queue.dead()).toEqual([])
    // It is there: no other job may replace it unless it says so, and trying again would not help.
    const again = await queue.add('convert', data)
    expect(await failure(() => again.finished())).toMatchObject({ code: 'EEXIST' })
    expect(await queue.drop(again.id)).toBe(true)
    expect(await again.state()).toBeUndefined()
    const image = await open(at('late.qcow2'), { flags: 'r+' })
    const inUse = [
      await queue.add('convert', { ...data, overwrite: true }, { attempts: 1 }),
      await queue.add('upload', { source: 'late.qcow2', url: `${address}/x` }, { attempts: 1 }),
    ]
    for (const job of inUse) expect(await failure(() => job.finished())).toMatchObject({ code: 'ERR_QCOW2_LOCKED' })
    await image.close()
    chmodSync(at('late.qcow2'), 0o600)
    const { ino } = statSync(at('late.qcow2'))
    const replacing = await queue.add('convert', { ...data, overwrite: true })
    await replacing.finished()
    expect(statSync(at('late.qcow2')).mode & 0o777).toBe(0o600)
    expect(statSync(at('late.qcow2')).ino).not.toBe(ino)
    // A server that is away for a moment is tried again; one that refuses is not.
    answerWith = 503
    const upload = { source: 'late.qcow2', url: `${address}/c` }
    const passing = await queue.add('upload', upload, { backoff: 300 })
    while (puts.length < 2) await new Promise(resolve => setTimeout(resolve, 10))
    answerWith = 200
    expect(await passing.finished()).toMatchObject({ status: 200 })
    for (answerWith of [403, 302]) {
      const refused = await queue.add('upload', upload, { attempts: 1 })
      await failure(() => refused.finished())
    }
    expect(puts).toHaveLength(5)
    for (const { id } of await queue.dead()) await queue.drop(id)
  })

  it('takes jobs by their priority, and none that was cancelled', async () => {
    const source = 'disk.raw'
    const others = await openQueue({ connection: redis.url, queue: 'ordered' })
    const add = (priority: number) => others.add('inspect', { source }, { id: `p${priority}`, priority })
    for (const priority of [5, 1, 3, 0]) await add(priority)
    const gone = await add(2)
    expect(await gone.cancel()).toBe('removed')
    expect(await gone.cancel()).toBe('ended')
    expect(await failure(() => gone.finished())).toBeInstanceOf(AbortError)
    // Twice the same.
    await add(5)
    expect(await others.counts()).toMatchObject({ waiting: 4 })
    const order: string[] = []
    // What it does wrong is a warning, and the jobs go on.
    const warned: string[] = []
    const onWarning = (warning: Error & { code?: string }): void => {
      if (warning.code === 'QCOW2_CALLBACK') warned.push(warning.message)
    }
    process.on('warning', onWarning)
    const onEvent = (event: WorkerEvent): unknown => {
      if (event.type !== 'completed') return undefined
      order.push(event.id)
      if (event.id === 'p0') throw new Error('thrown')
      return event.id === 'p1' ? Promise.reject(new Error('rejected')) : undefined
    }
    await using one = await startWorker({ connection: redis.url, queue: 'ordered', roots: [root], onEvent })
    await (await others.job('p5'))?.finished()
    await one.close()
    await others.close()
    process.off('warning', onWarning)
    expect(order).toEqual(['p0', 'p1', 'p3', 'p5'])
    expect(warned).toEqual(['thrown', 'rejected'].map(reason => `onEvent of a worker failed: ${reason}`))
  })

  it('names no file any more once another attempt has taken over', async () => {
    const place = { folder: root, name: 'fenced', path: at('fenced') }
    const kept: { made: string; result: unknown }[] = []
    const fence = {
      hold: async (intent: { made: string; result: unknown }) => kept.push(intent) > 0,
      intent: async () => kept.at(-1),
    }
    const [late, next] = [new NewFile(place, 'job'), new NewFile(place, 'job')]
    writeFileSync(late.temporary, 'late')
    // It has the lock, and stands still before it renames.
    const stopped = {
      ...fence,
      hold: async (intent: { made: string; result: unknown }) => {
        await next.revokeOthers()
        return fence.hold(intent)
      },
    }
    for (const replace of [false, true]) {
      writeFileSync(late.temporary, 'late')
      expect(await failure(() => late.name(stopped, replace, 1))).toBeInstanceOf(AbortError)
    }
    expect(await next.done(fence)).toBeUndefined()
    writeFileSync(next.temporary, 'next')
    await next.name(fence, false, 2)
    expect(readFileSync(place.path, 'utf8')).toBe('next')
    // Who comes after that finds it done.
    expect(await new NewFile(place, 'job').done(fence)).toMatchObject({ result: 2 })
    writeFileSync(place.path, 'changed by whoever has it')
    expect(await new NewFile(place, 'job').done(fence)).toBeUndefined()
    unlinkSync(place.path)
  })

  it('takes up a job whose worker died when it had named the target, or before', async () => {
    const given = { connection: redis.url, queue: 'taken' }
    await using taken = await openQueue(given)
    const ids = ['named', 'unnamed', 'cancelled']
    const left = ids.map(id => new NewFile({ folder: root, name: id, path: at(id) }, `bull:taken:${id}`).temporary)
    const jobs = await Promise.all(
      ids.map(id => taken.add('convert', { source: 'disk.qcow2', target: id, to: 'raw' }, { id })),
    )
    writeFileSync(at('named'), 'whole')
    const { ino, size, mtimeNs } = statSync(at('named'), { bigint: true })
    const raw = new Queue('taken', { connection: { path: join(folder, 'redis', 'socket') } })
    const client = await raw.backend.client
    for (const [index, id] of ids.entries()) {
      writeFileSync(left[index] ?? '', 'what an attempt left')
      // As its worker had it: begun once, and about to give a file the target's name.
      const intent = { made: `${ino}:${size}:${mtimeNs}`, result: { virtualSize: 42 } }
      await client.hset(`bull:taken:${id}`, { ats: 1, 'qcow2:intent': JSON.stringify(intent) })
    }
    await client.hset('bull:taken:cancelled', { 'qcow2:cancel': 'while nobody had it' })
    await raw.close()
    await using one = await startWorker({ ...given, roots: root })
    const [named, unnamed, cancelled] = await Promise.allSettled(jobs.map(job => job.finished()))
    expect(named).toEqual({ status: 'fulfilled', value: { virtualSize: 42 } })
    expect(readFileSync(at('named'), 'utf8')).toBe('whole')
    expect(unnamed).toMatchObject({ status: 'fulfilled', value: { virtualSize: 64 * MIB } })
    expect(cancelled).toMatchObject({ status: 'rejected', reason: { name: 'AbortError' } })
    await one.close()
    expect(readdirSync(root).filter(name => name.startsWith('.') || name === 'cancelled')).toEqual([])
    for (const name of ['named', 'unnamed']) unlinkSync(at(name))
  })

  it('says in time that there is no queue', async () => {
    const connection = `unix://${join(folder, 'nothing')}`
    const given = { connection, timeout: 200 }
    for (const call of [() => openQueue(given), () => startWorker({ ...given, roots: root })]) {
      expect(await failure(call)).toMatchObject({ code: 'ENOENT', syscall: 'connect', transient: true })
    }
    expect(await failure(() => openQueue({ connection: 'http://:pw@x' }))).toMatchObject({ field: 'connection' })
  })
})
