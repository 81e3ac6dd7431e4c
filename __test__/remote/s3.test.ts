/** Objects of a real S3-compatible store as disks and as targets, through a proxy that passes on, cuts, lies and hangs. */

import { spawnSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { mkdirSync, readdirSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import {
  CreateBucketCommand,
  ListMultipartUploadsCommand,
  ListObjectsV2Command,
  PutBucketVersioningCommand,
  S3Client,
  type S3ClientConfig,
} from '@aws-sdk/client-s3'
import {
  compare,
  convert,
  type Progress,
  type RandomAccessSource,
  type S3SourceOptions,
  type S3TargetOptions,
  s3Source,
  s3Target,
  type UploadResult,
} from 'qcow2'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { failure, temporaryFolder, writeRaw } from '../api/fixtures.js'
import { altered, cut, type Fault, FaultProxy, mute, reset, status } from './proxy.js'
import { hasS3, S3_CREDENTIALS, type Serving, startS3 } from './servers.js'

const MIB = 2 ** 20
const PART = 5 * MIB
const SIZE = 2 * PART + 1000
const never = new AbortController().signal

describe.skipIf(!hasS3())('S3', () => {
  const folder = temporaryFolder()
  const disk = randomBytes(SIZE)
  let server: Serving
  let proxy: FaultProxy
  let client: S3Client
  let number = 0

  beforeAll(async () => {
    server = await startS3(folder)
    proxy = await FaultProxy.start(server.upstream)
    // As it is by default, checksums included.
    client = clientWith({})
    for (const Bucket of ['images', 'versions']) await client.send(new CreateBucketCommand({ Bucket }))
    const VersioningConfiguration = { Status: 'Enabled' } as const
    await client.send(new PutBucketVersioningCommand({ Bucket: 'versions', VersioningConfiguration }))
    await upload('disk')
  })

  afterAll(async () => {
    client.destroy()
    await proxy.stop()
    await server.stop()
  })

  beforeEach(() => proxy.reset())

  const clientWith = (config: S3ClientConfig): S3Client =>
    new S3Client({
      region: 'us-east-1',
      endpoint: proxy.origin,
      forcePathStyle: true,
      credentials: { ...S3_CREDENTIALS },
      ...config,
    })
  const place = (key: string) => ({
    bucket: 'images',
    key,
    endpoint: proxy.origin,
    credentials: S3_CREDENTIALS,
    retries: 2,
    retryDelay: 1,
  })
  const fresh = (): string => {
    number += 1
    return `object-${number}`
  }
  const chunks = (bytes: Buffer, size = 100_000): Readable =>
    Readable.from(
      (function* () {
        for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size)
      })(),
    )
  const target = (key: string, options: Partial<S3TargetOptions> = {}) =>
    s3Target({ ...place(key), partSize: PART, ...options })
  const upload = (key: string, bytes = disk, options: Partial<S3TargetOptions> = {}): Promise<UploadResult> =>
    target(key, options).upload(chunks(bytes))
  const source = (key: string, options: Partial<S3SourceOptions> = {}): Promise<RandomAccessSource> =>
    s3Source({ ...place(key), ...options })

  async function same(from: RandomAccessSource, bytes: Buffer, position = 0, length = bytes.length): Promise<void> {
    const buffer = Buffer.alloc(length)
    expect(await from.read(buffer, position, never)).toBe(length)
    expect(buffer.equals(bytes.subarray(position, position + length))).toBe(true)
  }

  /** What a failed upload must leave of a key: nothing. */
  async function nothingLeft(key: string): Promise<void> {
    proxy.reset()
    const { Uploads = [] } = await client.send(new ListMultipartUploadsCommand({ Bucket: 'images' }))
    expect(Uploads.map(({ Key }) => Key)).toEqual([])
    const { Contents = [] } = await client.send(new ListObjectsV2Command({ Bucket: 'images', Prefix: key }))
    expect(Contents).toEqual([])
  }

  it('puts objects and reads them, small, empty and in parts', async () => {
    const plain = clientWith({
      requestChecksumCalculation: 'WHEN_REQUIRED',
      responseChecksumValidation: 'WHEN_REQUIRED',
    })
    for (const given of [{}, { client }, { client: plain }]) {
      const own = 'client' in given ? { ...given, endpoint: undefined, credentials: undefined } : {}
      for (const [length, requests] of [
        [0, 2],
        [1000, 2],
        [PART, 4],
        [PART + 1, 5],
      ] as const) {
        const key = fresh()
        proxy.reset()
        const done = await upload(key, disk.subarray(0, length), own)
        expect(done).toEqual({ bytesWritten: length, etag: expect.stringMatching(/^"/) })
        expect(proxy.seen).toHaveLength(requests)
        const from = await source(key, own)
        expect(from).toMatchObject({ size: length, name: `s3://images/${key}` })
        await same(from, disk.subarray(0, length))
        await from.close?.()
      }
    }
    plain.destroy()
  })

  it('reads with one request for what is asked, and none for the beginning', async () => {
    const from = await source('disk')
    expect(proxy.seen).toEqual([`bytes=0-${MIB - 1}`])
    await same(from, disk, 0, MIB)
    await same(from, disk, 7, 512)
    expect(proxy.seen).toHaveLength(1)
    await same(from, disk, SIZE - 10, 10)
    await same(from, disk, MIB - 1, 2)
    expect(proxy.seen).toEqual([`bytes=0-${MIB - 1}`, `bytes=${SIZE - 10}-${SIZE - 1}`, `bytes=${MIB - 1}-${MIB}`])
    expect(proxy.headers.at(-1)?.['if-match']).toMatch(/^"/)
    await from.close?.()
    await same(from, disk, 0, 10)
    await Promise.all(Array.from({ length: 16 }, (_, i) => same(from, disk, i * 100_000, 100_000)))
    expect((await source('disk')).identity).toBe(from.identity)
    const error = await failure(async () => from.read(Buffer.alloc(2), SIZE - 1, never))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'position' })
  })

  it('notices an object that is replaced, unless the store keeps versions', async () => {
    const key = fresh()
    await upload(key, disk.subarray(0, 2 * MIB))
    const from = await source(key)
    await upload(key, disk.subarray(MIB, 3 * MIB), { overwrite: true })
    expect(await failure(() => same(from, disk, MIB, 512))).toMatchObject({
      code: 'ERR_QCOW2_SOURCE_CHANGED',
      path: `s3://images/${key}`,
    })
    // A store that does not look at conditions: its ETag tells.
    const other = await source(key)
    proxy.always = altered({ etag: '"other"' })
    expect(await failure(() => same(other, disk, MIB, 512))).toMatchObject({ code: 'ERR_QCOW2_SOURCE_CHANGED' })
    proxy.reset()
    const old = await upload(key, disk.subarray(0, 2 * MIB), { bucket: 'versions' })
    const kept = await source(key, { bucket: 'versions' })
    const replaced = await upload(key, Buffer.alloc(2 * MIB), { bucket: 'versions', overwrite: true })
    expect(replaced.versionId).not.toBe(old.versionId)
    await same(kept, disk, MIB, 512)
    await same(await source(key, { bucket: 'versions', versionId: old.versionId }), disk, MIB, 512)
    await same(await source(key, { bucket: 'versions' }), Buffer.alloc(2 * MIB), MIB, 512)
  })

  it('replaces an object only where that is allowed', async () => {
    const key = fresh()
    await upload(key, disk.subarray(0, 100))
    proxy.reset()
    expect(await failure(() => upload(key))).toMatchObject({ code: 'EEXIST', path: `s3://images/${key}` })
    expect(proxy.seen).toHaveLength(1)
    // Who may not look is refused by the store.
    const blind = status(403)
    for (const length of [100, PART + 1]) {
      proxy.reset(blind)
      expect(await failure(() => upload(key, disk.subarray(0, length)))).toMatchObject({ code: 'EEXIST' })
    }
    proxy.reset()
    await same(await source(key), disk.subarray(0, 100))
    expect((await upload(key, disk.subarray(0, PART + 1), { overwrite: true })).bytesWritten).toBe(PART + 1)
    await same(await source(key), disk.subarray(0, PART + 1))
  })

  it('says what is not there and what is not allowed', async () => {
    const SECRET = 'hunter2'
    const wrong = { credentials: { accessKeyId: 'key', secretAccessKey: SECRET } }
    for (const [call, code, syscall] of [
      [() => source('none'), 'ENOENT', 'GetObject'],
      [() => source('disk', { bucket: 'none' }), 'ENOENT', 'GetObject'],
      [() => source('disk', wrong), 'EACCES', 'GetObject'],
      [() => upload(fresh(), disk, { bucket: 'none' }), 'ENOENT', 'CreateMultipartUpload'],
      [() => upload(fresh(), disk.subarray(0, 9), { bucket: 'none' }), 'ENOENT', 'PutObject'],
      [() => upload(fresh(), disk, wrong), 'EACCES', 'CreateMultipartUpload'],
    ] as const) {
      const error = await failure(call)
      expect(error).toMatchObject({ code, syscall, cause: expect.any(Error) })
      expect(error.message).not.toContain(SECRET)
    }
    const { bucket, key } = place('disk')
    for (const [options, field] of [
      [{ key }, 'bucket'],
      [{ bucket }, 'key'],
      [{ bucket, key, client, region: 'x' }, 'region'],
      [{ bucket, key, client: {} }, 'client'],
      [{ bucket, key, credentials: { accessKeyId: SECRET } }, 'credentials'],
      [{ bucket, key, timeout: 1 }, 'timeout'],
    ] as const) {
      const invalid = { code: 'ERR_QCOW2_INVALID_ARGUMENT', field }
      expect(await failure(() => s3Source(options as never))).toMatchObject(invalid)
      expect(() => s3Target(options as never)).toThrow(expect.objectContaining(invalid))
    }
    for (const [options, field] of [
      [{ partSize: PART - 1 }, 'partSize'],
      [{ parameters: { IfNoneMatch: '*' } }, 'parameters'],
      [{ concurrency: 0 }, 'concurrency'],
    ] as const) {
      expect(() => target('x', options)).toThrow(expect.objectContaining({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field }))
    }
    expect(await failure(() => target('x').upload('bytes' as never))).toMatchObject({ field: 'bytes' })
    expect(await failure(() => target('x').upload(Readable.from(['text'])))).toMatchObject({ field: 'bytes' })
    const big = target('x').upload(chunks(disk), { byteLength: 10_001 * PART })
    expect(await failure(() => big)).toMatchObject({ code: 'ERR_QCOW2_LIMIT', field: 'partSize' })
  })

  it.each<readonly [string, Fault]>([
    ['a connection that is reset', reset],
    ['status 503', status(503)],
    ['silence', mute],
    ['a body that is cut short', cut(100_000)],
  ])('reads on after %s', async (what, fault) => {
    const from = await source('disk', what === 'silence' ? { silenceTimeout: 600 } : {})
    proxy.reset(fault)
    await same(from, disk, MIB, MIB)
    const again = what.startsWith('a body') ? MIB + 100_000 : MIB
    expect(proxy.seen).toEqual([`bytes=${MIB}-${2 * MIB - 1}`, `bytes=${again}-${2 * MIB - 1}`])
  })

  it.each<readonly [string, Fault, string]>([
    ['another range', altered({ 'content-range': `bytes 0-${MIB - 1}/${SIZE}` }), 'ERR_QCOW2_IO'],
    [
      'another size',
      altered({ 'content-range': `bytes ${MIB}-${2 * MIB - 1}/${SIZE + 1}` }),
      'ERR_QCOW2_SOURCE_CHANGED',
    ],
    ['the whole object', altered({ 'content-range': undefined }, 200), 'ERR_QCOW2_UNSUPPORTED_FEATURE'],
    ['403', status(403), 'EACCES'],
    ['no XML', status(400), 'ERR_QCOW2_IO'],
  ])('ends where the store answers with %s', async (_, fault, code) => {
    const from = await source('disk')
    proxy.reset(fault)
    expect(await failure(() => same(from, disk, MIB, MIB))).toMatchObject({ code, path: 's3://images/disk' })
    expect(proxy.seen).toHaveLength(1)
    await same(from, disk, MIB, 512)
  })

  it('uploads on after what passes', async () => {
    for (const fault of [reset, status(503), status(500)]) {
      const key = fresh()
      // To look, to begin, two parts and a rest, to end.
      const pass: Fault = ({ forward }) => forward()
      proxy.reset(fault, pass, fault, pass, fault, fault, pass, pass, pass, fault)
      expect((await upload(key)).bytesWritten).toBe(SIZE)
      expect(proxy.seen.length).toBeGreaterThan(9)
      proxy.reset()
      await same(await source(key), disk)
    }
    // The answer to the last request is lost: what it did is seen.
    const key = fresh()
    proxy.always = ({ request, response, forward }) => {
      const last = request.method === 'POST' && /\?uploadId=/.test(request.url ?? '')
      forward(last ? () => response.destroy() : undefined)
    }
    expect(await upload(key)).toMatchObject({ bytesWritten: SIZE, etag: expect.stringMatching(/-3"$/) })
    proxy.reset()
    await same(await source(key), disk)
  })

  /** A fault of some requests. */
  const on =
    (what: RegExp, fault: Fault): Fault =>
    exchange =>
      what.test(`${exchange.request.method} ${exchange.request.url}`) ? fault(exchange) : exchange.forward()

  it('leaves nothing of what fails', async () => {
    const mine = new Error('mine')
    async function* broken(): AsyncGenerator<Uint8Array> {
      yield disk.subarray(0, PART + 10)
      throw mine
    }
    for (const stream of [broken(), Readable.from(broken())]) {
      const key = fresh()
      await expect(target(key).upload(stream)).rejects.toBe(mine)
      await nothingLeft(key)
    }
    for (const [fault, code, options] of [
      [on(/partNumber=2/, status(503)), 'ERR_QCOW2_IO', {}],
      [on(/partNumber=2/, reset), expect.stringMatching(/^(?:ECONNRESET|EPIPE)$/), {}],
      [on(/partNumber=3/, status(403)), 'EACCES', {}],
      [on(/POST .*uploadId/, status(400)), 'ERR_QCOW2_IO', {}],
      [on(/DELETE/, status(503)), 'ERR_QCOW2_IO', { byteLength: SIZE + 1 }],
      [undefined, 'ERR_QCOW2_IO', { byteLength: SIZE + 1 }],
      [undefined, 'ERR_QCOW2_IO', { byteLength: SIZE - 1 }],
      [undefined, 'ERR_QCOW2_IO', { byteLength: PART }],
    ] as const) {
      const key = fresh()
      const stream = chunks(disk)
      proxy.reset()
      if (fault !== undefined) proxy.always = fault
      const error = await failure(() => target(key, { retries: 1 }).upload(stream, options))
      expect(error).toMatchObject({ code, path: `s3://images/${key}` })
      expect(stream.destroyed).toBe(true)
      if (fault !== undefined && 'byteLength' in options) {
        // Where the store does not let go, the upload is named.
        const [, id = ''] = /abort the upload (\S+) of/.exec(error.message) ?? []
        const left = await client.send(new ListMultipartUploadsCommand({ Bucket: 'images' }))
        expect(left.Uploads?.map(({ UploadId }) => UploadId)).toEqual([id])
        const again = s3Target({ ...place(key) })
        expect(again.name).toBe(error.path)
        const { AbortMultipartUploadCommand } = await import('@aws-sdk/client-s3')
        proxy.reset()
        await client.send(new AbortMultipartUploadCommand({ Bucket: 'images', Key: key, UploadId: id }))
      }
      await nothingLeft(key)
    }
    const key = fresh()
    const onProgress = () => Promise.reject(mine)
    await expect(target(key).upload(chunks(disk), { onProgress })).rejects.toBe(mine)
    await nothingLeft(key)
  })

  it('is stopped at once, and leaves nothing', async () => {
    const reason = new Error('enough')
    for (const [name, what, stream] of [
      ['a stream that hangs', undefined, () => new Readable({ read() {} })],
      ['a part that hangs', /partNumber=2/, () => chunks(disk)],
      ['a look that hangs', /HEAD/, () => chunks(disk)],
    ] as const) {
      const key = fresh()
      const controller = new AbortController()
      proxy.reset()
      if (what !== undefined) proxy.always = on(what, mute)
      setTimeout(() => controller.abort(reason), 200)
      const begin = performance.now()
      const from = stream()
      const error = await failure(() => target(key).upload(from, { signal: controller.signal }))
      expect(error, name).toMatchObject({ name: 'AbortError', cause: reason })
      expect(performance.now() - begin).toBeLessThan(3000)
      expect(from.destroyed).toBe(true)
      await nothingLeft(key)
    }
    const signal = AbortSignal.abort(reason)
    await expect(source('disk', { signal })).rejects.toMatchObject({ name: 'AbortError', cause: reason })
    const from = await source('disk')
    const controller = new AbortController()
    proxy.reset()
    proxy.always = exchange => {
      mute(exchange)
      setTimeout(() => controller.abort(reason), 20)
    }
    await expect(from.read(Buffer.alloc(512), MIB, controller.signal)).rejects.toMatchObject({ name: 'AbortError' })
  })

  it('holds few parts in memory, and tells how far it is', async () => {
    const told: Progress[] = []
    let given = 0
    let ahead = 0
    async function* stream(): AsyncGenerator<Uint8Array> {
      for (let i = 0; i < 32; i++) {
        given += MIB
        ahead = Math.max(ahead, given - (told.at(-1)?.current ?? 0))
        yield disk.subarray(0, MIB)
      }
    }
    const onProgress = (progress: Progress) => void told.push(progress)
    const done = await target(fresh(), { concurrency: 2 }).upload(stream(), { byteLength: 32 * MIB, onProgress })
    expect(done.bytesWritten).toBe(32 * MIB)
    expect(ahead).toBeLessThanOrEqual(3 * PART + MIB)
    expect(told).toHaveLength(7)
    expect(told.at(-1)).toMatchObject({ phase: 'upload', current: 32 * MIB, total: 32 * MIB })
  })

  it('is what a disk is converted into, and from', async () => {
    const raw = writeRaw(join(folder, 'disk.raw'), 24 * MIB, [
      [0, MIB],
      [16 * MIB, 6 * MIB],
    ])
    const key = fresh()
    const told: Progress[] = []
    const onProgress = (progress: Progress) => void told.push(progress)
    const options = { from: 'raw', to: 'qcow2' } as const
    const done = await convert(raw, target(key), { ...options, onProgress })
    expect(done.virtualSize).toBe(24 * MIB)
    expect(done.bytesWritten).toBeGreaterThan(7 * MIB)
    expect(told.at(-1)).toMatchObject({ phase: 'convert', current: 24 * MIB, total: 24 * MIB })
    proxy.reset()
    const object = await source(key)
    expect(object.size).toBe(done.bytesWritten)
    expect(await compare(object, raw, { formatB: 'raw' })).toMatchObject({ identical: true })
    expect(new Set(proxy.seen).size).toBe(proxy.seen.length)
    // From store to store, nothing of it on a disk.
    const copy = fresh()
    await convert(await source(key), target(copy), { to: 'raw', bigint: true })
    expect(await compare(await source(copy), raw, { formatA: 'raw', formatB: 'raw' })).toMatchObject({
      identical: true,
    })
    // What is compressed is counted first, and that is the first half.
    told.length = 0
    const packed = fresh()
    const small = await convert(raw, target(packed), { ...options, compress: true, durable: true, onProgress })
    expect(small.bytesWritten).toBeLessThan(done.bytesWritten / 2)
    expect(told.map(({ current, total }) => current <= total)).not.toContain(false)
    expect(told.at(-1)).toMatchObject({ phase: 'convert', current: told.at(-1)?.total })
    expect(await compare(await source(packed), raw, { formatB: 'raw' })).toMatchObject({ identical: true })
    await expect(convert(raw, target(key), options)).rejects.toMatchObject({ code: 'EEXIST' })
    for (const [more, field] of [
      [{ to: 'vhdx' }, 'to'],
      [{ rate: 1000 }, 'rate'],
      [{ overwrite: true }, 'overwrite'],
      [{ encrypt: {} }, 'encrypt'],
      [{ create: { preallocation: 'full' } }, 'preallocation'],
    ] as const) {
      const refused = convert(raw, target('x'), { ...options, ...more } as never)
      await expect(refused, field).rejects.toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field })
    }
    const controller = new AbortController()
    const stopped = fresh()
    proxy.always = on(/partNumber/, exchange => {
      mute(exchange)
      controller.abort()
    })
    const { signal } = controller
    await expect(convert(raw, target(stopped), { ...options, signal })).rejects.toMatchObject({ name: 'AbortError' })
    await nothingLeft(stopped)
    // A source that breaks off is the error, and leaves no object.
    const broken = { size: 24 * MIB, read: () => Promise.reject(new Error('gone')), name: 'mine' }
    await expect(convert(broken, target(stopped), options)).rejects.toMatchObject({
      code: 'ERR_QCOW2_IO',
      path: 'mine',
    })
    await nothingLeft(stopped)
  })

  it.skipIf(process.platform === 'win32')('says which package is missing', () => {
    const dist = fileURLToPath(new URL('../../dist', import.meta.url))
    const alone = join(folder, 'alone')
    mkdirSync(alone)
    for (const name of readdirSync(dist)) symlinkSync(join(dist, name), join(alone, name))
    const program = `require('./alone/index.js').s3Source({ bucket: 'b', key: 'k' }).catch(error => console.log(error.code, error.message))`
    const flags = ['--preserve-symlinks', '--preserve-symlinks-main', '-e', program]
    const { stdout, stderr } = spawnSync(process.execPath, flags, { cwd: folder, encoding: 'utf8' })
    expect({ stdout, stderr }).toEqual({
      stdout:
        "ERR_QCOW2_UNSUPPORTED_FEATURE s3Source needs the package '@aws-sdk/client-s3', which cannot be loaded: npm install @aws-sdk/client-s3\n",
      stderr: '',
    })
  })
})
