/**
 * Limits of the system: threads, descriptors. What they end is an error with the system's code, never a bug in the library; nothing
 * hangs, nothing stays open. In processes of their own, under limits of their own.
 */

import { spawnSync } from 'node:child_process'
import { chmodSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { convert, create } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder, writeRaw } from '../api/fixtures.js'
import { library, runNode } from './child.js'

const folder = temporaryFolder()
const MIB = 2 ** 20

beforeAll(async () => {
  writeRaw(join(folder, 'disk.raw'), 4 * MIB, [[0, 4 * MIB]])
  await convert(join(folder, 'disk.raw'), join(folder, 'disk.qcow2'), { from: 'raw', to: 'qcow2' })
  const tables = await create(join(folder, 'tables.qcow2'), {
    size: 256 * MIB,
    clusterSize: 4096,
    preallocation: 'metadata',
  })
  await tables.close()
  chmodSync(folder, 0o777)
})

const possible =
  process.platform === 'linux' && ['prlimit', 'setpriv'].every(tool => spawnSync(tool, ['--version']).status === 0)
const isRoot = process.getuid?.() === 0

const GIVEN = `
  const fs = require('node:fs')
  const { execFileSync } = require('node:child_process')
  const [folder] = process.argv.slice(-1)
  const at = name => folder + '/' + name
  const status = name => Number(new RegExp(name + ':\\\\s+(\\\\d+)').exec(fs.readFileSync('/proc/self/status', 'utf8'))[1])
  const descriptors = () => fs.readdirSync('/proc/self/fd').length - 1
  const limit = (what, soft) => execFileSync('prlimit', ['--pid', String(process.pid), '--' + what + '=' + soft + ':' + soft])
  const code = promise => promise.then(() => 'ok', error => error.code)
  const out = value => process.stdout.write(JSON.stringify(value))
`

function run(body: string): unknown {
  const ended = runNode(`${GIVEN};(async () => { ${body} })()`, { args: [folder] })
  expect(ended).toMatchObject({ code: 0, signal: null, stderr: '' })
  return JSON.parse(ended.stdout)
}

describe('jobs', () => {
  it.skipIf(process.platform !== 'linux')('started in one tick take threads as they are configured', () => {
    const seen = run(`
      qcow2.configure({ maxJobs: 2 })
      let most = 0
      const timer = setInterval(() => { most = Math.max(most, status('Threads')) }, 1)
      const before = status('Threads')
      const convert = n => qcow2.convert(at('disk.qcow2'), at('many-' + n), { to: 'raw', concurrency: 1 }).then(() => {
        most = Math.max(most, status('Threads'))
        fs.rmSync(at('many-' + n))
      })
      await Promise.all(Array.from({ length: 300 }, (_, n) => convert(n)))
      clearInterval(timer)
      // Two for the jobs; eight at most for requests.
      out([most > before, most - before <= 2 + 8])
    `)
    expect(seen).toEqual([true, true])
  })

  it('wait their turn: 0 of 0, and cancelled at once', () => {
    const seen = run(`
      qcow2.configure({ maxJobs: 1 })
      const holding = new AbortController(), waiting = new AbortController()
      const slow = code(qcow2.convert(at('disk.raw'), at('slow'), {
        from: 'raw', to: 'qcow2', rate: 1024, signal: holding.signal }))
      const order = [], progress = []
      // A job with a rate holds up none without.
      order.push('check ' + await code(qcow2.check(at('disk.qcow2'))))
      const second = code(qcow2.convert(at('disk.raw'), at('second'), {
        from: 'raw', to: 'raw', rate: 1024, signal: waiting.signal, progressInterval: 1, onProgress: p => progress.push(p) }))
      second.then(ended => order.push('second ' + ended))
      await new Promise(resolve => setTimeout(resolve, 50))
      waiting.abort()
      await second
      order.push('created ' + await code(qcow2.create(at('new.qcow2'), { size: 65536 }).then(image => image.close())))
      holding.abort()
      order.push('slow ' + await slow)
      out([order, progress.length > 0 && progress.every(({ current, total }) => current === 0 && total === 0)])
    `)
    expect(seen).toEqual([['check ok', 'second ABORT_ERR', 'created ok', 'slow ABORT_ERR'], true])
  })

  it('run in the order in which they were started, and more of them when more may', () => {
    const seen = run(`
      const { maxJobs } = qcow2.configure({ maxJobs: 1 })
      const images = await Promise.all(Array.from({ length: 6 }, () => qcow2.open(at('tables.qcow2'))))
      const order = []
      const all = images.map((image, n) => image.check().then(() => order.push(n)))
      await all[1]
      const more = qcow2.configure({ maxJobs: 8 }).maxJobs
      await Promise.all(all)
      await Promise.all(images.map(image => image.close()))
      out([maxJobs, more, order.slice(0, 2), order.toSorted()])
    `)
    expect(seen).toEqual([1, 8, [0, 1], [0, 1, 2, 3, 4, 5]])
  })

  it('that wait end with their environment', () => {
    const seen = run(`
      const { Worker } = require('node:worker_threads')
      for (let round = 0; round < 5; round++) {
        const worker = new Worker(
          'const qcow2 = require(' + JSON.stringify(${JSON.stringify(library)}) + ');' +
          'qcow2.configure({ maxJobs: 1 });' +
          'for (let n = 0; n < 50; n++) qcow2.convert(' + JSON.stringify(at('disk.raw')) + ',' + JSON.stringify(at('worker-')) +
          ' + n, { from: "raw", to: "qcow2", rate: 4096 }).catch(() => {});' +
          'setTimeout(() => require("node:worker_threads").parentPort.postMessage(1), 100)', { eval: true })
        await require('node:events').once(worker, 'message')
        await worker.terminate()
      }
      out(fs.readdirSync(folder).filter(name => name.startsWith('worker-')))
    `)
    expect(seen).toEqual([])
  })
})

/** Exit code of `qemu-img check`: 0 for an image without errors; without QEMU, of our own. */
const qemuCheck = (path: string): number | null =>
  spawnSync('qemu-img', ['check', '-q', path]).status ??
  spawnSync(process.execPath, [join(dirname(library), 'cli.js'), 'check', '-q', path]).status

describe.skipIf(!possible || !isRoot)('a system that starts no more threads', () => {
  const few = (more: number): unknown =>
    run(`
      // Node's own threads, which it cannot do without.
      await fs.promises.stat(folder)
      const image = await qcow2.open(at('disk.qcow2'))
      await image.read(Buffer.alloc(4096), { position: 0 })
      const threads = status('Threads')
      process.setgid(65534)
      process.setuid(65534)
      limit('nproc', Math.max(1, threads + ${more}))
      const o = { concurrency: 6 }
      const { Readable } = require('node:stream')
      const bytes = fs.readFileSync(at('disk.qcow2')), disk = fs.readFileSync(at('disk.raw'))
      const object = () => ({ size: disk.length, read: async (buffer, position) => disk.copy(buffer, 0, position, position + buffer.length) })
      const calls = {
        compare: () => qcow2.compare(at('disk.raw'), at('disk.qcow2'), { formatA: 'raw', ...o }),
        check: () => qcow2.check(at('tables.qcow2'), o),
        convert: () => qcow2.convert(at('disk.qcow2'), at('few.raw'), { to: 'raw', overwrite: true, ...o }),
        compress: () => qcow2.convert(at('disk.qcow2'), at('few.qcow2'), { to: 'qcow2', compress: true, overwrite: true, ...o }),
        measure: () => qcow2.measure(at('disk.qcow2'), { to: 'qcow2' }),
        clone: () => image.clone(at('few.clone'), { to: 'raw', overwrite: true, ...o }),
        create: () => qcow2.create(at('few.new'), { size: 65536, overwrite: true }).then(made => made.close()),
        ingest: () => qcow2.ingest(Readable.from([bytes]), at('few.in'), { from: 'qcow2', to: 'raw', overwrite: true }),
        stream: async () => { for await (const chunk of await qcow2.createQcow2Stream(at('disk.qcow2'), { compress: true, ...o })) ; },
        object: () => qcow2.convert(object(), at('few.object'), { from: 'raw', to: 'qcow2', overwrite: true, ...o }),
        serve: () => qcow2.serveNbd(image, { path: at('few.sock') }).then(server => server.close()),
      }
      const codes = {}
      for (const [name, call] of Object.entries(calls)) codes[name] = await code(call())
      await image.close()
      if (fs.existsSync(at('few.sock'))) codes.left = 'a socket'
      out(codes)
    `)

  it('ends jobs with EAGAIN, where there is none for them', () => {
    const codes = few(-100) as Record<string, string>
    expect([...new Set(Object.values(codes))]).toEqual(['EAGAIN'])
  })

  it.each([2, 3, 5])('does them with %i', more => {
    const codes = few(more) as Record<string, string>
    // The thread that waits for the next job may take what another lane needs.
    expect(Object.values(codes).filter(each => each !== 'ok' && each !== 'EAGAIN')).toEqual([])
    expect(codes).toMatchObject({ compare: 'ok', check: 'ok', convert: 'ok', compress: 'ok', measure: 'ok' })
  })

  it('keeps what was written to an image that nobody closed', () => {
    const path = join(folder, 'left.qcow2')
    run(`
      await (await qcow2.create(at('left.qcow2'), { size: 1 << 20 })).close()
      fs.chmodSync(at('left.qcow2'), 0o666)
      const image = await qcow2.open(at('left.qcow2'), { flags: 'r+' })
      await image.write(Buffer.alloc(4096, 7), { position: 0 })
      process.setgid(65534)
      process.setuid(65534)
      limit('nproc', 1)
      out([])
    `)
    const [data] = run(`
      const image = await qcow2.open(at('left.qcow2'))
      const { buffer } = await image.read(Buffer.alloc(4096), { position: 0 })
      await image.close()
      out([buffer.every(byte => byte === 7)])
    `) as boolean[]
    expect([data, qemuCheck(path)]).toEqual([true, 0])
  })

  it('refuses requests with EAGAIN where not even one thread is there', () => {
    const seen = run(`
      // Node's own threads, which it cannot do without.
      await fs.promises.stat(folder)
      process.setgid(65534)
      process.setuid(65534)
      limit('nproc', 1)
      const error = await qcow2.open(at('disk.qcow2')).catch(error => error)
      out([error.code, error.syscall, error.message.includes('bug')])
    `)
    expect(seen).toEqual(['EAGAIN', 'pthread_create', false])
  })
})

describe.skipIf(!possible)('a process that may open no more files', () => {
  it('is told EMFILE by every call, and has as many open as before', () => {
    const seen = run(`
      await fs.promises.stat(folder)
      fs.copyFileSync(at('disk.qcow2'), at('own.qcow2'))
      const image = await qcow2.open(at('own.qcow2'), { flags: 'r+' })
      await image.read(Buffer.alloc(4096), { position: 0 })
      const calls = {
        open: () => qcow2.open(at('disk.qcow2')).then(image => image.close()),
        convert: n => qcow2.convert(at('disk.raw'), at('full-' + n + '.qcow2'), { from: 'raw', to: 'qcow2' }),
        'convert to raw': n => qcow2.convert(at('tables.qcow2'), at('full-' + n + '.raw'), { to: 'raw' }),
        create: n => qcow2.create(at('full-' + n + '.new'), { size: 65536 }).then(made => made.close()),
        check: () => qcow2.check(at('tables.qcow2')),
        compare: () => qcow2.compare(at('disk.raw'), at('tables.qcow2'), { formatA: 'raw' }),
        measure: () => qcow2.measure(at('tables.qcow2'), { to: 'qcow2' }),
        probe: () => qcow2.probe(at('tables.qcow2')),
        inspect: () => qcow2.inspect(at('tables.qcow2')),
        clone: n => image.clone(at('full-' + n + '.clone'), { to: 'qcow2' }),
        overlay: n => image.createOverlay(at('full-' + n + '.overlay')),
      }
      // Once, so that what opens files only the first time has them: not the overlay, which changes what is open.
      for (const [name, call] of Object.entries(calls)) if (name !== 'overlay') await call('first')
      limit('nofile', descriptors() + 20)
      const before = descriptors()
      const bad = []
      for (const spare of [0, 1, 2]) {
        const held = []
        while (true) try { held.push(fs.openSync('/dev/null')) } catch { break }
        for (let n = 0; n < spare; n++) fs.closeSync(held.pop())
        for (const [name, call] of Object.entries(calls)) {
          if (name === 'overlay' && spare > 0) continue
          const got = await code(call(spare + name.replaceAll(' ', '')))
          if (got !== 'EMFILE' && !(spare > 0 && got === 'ok')) bad.push([spare, name, got])
        }
        held.forEach(fd => fs.closeSync(fd))
        if (descriptors() !== before) bad.push([spare, 'left open', descriptors() - before])
        bad.push(...fs.readdirSync(folder).filter(name => spare === 0 && name.startsWith('full-0')))
      }
      await image.write(Buffer.alloc(4096), { position: 0 })
      await image.close()
      out([bad, await code(qcow2.check(at('own.qcow2')))])
    `)
    expect(seen).toEqual([[], 'ok'])
  })

  it('is told so by streams, sockets and objects, too, which leave no file and no connection', () => {
    const seen = run(`
      const { spawn } = require('node:child_process')
      const { once } = require('node:events')
      const { Readable } = require('node:stream')
      const bytes = fs.readFileSync(at('disk.qcow2'))
      fs.copyFileSync(at('disk.qcow2'), at('served.qcow2'))
      // Servers in a process that has descriptors.
      const server = spawn(process.execPath, ['-e', \`
        const qcow2 = require(${JSON.stringify(library)}), fs = require('node:fs'), http = require('node:http')
        const [, folder] = process.argv
        const bytes = fs.readFileSync(folder + '/served.qcow2')
        fs.writeFileSync(folder + '/target.raw', Buffer.alloc(4 << 20))
        qcow2.open(folder + '/target.raw', { format: 'raw', flags: 'r+' })
          .then(image => qcow2.serveNbd(image, { path: folder + '/target.sock' }))
          .then(() => http.createServer((request, response) => {
            const [, first, last] = /bytes=(\\\\d+)-(\\\\d+)/.exec(request.headers.range)
            const part = bytes.subarray(Number(first), Number(last) + 1)
            response.writeHead(206, { 'content-range': 'bytes ' + first + '-' + (Number(first) + part.length - 1) + '/' + bytes.length, connection: 'close' })
            response.end(part)
          }).listen(0, '127.0.0.1', function () { console.log(this.address().port) }))
      \`, folder], { stdio: ['ignore', 'pipe', 'inherit'] })
      const port = String((await once(server.stdout, 'data'))[0]).trim()
      const image = await qcow2.open(at('served.qcow2'))
      await image.read(Buffer.alloc(4096), { position: 0 })
      const disk = fs.readFileSync(at('disk.raw'))
      const object = () => ({ size: disk.length, read: async (buffer, position) => disk.copy(buffer, 0, position, position + buffer.length) })
      const target = () => qcow2.nbdSource('nbd+unix:///?socket=' + at('target.sock'))
      const drain = async stream => { for await (const chunk of stream) ; }
      const calls = {
        ingest: n => qcow2.ingest(Readable.from([bytes]), at('full-' + n), { from: 'qcow2', to: 'raw' }),
        stream: async () => drain(await qcow2.createQcow2Stream(at('disk.qcow2'), { compress: true })),
        'stream of an image': async () => drain(await qcow2.createQcow2Stream(image)),
        object: n => qcow2.convert(object(), at('full-' + n), { from: 'raw', to: 'qcow2' }),
        several: n => qcow2.convert([at('disk.qcow2'), at('disk.raw')], at('full-' + n), { from: ['qcow2', 'raw'], to: 'raw' }),
        extents: n => qcow2.convert(at('disk.qcow2'), at('full-' + n), { to: 'vmdk', create: { subformat: 'twoGbMaxExtentFlat' } }),
        serve: n => qcow2.serveNbd(image, { path: at('full-' + n) }).then(server => server.close()),
        'serve by a port': () => qcow2.serveNbd(image, { port: 0 }).then(server => server.close()),
        'an export': () => qcow2.open(target(), { format: 'raw' }).then(opened => opened.close()),
        list: () => qcow2.listNbd('nbd+unix:///?socket=' + at('target.sock')),
        'clone to an export': () => image.clone(target(), { to: 'raw', overwrite: true }),
        'a web server': async n => qcow2.convert(await qcow2.httpSource('http://127.0.0.1:' + port, { retries: 0 }), at('full-' + n), { to: 'raw' }),
      }
      const bad = []
      for (const [name, call] of Object.entries(calls)) {
        const got = await code(call('first' + name.replaceAll(' ', '')))
        if (got !== 'ok') bad.push(['before', name, got])
      }
      limit('nofile', descriptors() + 20)
      const settled = async before => {
        for (let n = 0; n < 100 && descriptors() !== before; n++) await new Promise(resolve => setTimeout(resolve, 10))
        return descriptors()
      }
      let failed = 0
      for (const spare of [0, 1, 2]) {
        for (const [name, call] of Object.entries(calls)) {
          const before = descriptors()
          const held = []
          while (true) try { held.push(fs.openSync('/dev/null')) } catch { break }
          for (let n = 0; n < spare; n++) fs.closeSync(held.pop())
          const own = spare + name.replaceAll(' ', '')
          const got = await code(call(own))
          held.forEach(fd => fs.closeSync(fd))
          failed += got === 'EMFILE' ? 1 : 0
          if (got !== 'EMFILE' && (got !== 'ok' || (spare === 0 && name !== 'stream of an image'))) bad.push([spare, name, got])
          if (await settled(before) !== before) bad.push([spare, name, 'left open', descriptors() - before])
          if (got !== 'ok') bad.push(...fs.readdirSync(folder).filter(entry => entry.startsWith('full-' + own)))
        }
      }
      server.kill()
      await image.close()
      out([bad, failed > 15])
    `)
    expect(seen).toEqual([[], true])
  })
})
