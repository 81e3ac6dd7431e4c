/** Disks on a real web server, through a proxy that passes on, cuts, delays, lies and hangs. */

import { appendFileSync, mkdirSync, writeFileSync } from 'node:fs'
import { createServer, type IncomingMessage } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import { inspect as show } from 'node:util'
import { type HttpSourceOptions, httpSource, type Qcow2Error, type RandomAccessSource } from 'qcow2'
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest'
import { failure, pattern, temporaryFolder } from '../api/fixtures.js'
import { altered, cut, endless, type Fault, FaultProxy, mute, reset, status } from './proxy.js'
import { has, type Serving, startNginx } from './servers.js'

const MIB = 2 ** 20
const SIZE = 3 * MIB + 100
const QUICK = { retryDelay: 1, retries: 2 } as const
/** For servers that are silent: others may be slow on a machine that is busy. */
const IMPATIENT = { silenceTimeout: 500 } as const
const never = new AbortController().signal

describe.skipIf(!has('nginx', 'nothing was asked of a web server'))('httpSource', () => {
  const folder = temporaryFolder()
  const files = join(folder, 'files')
  const disk = pattern(0, SIZE)
  let server: Serving
  let proxy: FaultProxy

  beforeAll(async () => {
    mkdirSync(files)
    writeFileSync(join(files, 'disk.raw'), disk)
    writeFileSync(join(files, 'small.raw'), disk.subarray(0, 700))
    writeFileSync(join(files, 'empty.raw'), '')
    server = await startNginx(folder, files)
    proxy = await FaultProxy.start(server.upstream)
  })

  afterAll(async () => {
    await proxy.stop()
    await server.stop()
  })

  beforeEach(() => proxy.reset())

  const at = (name: string): string => `${proxy.origin}/${name}`
  const source = (name = 'disk.raw', options: HttpSourceOptions = {}): Promise<RandomAccessSource> =>
    httpSource(at(name), { ...QUICK, ...options })

  async function take(from: RandomAccessSource, position: number, length: number, signal = never): Promise<Buffer> {
    const buffer = Buffer.alloc(length)
    expect(await from.read(buffer, position, signal)).toBe(length)
    return buffer
  }

  /** What is read is what is there. Not with `toEqual`, which takes its time for each byte. */
  async function same(from: RandomAccessSource, position: number, length: number): Promise<void> {
    const taken = await take(from, position, length)
    expect({ position, length, same: taken.equals(disk.subarray(position, position + length)) }).toMatchObject({
      same: true,
    })
  }

  /** The range that a request asks for, as an answer has it. */
  const claimed = ({ headers }: IncomingMessage): string => `${headers.range?.replace('=', ' ')}/${SIZE}`

  it('reads what is there, and begins with one request', async () => {
    proxy.reset()
    const opened = await source('disk.raw?token=secret#part')
    expect(opened).toMatchObject({ size: SIZE, concurrency: 8, name: `${at('disk.raw')}?…` })
    expect(proxy.seen).toEqual([`bytes=0-${MIB - 1}`])
    await same(opened, 0, MIB)
    await same(opened, 17, 512)
    expect(proxy.seen).toHaveLength(1)
    for (const [position, length] of [
      [MIB - 1, 2],
      [MIB, MIB],
      [SIZE - 1, 1],
      [0, SIZE],
      [SIZE, 0],
    ] as const) {
      await same(opened, position, length)
    }
    expect(proxy.seen).toHaveLength(5)
    expect(proxy.headers.at(-1)).toMatchObject({
      'accept-encoding': 'identity',
      'if-match': expect.stringMatching(/^"/),
    })
    const parts = Array.from({ length: 32 }, (_, i) => take(opened, MIB + i * 4096, 4096))
    expect(Buffer.concat(await Promise.all(parts)).equals(disk.subarray(MIB, MIB + 32 * 4096))).toBe(true)
    // What was kept is forgotten, and the source is as good as new.
    await opened.close?.()
    await same(opened, 0, 512)
    expect((await source('disk.raw?token=secret')).identity).toBe(opened.identity)
    expect((await source()).identity).not.toBe(opened.identity)
    for (const [position, length] of [
      [SIZE, 1],
      [-1, 1],
      [0.5, 1],
    ] as const) {
      const error = await failure(async () => opened.read(Buffer.alloc(length), position, never))
      expect(error).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT', field: 'position' })
    }
  })

  it('reads files that are smaller than what is asked for first', async () => {
    const small = await source('small.raw')
    expect(small.size).toBe(700)
    await same(small, 100, 600)
    expect((await source('empty.raw')).size).toBe(0)
    proxy.reset(status(416, { 'content-range': 'bytes */0' }))
    expect((await source('empty.raw')).size).toBe(0)
  })

  const PASSING: readonly (readonly [string, Fault, readonly string[] | undefined])[] = [
    ['a connection that is reset', reset, undefined],
    ...[408, 425, 500, 502, 503, 504].map(code => [`status ${code}`, status(code), undefined] as const),
    ['status 429 with Retry-After', status(429, { 'retry-after': '0' }), undefined],
    ['silence', mute, undefined],
    [
      'silence behind the headers',
      ({ request, response }) => {
        response.writeHead(206, { 'content-range': claimed(request) }).flushHeaders()
      },
      undefined,
    ],
    [
      'a body that is cut short',
      cut(100_000),
      [`bytes=${MIB}-${2 * MIB - 1}`, `bytes=${MIB + 100_000}-${2 * MIB - 1}`],
    ],
  ]

  it.each(PASSING)('goes on after %s', async (...[what, fault, asked]) => {
    const options = what.startsWith('silence') ? IMPATIENT : {}
    const opened = await source('disk.raw', options)
    proxy.reset(fault)
    await same(opened, MIB, MIB)
    if (asked !== undefined) expect(proxy.seen).toEqual(asked)
    proxy.reset(fault)
    expect((await source('disk.raw', options)).size).toBe(SIZE)
  })

  const RANGE = `bytes ${MIB}-${2 * MIB - 1}/${SIZE}`
  const FATAL: readonly (readonly [string, Fault, string, RegExp])[] = [
    [
      'another range',
      altered({ 'content-range': `bytes 0-${MIB - 1}/${SIZE}` }),
      'ERR_QCOW2_IO',
      /bytes 0-\d+, and was/,
    ],
    ['a shorter range', altered({ 'content-range': `bytes ${MIB}-${MIB}/${SIZE}` }), 'ERR_QCOW2_IO', /was asked for/],
    [
      'another size',
      altered({ 'content-range': `bytes ${MIB}-${2 * MIB - 1}/${2 * SIZE}` }),
      'ERR_QCOW2_SOURCE_CHANGED',
      /it has \d+ bytes/,
    ],
    ['no size', altered({ 'content-range': `bytes ${MIB}-${2 * MIB - 1}/*` }), 'ERR_QCOW2_IO', /does not tell/],
    [
      'a size that is none',
      altered({ 'content-range': `bytes ${MIB}-${2 * MIB - 1}/9e9` }),
      'ERR_QCOW2_IO',
      /without a/,
    ],
    ['no Content-Range', altered({ 'content-range': undefined }), 'ERR_QCOW2_IO', /without a Content-Range/],
    ['several parts', altered({ 'content-type': 'multipart/byteranges; boundary=x' }), 'ERR_QCOW2_IO', /several parts/],
    ['an encoding', altered({ 'content-encoding': 'gzip' }), 'ERR_QCOW2_UNSUPPORTED_FEATURE', /Content-Encoding/],
    ['the whole file', status(200), 'ERR_QCOW2_UNSUPPORTED_FEATURE', /whole file.*download/],
    ['another ETag', altered({ etag: '"other"' }), 'ERR_QCOW2_SOURCE_CHANGED', /another ETag/],
    [
      'another Last-Modified',
      altered({ etag: undefined, 'last-modified': 'Thu, 01 Jan 2026' }),
      'ERR_QCOW2_SOURCE_CHANGED',
      /Last-Modified/,
    ],
    ['a longer body', altered({ 'content-length': `${MIB + 1}` }), 'ERR_QCOW2_IO', /1048577 bytes, where/],
    ['a status for good', status(418), 'ERR_QCOW2_IO', /status 418/],
    [
      'the end of a file that is shorter',
      status(416, { 'content-range': 'bytes */100' }),
      'ERR_QCOW2_SOURCE_CHANGED',
      /it has 100 bytes/,
    ],
    ['403', status(403), 'EACCES', /status 403/],
    ['404', status(404), 'ENOENT', /status 404/],
    ['a redirect without a place', status(302), 'ERR_QCOW2_IO', /says not where/],
    ['a redirect to a file', status(302, { location: 'file:///etc/passwd' }), 'ERR_QCOW2_IO', /no address on the web/],
    ['no HTTP', ({ request }) => void request.socket.end('220 this is another protocol\r\n'), 'ERR_QCOW2_IO', /./],
  ]

  it.each(FATAL)('ends where the server answers with %s', async (_, fault, code, message) => {
    const opened = await source()
    proxy.reset(fault)
    const error = await failure(() => take(opened, MIB, MIB))
    expect(error).toMatchObject({ code, path: at('disk.raw'), syscall: 'GET', message: expect.stringMatching(message) })
    expect(error.transient).toBeUndefined()
    expect(proxy.seen).toHaveLength(1)
    // Each read is judged for itself.
    await same(opened, MIB, 512)
  })

  it('refuses servers that answer no ranges', async () => {
    proxy.reset()
    const error = await failure(() => source('plain/disk.raw'))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_UNSUPPORTED_FEATURE', message: expect.stringContaining('download') })
    expect(proxy.seen).toHaveLength(1)
    for (const [headers, code] of [
      [{ 'content-range': `bytes 0-${MIB - 1}/*` }, 'ERR_QCOW2_IO'],
      [{ 'content-range': `bytes 1-${MIB}/${SIZE}` }, 'ERR_QCOW2_IO'],
      [{ 'content-range': `bytes 0-${MIB - 1}/9007199254740993` }, 'ERR_QCOW2_IO'],
      [{ 'content-range': `bytes 0-${MIB - 1}/100` }, 'ERR_QCOW2_IO'],
      [{ 'content-encoding': 'br' }, 'ERR_QCOW2_UNSUPPORTED_FEATURE'],
    ] as const) {
      proxy.reset(altered(headers))
      expect(await failure(() => source())).toMatchObject({ code })
    }
  })

  it('takes no more than it asked for', async () => {
    const opened = await source()
    let sent = 0
    const ended = new Promise<void>(resolve => {
      proxy.reset(
        endless({ 'content-range': RANGE }, bytes => {
          sent = bytes
          resolve()
        }),
      )
    })
    expect(await failure(() => take(opened, MIB, MIB))).toMatchObject({
      code: 'ERR_QCOW2_IO',
      message: expect.stringContaining('more bytes than'),
    })
    await ended
    expect(sent).toBeLessThan(16 * MIB)
  })

  it('tries a bounded number of times', async () => {
    const opened = await source('disk.raw', IMPATIENT)
    for (const [fault, code, requests] of [
      [status(503), 'ERR_QCOW2_IO', 3],
      [reset, 'ECONNRESET', 3],
      [mute, 'ETIMEDOUT', 3],
      [cut(0), 'ECONNRESET', 3],
      [cut(10), 'ECONNRESET', 3],
      // What was far enough begins the count anew.
      [cut(400_000), undefined, 3],
      [status(429, { 'retry-after': '3600' }), 'ERR_QCOW2_IO', 1],
    ] as const) {
      proxy.reset()
      proxy.always = fault
      const buffer = Buffer.alloc(MIB)
      const ended = await Promise.allSettled([opened.read(buffer, MIB, never)])
      if (code === undefined) expect(ended).toEqual([{ status: 'fulfilled', value: MIB }])
      else expect(ended).toEqual([{ status: 'rejected', reason: expect.objectContaining({ code, transient: true }) }])
      expect({ code, requests: proxy.seen.length }).toEqual({ code, requests })
    }
    proxy.reset()
    // Drops are no stream.
    proxy.always = ({ request, response }) => {
      response.writeHead(206, { 'content-range': claimed(request) })
      const timer = setInterval(() => response.write('x'), 10)
      response.on('close', () => clearInterval(timer))
    }
    expect(await failure(() => take(opened, MIB, MIB))).toMatchObject({
      code: 'ETIMEDOUT',
      message: expect.stringContaining('tried 3 times'),
    })
    // Nobody there is no bad connection, as long as nobody has ever been there.
    const gone = createServer().listen(0, '127.0.0.1')
    await new Promise(resolve => gone.once('listening', resolve))
    const { port } = gone.address() as AddressInfo
    await new Promise(resolve => gone.close(resolve))
    const error = await failure(() => httpSource(`http://127.0.0.1:${port}/`, { retryDelay: 60_000 }))
    expect(error).toMatchObject({ code: 'ECONNREFUSED', syscall: 'GET' })
  })

  it('notices a file that is replaced under it', async () => {
    const path = join(files, 'changing.raw')
    for (const [name, fault] of [
      ['by the server', undefined],
      [
        'by a server that does not look',
        ({ request, forward }) => {
          delete request.headers['if-match']
          forward()
        },
      ],
    ] as const satisfies readonly (readonly [string, Fault | undefined])[]) {
      writeFileSync(path, disk)
      const opened = await source('changing.raw')
      appendFileSync(path, 'more')
      proxy.reset()
      if (fault !== undefined) proxy.always = fault
      expect(await failure(() => take(opened, MIB, 512)), name).toMatchObject({
        code: 'ERR_QCOW2_SOURCE_CHANGED',
        path: at('changing.raw'),
      })
      expect(proxy.seen).toHaveLength(1)
    }
  })

  it('follows redirects, and shows other origins no credentials', async () => {
    const other = await FaultProxy.start(server.upstream)
    try {
      const moved = (fault = 302) => status(fault, { location: `${other.origin}/disk.raw?signature=secret` })
      proxy.reset(status(301, { location: '/disk.raw' }), moved())
      const headers = { Authorization: 'Bearer secret', 'x-key': 'secret' }
      const opened = await source('old.raw', { headers })
      expect(proxy.headers).toMatchObject([{ authorization: 'Bearer secret' }, { 'x-key': 'secret' }])
      expect(other.headers[0]).not.toHaveProperty('authorization')
      expect(other.headers[0]).not.toHaveProperty('x-key')
      // Where it led is asked from then on, until it expires.
      proxy.reset(moved(307))
      other.reset()
      await same(opened, MIB, 512)
      expect([proxy.seen.length, other.seen.length]).toEqual([0, 1])
      other.reset(status(403))
      await same(opened, MIB, 512)
      expect([proxy.seen.length, other.seen.length]).toEqual([1, 2])
      other.reset(reset)
      proxy.reset(moved(308))
      await same(opened, MIB, 512)
      expect([proxy.seen.length, other.seen.length]).toEqual([1, 2])
    } finally {
      await other.stop()
    }
    proxy.reset()
    proxy.always = status(302, { location: '/disk.raw' })
    for (const [maxRedirects, requests] of [
      [undefined, 6],
      [0, 1],
    ] as const) {
      proxy.seen.length = 0
      const error = await failure(() => source('disk.raw', { maxRedirects }))
      expect(error).toMatchObject({ code: 'ERR_QCOW2_IO', message: expect.stringContaining('maxRedirects') })
      expect(proxy.seen).toHaveLength(requests)
    }
  })

  it('has no credentials in what it says', async () => {
    const secret = 'hunter2'
    const url = `http://user:${secret}@127.0.0.1:${proxy.port}/disk.raw?signature=${secret}`
    const options = { ...QUICK, ...IMPATIENT, headers: { 'x-key': secret } }
    proxy.reset()
    const opened = await httpSource(url, options)
    expect(proxy.headers[0]?.authorization).toBe(`Basic ${Buffer.from(`user:${secret}`).toString('base64')}`)
    await httpSource(url, { ...options, headers: { Authorization: 'Bearer mine' } })
    expect(proxy.headers[1]?.authorization).toBe('Bearer mine')
    const errors: Qcow2Error[] = []
    for (const fault of [reset, mute, status(403), status(503), cut(10), altered({ etag: '"x"' }), status(302)]) {
      proxy.always = fault
      errors.push(await failure(() => take(opened, MIB, MIB)))
    }
    for (const call of [
      () => httpSource(`http://user:${secret}@`),
      () => httpSource(`ftp://user:${secret}@host/`),
      () => httpSource(`http://user:${secret}@127.0.0.1:1/x?${secret}`, { retries: 0 }),
      () => source('disk.raw', { headers: { 'x-key': `${secret}\nx` } }),
      () => source('disk.raw', { headers: () => ({ 'x-key': `${secret}\u0100` }) }),
    ]) {
      errors.push(await failure(call))
    }
    expect(errors.map(error => show(error, { depth: 9, showHidden: true })).join()).not.toContain(secret)
  })

  it('asks for fresh headers before each request', async () => {
    proxy.reset()
    let asked = 0
    const headers = () => {
      asked += 1
      return Promise.resolve({ 'x-count': `${asked}` })
    }
    const opened = await source('disk.raw', { headers })
    proxy.faults = [reset]
    await take(opened, MIB, 512)
    expect(proxy.headers.map(each => each['x-count'])).toEqual(['1', '2', '3'])
    const mine = new Error('no token')
    const failing = await source('disk.raw', { headers: () => (asked > 3 ? Promise.reject(mine) : headers()) })
    await expect(take(failing, MIB, 512)).rejects.toBe(mine)
    const own = await source('disk.raw', { fetch: (url, init) => fetch(`${url}?own`, init) })
    expect(own.size).toBe(SIZE)
    expect(proxy.seen.at(-1)).toMatch(/^bytes/)
  })

  it('is stopped at once', async () => {
    const reason = new Error('enough')
    const opened = await source('disk.raw', { silenceTimeout: 60_000, retryDelay: 60_000 })
    proxy.reset()
    const during = async (fault: Fault, work: (signal: AbortSignal) => Promise<unknown>): Promise<void> => {
      const controller = new AbortController()
      proxy.always = exchange => {
        fault(exchange)
        setTimeout(() => controller.abort(reason), 20)
      }
      const begin = performance.now()
      const error = await failure(() => work(controller.signal))
      expect(error).toMatchObject({ name: 'AbortError', cause: reason })
      expect(performance.now() - begin).toBeLessThan(2000)
    }
    await during(mute, signal => take(opened, MIB, 512, signal))
    await during(status(503), signal => take(opened, MIB, 512, signal))
    await during(mute, signal => source('disk.raw', { signal, silenceTimeout: 60_000 }))
    await during(cut(1000), signal => take(opened, MIB, MIB, signal))
    const aborted = AbortSignal.abort(reason)
    await expect(source('disk.raw', { signal: aborted })).rejects.toMatchObject({ name: 'AbortError', cause: reason })
  })

  it('refuses arguments that are none', async () => {
    for (const [url, options, field] of [
      [7, {}, 'url'],
      ['disk.raw', {}, 'url'],
      ['file:///etc/passwd', {}, 'url'],
      [new URL('ftp://host/disk'), {}, 'url'],
      ['https://host', { headers: { Range: 'bytes=0-1' } }, 'headers'],
      ['https://host', { headers: { 'a b': 'c' } }, 'headers'],
      ['https://host', { headers: 'x' }, 'headers'],
      ['https://host', { retries: -1 }, 'retries'],
      ['https://host', { silenceTimeout: 300_001 }, 'silenceTimeout'],
      ['https://host', { maxRedirects: 21 }, 'maxRedirects'],
      ['https://host', { timeout: 1 }, 'timeout'],
    ] as const) {
      expect(await failure(() => httpSource(url as string, options as never)), `${field}`).toMatchObject({
        code: 'ERR_QCOW2_INVALID_ARGUMENT',
        field,
      })
    }
  })
})
