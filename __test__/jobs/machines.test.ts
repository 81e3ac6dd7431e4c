/** Several workers, each a process of its own, that are killed, stopped, drained, and cut off from their queue. */

import { mkdirSync, readdirSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { AbortError, compare } from 'qcow2'
import { type JobQueue, openQueue, type QueuedJob } from 'qcow2/jobs'
import { afterAll, afterEach, beforeAll, beforeEach, expect, it } from 'vitest'
import { failure, temporaryFolder, writeRaw } from '../api/fixtures.js'
import { execute, haveQemu } from '../cli/run.js'
import { describeWithRedis, ended, RedisServer, WorkerProcess } from './redis.js'

const folder = temporaryFolder()
const root = join(folder, 'root')
const at = (name: string): string => join(root, name)
const MIB = 2 ** 20
const MADE = { from: 'raw', to: 'qcow2' } as const
const SOURCES = ['large.raw', 'small.raw']
let redis: RedisServer
let queue: JobQueue
let name = ''
let count = 0
let workers: WorkerProcess[] = []

async function startWorkers(...each: readonly (readonly string[])[]): Promise<WorkerProcess[]> {
  const started = each.map(
    args => new WorkerProcess(['--root', root, '--queue', name, ...args], { QCOW2_REDIS: redis.url }),
  )
  workers.push(...started)
  await Promise.all(started.map(worker => worker.said(/ ready$/)))
  return started
}

/** A convert that takes half a minute by a worker that reads 512 KiB a second, and no time by any other. */
const addLarge = (id: string): Promise<QueuedJob<'convert'>> =>
  queue.add('convert', { source: 'large.raw', target: `${id}.qcow2`, ...MADE }, { id })

const addSmall = (id: string): Promise<QueuedJob<'convert'>> =>
  queue.add('convert', { source: 'small.raw', target: `${id}.qcow2`, ...MADE }, { id })

const SLOW = ['--rate', '512k']

async function begun(job: QueuedJob): Promise<void> {
  await expect.poll(async () => (await job.progress())?.current ?? 0, { timeout: 10_000 }).toBeGreaterThan(0)
}

describeWithRedis('workers on several machines', () => {
  beforeAll(async () => {
    mkdirSync(root)
    writeFileSync(at('large.raw'), Buffer.alloc(16 * MIB, 'all of it is data '))
    writeRaw(at('small.raw'), MIB, [[4096, 65536]])
    redis = new RedisServer(folder)
    await redis.start()
  })
  afterAll(() => redis.stop())
  beforeEach(async () => {
    name = `queue${count++}`
    queue = await openQueue({ connection: redis.url, queue: name })
  })
  afterEach(async () => {
    await Promise.all(workers.map(({ child }) => ended(child, 'SIGKILL')))
    workers = []
    await queue.close()
  })

  it('loses no job with a worker that is killed, and repeats none that was done', async () => {
    const many = Array.from({ length: 200 }, (_, i) => `job-${i}`)
    const all = await startWorkers(...[1, 2, 3].map(() => ['--lock', '1', '--concurrency', '2']))
    const jobs = await Promise.all(many.map(addSmall))
    const finished = Promise.all(jobs.map(job => job.finished()))
    const [victim] = all
    const completed = (): string[] =>
      all.flatMap(({ lines }) => lines).flatMap(line => /^(\S+) convert completed/.exec(line)?.[1] ?? [])
    while (completed().length < 60) await delay(1)
    await ended(victim?.child, 'SIGKILL')
    const before = new Set(completed())
    const done = await queue.counts()
    const inodes = new Map(
      readdirSync(root)
        .filter(file => file.startsWith('job-'))
        .map(file => [file, statSync(at(file)).ino]),
    )
    await finished
    expect(done.completed).toBeGreaterThan(59)
    expect(done.completed).toBeLessThan(200)
    expect(await queue.counts()).toEqual({ waiting: 0, delayed: 0, active: 0, completed: 200, dead: 0 })
    // Each target once, and what had its name when the worker was killed is what has it now.
    expect(readdirSync(root).sort()).toEqual([...SOURCES, ...many.map(id => `${id}.qcow2`)].sort())
    for (const [file, ino] of inodes) expect(statSync(at(file)).ino).toBe(ino)
    expect(new Set(completed()).size).toBe(completed().length)
    // What was under way was begun again, and nothing that was done.
    const said = all.flatMap(({ lines }) => lines)
    const again = said.filter(line => /attempt ([2-9]|\d\d)/.test(line)).map(line => line.split(' ')[0] ?? '')
    expect(again.filter(id => before.has(id))).toEqual([])
    for (const id of ['job-0', 'job-99', 'job-199', ...again]) {
      const result = await compare(at('small.raw'), at(`${id}.qcow2`), { formatA: 'raw' })
      expect(result.identical).toBe(true)
    }
    if (!haveQemu)
      return process.stderr.write('SKIPPED (no qemu-img): the targets were compared by this library alone\n')
    const theirs = ['compare', '-f', 'raw', '-F', 'qcow2', at('small.raw'), at(`${again[0] ?? 'job-50'}.qcow2`)]
    expect(await execute('qemu-img', theirs, root)).toMatchObject({ code: 0 })
    return undefined
  })

  it('leaves a target alone that another has made while it stood still', async () => {
    const [stopped] = await startWorkers(['--lock', '1', ...SLOW])
    const job = await addLarge('stopped')
    await begun(job)
    stopped?.child.kill('SIGSTOP')
    const [other] = await startWorkers(['--lock', '1'])
    await job.finished()
    const { ino } = statSync(at('stopped.qcow2'))
    expect(other?.count(/^stopped convert started, attempt 2$/)).toBe(1)
    stopped?.child.kill('SIGCONT')
    await stopped?.said(/^stopped convert lost$/)
    expect(statSync(at('stopped.qcow2')).ino).toBe(ino)
    expect(readdirSync(root).filter(file => file.startsWith('.'))).toEqual([])
    expect(await queue.counts()).toMatchObject({ completed: 1, active: 0, waiting: 0 })
  })

  it('ends a job that is cancelled from another machine, and leaves nothing', async () => {
    const [worker] = await startWorkers(SLOW)
    const job = await addLarge('cancelled')
    const failed = failure(() => job.finished())
    await begun(job)
    expect(await job.cancel('not needed')).toBe('aborting')
    expect(await failed).toBeInstanceOf(AbortError)
    expect(((await failed).cause as Error).message).toContain('not needed')
    await worker?.said(/^cancelled convert cancelled$/)
    expect(await job.state()).toBeUndefined()
    expect(readdirSync(root).filter(file => file.includes('cancelled') || file.startsWith('.'))).toEqual([])
    expect(await (await addSmall('next')).finished()).toMatchObject({ virtualSize: MIB })
  })

  it('finishes or gives back what it does when it is asked to end', async () => {
    const [slow] = await startWorkers(['--grace', '1', ...SLOW])
    const job = await addLarge('returned')
    await begun(job)
    const waiting = await addSmall('waiting')
    expect(await ended(slow?.child, 'SIGTERM')).toBe(0)
    expect(slow?.count(/^returned convert returned$/)).toBe(1)
    expect(slow?.count(/^waiting convert/)).toBe(0)
    expect([await job.state(), await waiting.state()]).toEqual(['waiting', 'waiting'])
    expect(readdirSync(root).filter(file => file.startsWith('.'))).toEqual([])
    // What another worker has done before the time is over stays done.
    const [brisk] = await startWorkers(['--rate', '16M'])
    await begun(job)
    expect(await ended(brisk?.child, 'SIGTERM')).toBe(0)
    expect(brisk?.count(/^returned convert completed/)).toBe(1)
    expect([await job.state(), await waiting.state()]).toEqual(['completed', 'waiting'])
  })

  it('goes on when its queue is away for a while', async () => {
    const [worker] = await startWorkers(['--timeout', '1', '--rate', '16M'])
    const job = await addLarge('patient')
    await begun(job)
    await redis.stop()
    const meanwhile = addSmall('meanwhile')
    await delay(500)
    await redis.start()
    await Promise.all([job.finished(), (await meanwhile).finished()])
    expect(worker?.count(/^patient convert started/)).toBe(1)
    expect(worker?.count(/ lost$/)).toBe(0)
    expect((await compare(at('large.raw'), at('patient.qcow2'), { formatA: 'raw' })).identical).toBe(true)
    // It is asked to end while there is no queue.
    await redis.stop()
    expect(await ended(worker?.child, 'SIGTERM')).toBe(0)
    await redis.start()
  })
})
