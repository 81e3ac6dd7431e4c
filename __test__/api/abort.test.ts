/** Signals and progress. */

import { getEventListeners } from 'node:events'
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { finished } from 'node:stream/promises'
import {
  AbortError,
  amend,
  check,
  commit,
  compact,
  compare,
  convert,
  create,
  createQcow2Stream,
  ingest,
  inspect,
  type LongRunning,
  measure,
  open,
  type Progress,
  probe,
  Qcow2Error,
  rebase,
} from 'qcow2'
import { beforeAll, describe, expect, it, vi } from 'vitest'
import { failure, openRaw, temporaryFolder, writeRaw } from './fixtures.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const MIB = 2 ** 20
const SIZE = 64 * MIB

beforeAll(async () => {
  writeRaw(at('disk.raw'), SIZE, [
    [0, 24 * MIB],
    [40 * MIB, 8 * MIB],
  ])
  await convert(at('disk.raw'), at('disk.qcow2'), { from: 'raw', to: 'qcow2' })
  // Many tables, no data: a check and a map have long to go.
  const tables = await create(at('tables.qcow2'), { size: 2 ** 28, clusterSize: 512, preallocation: 'metadata' })
  await tables.close()
})

const raise = (error: unknown): never => {
  throw error
}

type Call = (signal: AbortSignal) => Promise<unknown>
const source = (): string => at('disk.qcow2')

const calls: Record<string, Call> = {
  open: signal => open(source(), { signal }),
  create: signal => create(at('new'), { size: MIB, signal }),
  convert: signal => convert(source(), at('new'), { to: 'raw', signal }),
  compare: signal => compare(source(), source(), { signal }),
  measure: signal => measure(source(), { to: 'qcow2', signal }),
  'measure a size': signal => measure({ size: MIB }, { to: 'qcow2', signal }),
  check: signal => check(source(), { signal }),
  inspect: signal => inspect(source(), { signal }),
  'inspect bytes': signal => inspect(Buffer.alloc(512), { signal }),
  probe: signal => probe(source(), { signal }),
}

const onImage: Record<string, (image: Awaited<ReturnType<typeof open>>, signal: AbortSignal) => Promise<unknown>> = {
  read: (image, signal) => image.read(Buffer.alloc(512), { position: 0, signal }),
  readv: (image, signal) => image.readv([Buffer.alloc(512)], 0, { signal }),
  info: (image, signal) => image.info({ signal }),
  chain: (image, signal) => image.chain({ signal }),
  map: (image, signal) => image.map({ signal }).next(),
  check: (image, signal) => image.check({ signal }),
}

for (const [name, call] of Object.entries(onImage)) {
  calls[`Image.${name}`] = async signal => {
    await using image = await open(source())
    return await call(image, signal)
  }
}

describe.each(Object.entries(calls))('%s', (_, call) => {
  it('rejects at once if the signal is already aborted', async () => {
    const reason = { why: 'closed by the user' }
    const error = await failure(() => call(AbortSignal.abort(reason)))
    expect(error).toBeInstanceOf(AbortError)
    expect(error).toMatchObject({ name: 'AbortError', code: 'ABORT_ERR', cause: reason })
    expect(error.message).toBe('The operation was aborted')
    expect(existsSync(at('new'))).toBe(false)
  })

  it('leaves nothing on the signal, and not its handlers alone', async () => {
    const controller = new AbortController()
    const own = vi.fn()
    controller.signal.onabort = own
    const before = getEventListeners(controller.signal, 'abort').length
    const result = await call(controller.signal)
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(before)
    expect(controller.signal.onabort).toBe(own)
    controller.abort()
    expect(own).toHaveBeenCalledOnce()
    if (typeof result === 'object' && result !== null && 'close' in result)
      await (result.close as () => Promise<void>)()
    rmSync(at('new'), { force: true })
  })
})

describe('a job that is cancelled in the middle', () => {
  const jobs: Record<
    string,
    (options: { signal?: AbortSignal; onProgress: () => void; progressInterval: 1 }) => Promise<unknown>
  > = {
    convert: o => convert(at('disk.raw'), at('out'), { from: 'raw', to: 'qcow2', compress: { level: 12 }, ...o }),
    'convert over a file': o =>
      convert(at('disk.raw'), at('disk.qcow2'), {
        from: 'raw',
        to: 'qcow2',
        overwrite: true,
        compress: { level: 12 },
        ...o,
      }),
    check: o => check(at('tables.qcow2'), o),
    create: o => create(at('out'), { size: 2 ** 30, clusterSize: 512, preallocation: 'metadata', ...o }),
  }

  it.each(Object.entries(jobs))('%s stops, and leaves nothing behind', async (_, job) => {
    const before = readdirSync(folder).toSorted()
    const controller = new AbortController()
    const onProgress = vi.fn(() => controller.abort('enough'))
    const error = await failure(() => job({ signal: controller.signal, onProgress, progressInterval: 1 }))
    expect(error).toMatchObject({ code: 'ABORT_ERR', cause: 'enough' })
    expect(readdirSync(folder).toSorted()).toEqual(before)
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(0)
    // What was there is as it was.
    expect((await check(at('disk.qcow2'))).ok).toBe(true)
  })

  it.each(Object.entries(jobs))('%s stops when onProgress throws, with what it threw', async (_, job) => {
    const before = readdirSync(folder).toSorted()
    const thrown = new Error('mine')
    const onProgress = vi.fn(() => {
      throw thrown
    })
    await expect(job({ onProgress, progressInterval: 1 })).rejects.toBe(thrown)
    expect(onProgress).toHaveBeenCalledOnce()
    expect(readdirSync(folder).toSorted()).toEqual(before)
  })
})

it('a resolver that does not answer holds nobody up', async () => {
  const overlay = await create(at('overlay.qcow2'), {
    backingFile: 'disk.qcow2',
    backingFormat: 'qcow2',
    references: 'layer',
    size: SIZE,
  })
  await overlay.close()
  const controller = new AbortController()
  const { signal } = controller
  const references = () => {
    setTimeout(() => controller.abort('enough'), 10)
    return new Promise<null>(() => {})
  }
  const error = await failure(() => open(at('overlay.qcow2'), { references, signal }))
  expect(error).toMatchObject({ name: 'AbortError', cause: 'enough' })
  expect(getEventListeners(signal, 'abort')).toHaveLength(0)
  rmSync(at('overlay.qcow2'))
})

it('a map that is cancelled between two entries ends with the error', async () => {
  await using image = await open(at('disk.qcow2'))
  const controller = new AbortController()
  const seen: number[] = []
  const error = await failure(async () => {
    for await (const entry of image.map({ signal: controller.signal })) {
      seen.push(entry.start)
      controller.abort()
      await image.info()
    }
    return seen
  })
  expect(error.code).toBe('ABORT_ERR')
})

it('a read that is cancelled while it runs rejects when the buffer is free again', async () => {
  await using image = await openRaw(at('disk.raw'))
  const controller = new AbortController()
  const buffer = Buffer.alloc(16 * MIB)
  const read = image.read(buffer, { position: 0, signal: controller.signal })
  controller.abort('now')
  expect(await failure(() => read)).toMatchObject({ code: 'ABORT_ERR', cause: 'now' })
  buffer.fill(0xaa)
  await image.info()
  expect(buffer.every(byte => byte === 0xaa)).toBe(true)
})

describe('functions of the caller that fail later', () => {
  const unhandled = vi.fn()
  const warned = vi.fn()
  beforeAll(() => {
    process.on('unhandledRejection', unhandled)
    process.on('warning', warned)
    return () => {
      process.off('unhandledRejection', unhandled)
      process.off('warning', warned)
    }
  })
  const turns = (): Promise<void> => new Promise(resolve => setTimeout(resolve, 20))

  it('onProgress: what it returns rejects, and the job with it', async () => {
    const mine = new Error('mine')
    const job = convert(at('disk.raw'), at('out'), {
      from: 'raw',
      to: 'qcow2',
      compress: { level: 12 },
      onProgress: async () => {
        throw mine
      },
      progressInterval: 1,
    })
    await expect(job).rejects.toBe(mine)
    expect(existsSync(at('out'))).toBe(false)
    // The last call's alone: the work is done.
    const last = check(at('disk.qcow2'), {
      onProgress: ({ current, total }) => (current === total ? Promise.reject(mine) : undefined),
      progressInterval: 2 ** 31 - 1,
    })
    await expect(last).rejects.toBe(mine)
    await turns()
    expect(unhandled).not.toHaveBeenCalled()
  })

  it('onProgress: of every call that takes it', async () => {
    const mine = new Error('mine')
    const small = at('small.qcow2')
    await (await create(small, { size: MIB })).close()
    const names = { backingFile: small, backingFormat: 'qcow2', references: 'allow' } as const
    await (await create(at('over.qcow2'), { size: MIB, ...names })).close()
    await using image = await open(source(), { flags: 'r+' })
    const bytes = readFileSync(small)
    const drain = async (stream: AsyncIterable<unknown>): Promise<void> => {
      for await (const _ of stream);
    }
    type Told = Pick<LongRunning, 'onProgress' | 'progressInterval'>
    const telling: Readonly<Record<string, (told: Told) => Promise<unknown>>> = {
      amend: told => amend(small, { lazyRefcounts: true, ...told }),
      check: told => check(small, told),
      commit: told => commit(at('over.qcow2'), { references: 'allow', ...told }),
      compact: told => compact(small, told),
      compare: told => compare(small, small, told),
      convert: told => convert(small, at('new'), { to: 'raw', ...told }),
      ingest: told => ingest(Readable.from([bytes]), at('new'), { to: 'raw', ...told }),
      measure: told => measure(small, { to: 'qcow2', ...told }),
      rebase: told => rebase(at('over.qcow2'), null, { references: 'allow', ...told }),
      stream: async told => drain(await createQcow2Stream(small, told)),
      'stream, compressed': async told => drain(await createQcow2Stream(small, { compress: true, ...told })),
      'Image.check': told => image.check(told),
      'Image.clone': told => image.clone(at('new'), { to: 'raw', ...told }),
      'Image.compact': told => image.compact({ dryRun: true, ...told }),
    }
    for (const [name, call] of Object.entries(telling)) {
      for (const onProgress of [() => Promise.reject(mine), () => raise(mine)]) {
        const failed = await call({ onProgress, progressInterval: 1 }).catch((error: unknown) => error)
        expect({ name, failed }).toEqual({ name, failed: mine })
        // The last call comes when all is done.
        rmSync(at('new'), { force: true })
      }
    }
    await turns()
    expect(unhandled).not.toHaveBeenCalled()
  })

  it('onProgress: what rejects when the job has ended is a warning', async () => {
    let fail = (_: Error): void => {}
    const late = new Promise<void>((_, reject) => {
      fail = reject
    })
    const onProgress = vi.fn(() => late)
    // A warning for the job, however many calls it was that failed.
    await check(at('tables.qcow2'), { onProgress, progressInterval: 1 })
    expect(onProgress.mock.calls.length).toBeGreaterThan(1)
    fail(new Error('too late'))
    await turns()
    expect(unhandled).not.toHaveBeenCalled()
    expect(warned.mock.calls).toEqual([
      [expect.objectContaining({ code: 'QCOW2_CALLBACK', message: expect.stringContaining('too late') as string })],
    ])
  })

  it('onPointInTime: awaited, its failure is the clone’s, and the signal ends the wait', async () => {
    await using image = await open(at('disk.qcow2'))
    const mine = new Error('mine')
    const failing = image.clone(at('clone'), { to: 'raw', onPointInTime: () => Promise.reject(mine) })
    await expect(failing).rejects.toBe(mine)
    const controller = new AbortController()
    const endless = image.clone(at('clone'), {
      to: 'raw',
      signal: controller.signal,
      onPointInTime: () => {
        setTimeout(() => controller.abort('enough'), 10)
        return new Promise(() => {})
      },
    })
    expect(await failure(() => endless)).toMatchObject({ code: 'ABORT_ERR', cause: 'enough' })
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(0)
    expect(existsSync(at('clone'))).toBe(false)
    await turns()
    expect(unhandled).not.toHaveBeenCalled()
  })

  it('references: what rejects after the signal is nobody’s', async () => {
    const overlay = await create(at('late.qcow2'), {
      backingFile: 'disk.qcow2',
      backingFormat: 'qcow2',
      references: 'layer',
      size: SIZE,
    })
    await overlay.close()
    const controller = new AbortController()
    const references = async (): Promise<null> => {
      controller.abort()
      await turns()
      throw new Error('late')
    }
    const error = await failure(() => open(at('late.qcow2'), { references, signal: controller.signal }))
    expect(error.code).toBe('ABORT_ERR')
    await turns()
    await turns()
    expect(unhandled).not.toHaveBeenCalled()
    rmSync(at('late.qcow2'))
  })
})

it('one signal serves as many requests and streams as there are, without a warning', async () => {
  const warned = vi.fn()
  process.on('warning', warned)
  await using image = await open(at('disk.qcow2'), { flags: 'r+' })
  const many: Record<string, (signal: AbortSignal) => Promise<unknown>> = {
    read: signal => image.read(Buffer.alloc(512), { position: 0, signal }),
    writeZeroes: signal => image.writeZeroes(MIB / 2, 512, { signal }),
    createReadStream: signal => image.createReadStream({ signal, end: 511 }).toArray(),
    createWriteStream: signal => finished(image.createWriteStream({ signal, start: MIB / 2 }).end(Buffer.alloc(512))),
    readableWebStream: signal => buffer(image.readableWebStream({ signal, end: 511 })),
  }
  for (const [name, call] of Object.entries(many)) {
    const { signal } = new AbortController()
    const calls = Array.from({ length: 24 }, () => call(signal))
    expect(getEventListeners(signal, 'abort').length, name).toBeLessThanOrEqual(1)
    await Promise.all(calls)
    await new Promise(resolve => setImmediate(resolve))
    expect(getEventListeners(signal, 'abort'), name).toHaveLength(0)
  }
  process.off('warning', warned)
  expect(warned).not.toHaveBeenCalled()
})

it('a signal destroys the streams that it was given to', async () => {
  await using image = await open(at('disk.qcow2'), { flags: 'r+' })
  const kinds = [
    (signal: AbortSignal) => image.createReadStream({ signal }),
    (signal: AbortSignal) => image.createWriteStream({ signal }),
  ]
  for (const make of kinds) {
    const controller = new AbortController()
    const stream = make(controller.signal)
    const ended = expect(finished(stream)).rejects.toMatchObject({ name: 'AbortError', cause: 'enough' })
    controller.abort('enough')
    await ended
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(0)
    const late = make(AbortSignal.abort('before'))
    await expect(finished(late)).rejects.toMatchObject({ name: 'AbortError', cause: 'before' })
  }
})

it('one signal serves as many jobs and clones as there are, without a warning', async () => {
  const warned = vi.fn()
  process.on('warning', warned)
  const { signal } = new AbortController()
  await using image = await open(at('disk.qcow2'))
  const many = Array.from({ length: 24 }, (_, n) =>
    n % 2 === 0 ? check(at('disk.qcow2'), { signal }) : image.clone(at(`clone-${n}`), { to: 'raw', signal }),
  )
  expect(getEventListeners(signal, 'abort').length).toBeLessThanOrEqual(1)
  await Promise.all(many)
  await new Promise(resolve => setTimeout(resolve, 5))
  process.off('warning', warned)
  expect(warned).not.toHaveBeenCalled()
  expect(getEventListeners(signal, 'abort')).toHaveLength(0)
  for (let n = 1; n < 24; n += 2) rmSync(at(`clone-${n}`))
})

describe('progress', () => {
  it('goes up, in bytes, and ends at 100 %', async () => {
    const seen: Progress[] = []
    const onProgress = (progress: Progress): void => void seen.push(progress)
    await convert(at('disk.raw'), at('progress.qcow2'), {
      from: 'raw',
      to: 'qcow2',
      compress: true,
      onProgress,
      progressInterval: 1,
    })
    expect(seen.length).toBeGreaterThan(2)
    expect(seen.at(-1)).toMatchObject({ phase: 'convert', current: SIZE, total: SIZE })
    expect(seen.every(({ phase, total, current }) => phase === 'convert' && current <= total)).toBe(true)
    const counts = seen.map(({ current }) => current)
    expect(counts).toEqual(counts.toSorted((a, b) => a - b))
  })

  it('has the steps of a job that is done before anybody looks', async () => {
    const seen: Progress[] = []
    const options = {
      onProgress: (progress: Progress) => void seen.push(progress),
      progressInterval: 2 ** 31 - 1,
      overwrite: true,
    }
    await check(at('tables.qcow2'), { onProgress: options.onProgress, progressInterval: options.progressInterval })
    await convert(at('disk.qcow2'), at('steps.raw'), { to: 'raw', ...options })
    // Of what is copied, with or without work for several threads: as qemu-img cuts it.
    for (const concurrency of [1, 4]) {
      await convert(at('disk.qcow2'), at('steps.raw'), { to: 'raw', countData: true, concurrency, ...options })
    }
    const [checked, whole, ...data] = seen
    for (const { steps, total } of seen) {
      expect(steps.length).toBeGreaterThan(10)
      expect(steps.length).toBeLessThanOrEqual(100)
      expect(steps).toEqual(steps.toSorted((a, b) => a - b))
      expect(steps.at(-1)).toBe(total)
    }
    expect([checked?.phase, whole?.total]).toEqual(['check', SIZE])
    for (const { total, steps } of data) {
      expect(total).toBe(32 * MIB)
      expect(steps).toEqual(Array.from({ length: 16 }, (_, index) => (index + 1) * 2 * MIB))
    }
    // What was told once is not told again.
    const often: Progress[] = []
    const onProgress = (progress: Progress) => void often.push(progress)
    await convert(at('disk.qcow2'), at('steps.raw'), {
      to: 'raw',
      countData: true,
      ...options,
      onProgress,
      progressInterval: 1,
    })
    expect(often.flatMap(({ steps }) => steps)).toEqual(data[0]?.steps)
  })

  it('is not awaited', async () => {
    const never = vi.fn(() => new Promise<void>(() => {}))
    await check(at('disk.qcow2'), { onProgress: never, progressInterval: 1 })
    expect(never).toHaveBeenCalled()
  })

  it('is not reported after a failure', async () => {
    const onProgress = vi.fn()
    await failure(() => convert(at('disk.raw'), at('no/such/folder'), { from: 'raw', to: 'raw', onProgress }))
    expect(onProgress).not.toHaveBeenCalled()
  })
})

it('an AbortError is a Qcow2Error, by whatever name it is caught', async () => {
  const error = await failure(() => probe(source(), { signal: AbortSignal.abort() }))
  expect(error).toBeInstanceOf(Qcow2Error)
  expect(error.toString()).toBe('AbortError: The operation was aborted')
  expect(error.cause).toMatchObject({ name: 'AbortError' })
  const timeout = await failure(async () => {
    const signal = AbortSignal.timeout(1)
    await new Promise(resolve => setTimeout(resolve, 20))
    return probe(source(), { signal })
  })
  expect(timeout.cause).toMatchObject({ name: 'TimeoutError' })
})

describe('a change of guest bytes that is cancelled in the middle', () => {
  const TEBIBYTE = 2 ** 40
  const PATIENCE = 10_000

  it.each(['writeZeroes', 'discard'] as const)('%s of 8 TiB stops soon and says what is done', async name => {
    const path = at(`${name}.qcow2`)
    await using image = await create(path, { size: 8 * TEBIBYTE, clusterSize: 512 * 1024 })
    await image.close()
    await using large = await open(path, { flags: 'r+', discard: 'unmap' })
    // Something to give up everywhere: a fresh disk has nothing.
    await large.writeZeroes(0, TEBIBYTE)
    const controller = new AbortController()
    const begun = performance.now()
    setTimeout(() => controller.abort('enough'), 20)
    const error = await failure(async () => {
      // Again and again, should the machine be fast.
      while (performance.now() - begun < PATIENCE) {
        await large[name](0, 8 * TEBIBYTE, { signal: controller.signal })
      }
    })
    expect(error).toMatchObject({ code: 'ABORT_ERR', cause: 'enough' })
    expect(performance.now() - begun).toBeLessThan(PATIENCE)
    expect(getEventListeners(controller.signal, 'abort')).toHaveLength(0)
    const { bytesDone } = error as AbortError
    if (bytesDone !== undefined) {
      expect(bytesDone).toBeLessThan(8 * TEBIBYTE)
      expect(bytesDone % 2 ** 30).toBe(0)
      expect(error.message).toBe(`The operation was aborted: ${bytesDone} bytes were done`)
    }
    await large.close()
    rmSync(path)
  })

  const parted = async (bytesDone: number, size: number, read: (b: Buffer) => Promise<unknown>) => {
    const disk = Buffer.alloc(size)
    await read(disk)
    return { done: disk.subarray(0, bytesDone), rest: disk.subarray(bytesDone) }
  }

  it.each([
    ['write', false],
    ['write', true],
    ['writev', false],
  ] as const)(
    '%s (compressed: %s) has written the bytes that it says, and none behind them',
    async (name, compressed) => {
      const path = at(`${name}-${compressed}.qcow2`)
      const size = 256 * MIB
      await using image = await create(path, { size })
      const bytes = Buffer.alloc(size)
      for (let i = 0; i < size; i += 4096) bytes.writeUInt32LE(i / 4096 + 1, i)
      const controller = new AbortController()
      const { signal } = controller
      const writing =
        name === 'write'
          ? image.write(bytes, { position: 0, compressed, signal })
          : image.writev([bytes.subarray(0, 100 * MIB), bytes.subarray(100 * MIB)], 0, { signal })
      setImmediate(() => controller.abort())
      const error = (await failure(() => writing)) as AbortError
      expect(error).toMatchObject({ code: 'ABORT_ERR' })
      const bytesDone = error.bytesDone ?? Number.NaN
      expect(bytesDone).toBeLessThan(size)
      const { done, rest } = await parted(bytesDone, size, b => image.read(b, { position: 0 }))
      expect(done.equals(bytes.subarray(0, bytesDone))).toBe(true)
      expect(rest.equals(Buffer.alloc(rest.length))).toBe(true)
      await image.close()
      expect((await check(path)).ok).toBe(true)
      rmSync(path)
    },
  )

  it('a snapshot that is not yet made is not made, and the disk can go on', async () => {
    const path = at('snapshots.qcow2')
    await using image = await create(path, { size: 2 ** 28, clusterSize: 512, preallocation: 'metadata' })
    const controller = new AbortController()
    const making = image.snapshots.create('made', { signal: controller.signal })
    setTimeout(() => controller.abort(), 5)
    const error = await failure(() => making)
    expect(error).toMatchObject({ code: 'ABORT_ERR' })
    expect(error).not.toHaveProperty('bytesDone')
    expect(await image.snapshots.list()).toEqual([])
    await image.write(Buffer.alloc(4096, 7), { position: 0 })
    await image.snapshots.create('made')
    await image.close()
    expect((await check(path)).ok).toBe(true)
    rmSync(path)
  })
})
