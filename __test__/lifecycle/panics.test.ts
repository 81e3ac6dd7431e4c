/**
 * A panic is a bug, and bugs happen: it ends the request that met it with `ERR_QCOW2_INTERNAL`. The process lives, others go
 * on, nobody waits for ever. Through the addon itself, built with panics on demand, in processes of their own.
 */

import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { convert } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder, writeRaw } from '../api/fixtures.js'
import { library, runNode } from './child.js'
import { buildPanicking, possible } from './panics.js'

const folder = temporaryFolder()
const addon = join(folder, 'panics.node')
const MIB = 2 ** 20

/** Backtraces of hundreds of panics take minutes, and nobody reads them. */
const ENV = { NAPI_RS_NATIVE_LIBRARY_PATH: addon, RUST_BACKTRACE: '0' }

/** What every program begins with. `INTERNAL` ends a line for what it should be. */
const GIVEN = `
  const { readdirSync, existsSync } = require('node:fs')
  const { join } = require('node:path')
  const { armPanics } = require(process.env.NAPI_RS_NATIVE_LIBRARY_PATH)
  const [folder] = process.argv.slice(-1)
  const at = name => join(folder, name)
  const disk = at('disk.qcow2'), other = at('other.qcow2'), raw = at('disk.raw')
  const code = promise => promise.then(() => 'ok', error => error.code)
  const said = []
  const say = async (name, promise) => said.push(name + ' ' + await code(promise))
  const disarm = () => { if (armPanics() === 0) said.push('nothing panicked') }
  const block = position => [Buffer.alloc(4096, 7), { position }]
`

const last = (text: string): string => text.slice(-1000)

/** Runs the body of an async function with panics at hand; what it said. The event loop must end by itself. */
function panicking(body: string): string[] {
  const program = `${GIVEN}
    async function main() { ${body} }
    main().then(() => process.stdout.write(said.join('\\n')))`
  const ended = runNode(program, { env: ENV, args: [folder] })
  expect(ended, last(ended.stderr)).toMatchObject({ code: 0, signal: null })
  expect(
    ended.stderr.replace(/^\s*$|^(thread 'qcow2|a test panic|note: run with|thread '<unnamed>' ).*$/gm, '').trim(),
  ).toBe('')
  return ended.stdout.split('\n')
}

/** The lock of an image is free again, and its bytes are good: checked by the addon that is shipped. */
const sound = `
  const again = await qcow2.open(disk, { flags: 'r+' })
  await say('again', again.write(...block(0)))
  await say('closed', again.close())
  said.push('check ' + (await qcow2.check(disk)).corruptions)
`
const SOUND = ['again ok', 'closed ok', 'check 0']

describe('the addon that is shipped', () => {
  it('has no panics on demand', () => {
    const dist = fileURLToPath(new URL('../../dist/', import.meta.url))
    const addons = readdirSync(dist).filter(name => name.endsWith('.node'))
    expect(addons).not.toEqual([])
    for (const name of addons) {
      const bytes = readFileSync(join(dist, name))
      expect([name, bytes.includes('armPanics'), bytes.includes('a test panic')]).toEqual([name, false, false])
    }
  })

  it('is of functions that contain what they call', () => {
    const sources = fileURLToPath(new URL('../../crates/node/src/', import.meta.url))
    const files = readdirSync(sources, { recursive: true, encoding: 'utf8' }).filter(name => name.endsWith('.rs'))
    expect(files.length).toBeGreaterThan(20)
    const bare = files.flatMap(name =>
      [
        ...readFileSync(join(sources, name), 'utf8').matchAll(
          /#\[napi(?<how>[^\]]*)\](?:\s*#\[[^\]]*\])*\s*pub fn (?<fn>\w+)/g,
        ),
      ]
        .filter(({ groups }) => !groups?.['how']?.includes('catch_unwind'))
        .map(({ groups }) => groups?.['fn']),
    )
    // A panic out of a function that does not catch it ends the process.
    expect(bare).toEqual([])
  })
})

describe.skipIf(!possible)('a panic', () => {
  beforeAll(async () => {
    buildPanicking(addon)
    writeRaw(join(folder, 'disk.raw'), 4 * MIB, [[0, 4 * MIB]])
    await convert(join(folder, 'disk.raw'), join(folder, 'disk.qcow2'), { from: 'raw', to: 'qcow2' })
    await convert(join(folder, 'disk.raw'), join(folder, 'other.qcow2'), { from: 'raw', to: 'qcow2' })
  }, 300_000)

  it.each([
    ['read', `image.read(Buffer.alloc(512), { position: 0 })`],
    ['write', 'image.write(...block(0))'],
    ['sync', 'image.datasync()'],
  ])('in a %s of the file ends the request and refuses the next', (place, request) => {
    const heard = panicking(`
      const image = await qcow2.open(disk, { flags: 'r+' })
      const beside = await qcow2.open(other, { flags: 'r+' })
      await image.write(...block(8192))
      armPanics(${JSON.stringify(place)}, 'disk.qcow2')
      const others = Array.from({ length: 50 }, (_, n) => beside.write(...block(n * 4096)).then(() => beside.datasync()))
      await say('first', ${request})
      // Many at once, at the same clusters: none waits for one that is gone.
      const many = await Promise.all(Array.from({ length: 200 }, (_, n) => code([
        () => image.read(Buffer.alloc(512), { position: n % 8 * 4096 }),
        () => image.write(...block(n % 8 * 4096)),
        () => image.datasync(),
        () => image.writeZeroes(n % 8 * 65536, 65536),
      ][n % 4]())))
      said.push('many ' + [...new Set(many)].join(' '))
      await say('check', image.check())
      await say('others', Promise.all(others))
      disarm()
      await say('later', image.read(Buffer.alloc(512), { position: 0 }))
      await say('close', image.close())
      await say('beside', beside.close())
      ${sound}`)
    expect(heard).toEqual([
      'first ERR_QCOW2_INTERNAL',
      'many ERR_QCOW2_INTERNAL',
      'check ERR_QCOW2_INTERNAL',
      'others ok',
      'later ERR_QCOW2_INTERNAL',
      'close ok',
      'beside ok',
      ...SOUND,
    ])
  })

  it('in many requests at once ends each of them', () => {
    const heard = panicking(`
      const image = await qcow2.open(disk, { flags: 'r+' })
      armPanics('write', 'disk.qcow2')
      const many = await Promise.all(Array.from({ length: 500 }, (_, n) => code(image.write(...block(n % 16 * 4096)))))
      said.push([...new Set(many)].join(' '))
      disarm()
      await say('close', image.close())
      ${sound}`)
    expect(heard).toEqual(['ERR_QCOW2_INTERNAL', 'close ok', ...SOUND])
  })

  it('in opening leaves nothing open and nothing locked', () => {
    const heard = panicking(`
      armPanics('read', 'disk.qcow2')
      for (let n = 0; n < 20; n++) await say('open', qcow2.open(disk, { flags: 'r+' }))
      await say('inspect', qcow2.inspect(disk))
      await say('other', qcow2.open(other).then(image => image.close()))
      disarm()
      ${sound}
      const open = readdirSync('/proc/self/fd').filter(fd => existsSync('/proc/self/fd/' + fd))
        .filter(fd => require('node:fs').readlinkSync('/proc/self/fd/' + fd) === disk)
      said.push('left ' + open.length)`)
    expect(heard).toEqual([
      ...Array.from({ length: 20 }, () => 'open ERR_QCOW2_INTERNAL'),
      'inspect ERR_QCOW2_INTERNAL',
      'other ok',
      ...SOUND,
      'left 0',
    ])
  })

  it('in a job ends the job, and leaves no file', () => {
    const heard = panicking(`
      const source = await qcow2.open(other)
      armPanics('read', 'other.qcow2')
      await say('check', qcow2.check(other))
      await say('convert', qcow2.convert(other, at('new.raw'), { to: 'raw' }))
      await say('compressed', qcow2.convert(other, at('new.qcow2'), { to: 'qcow2', compress: true }))
      await say('compare', qcow2.compare(other, disk))
      await say('clone', source.clone(at('clone.raw'), { to: 'raw' }))
      disarm()
      said.push('made ' + readdirSync(folder).filter(name => /new|clone/.test(name)))
      await say('close', source.close())
      await say('afterwards', qcow2.convert(other, at('new.raw'), { to: 'raw' }))
      require('node:fs').rmSync(at('new.raw'))
      armPanics('write', 'disk.qcow2')
      await say('repair', qcow2.check(disk, { repair: 'all' }))
      await say('snapshot', qcow2.open(disk, { flags: 'r+' }).then(async image => {
        try { await image.snapshots.create('one') } finally { await image.close() }
      }))
      disarm()
      ${sound}`)
    expect(heard).toEqual([
      ...['check', 'convert', 'compressed', 'compare', 'clone'].map(name => `${name} ERR_QCOW2_INTERNAL`),
      'made ',
      'close ok',
      'afterwards ok',
      'repair ok',
      'snapshot ERR_QCOW2_INTERNAL',
      ...SOUND,
    ])
  })

  it('in closing is told, and gives the file up', () => {
    for (const place of ['write', 'sync', 'drop']) {
      const heard = panicking(`
        const image = await qcow2.open(disk, { flags: 'r+' })
        await image.writeZeroes(0, 65536)
        await image.write(...block(0))
        armPanics('${place}', 'disk.qcow2')
        await say('close', image.close())
        await say('twice', image.close())
        disarm()
        ${sound}`)
      expect([place, ...heard]).toEqual([place, 'close ERR_QCOW2_INTERNAL', 'twice ERR_QCOW2_INTERNAL', ...SOUND])
    }
  })

  it('in a synchronous call is an error of that call', () => {
    const heard = panicking(`
      const image = await qcow2.open(disk, { flags: 'r+' })
      await image.read(Buffer.alloc(512), { position: 0 })
      const each = {
        read: () => image.read(Buffer.alloc(512), { position: 0 }),
        readv: () => image.readv([Buffer.alloc(512)], 0),
        write: () => image.write(...block(0)),
        writeZeroes: () => image.writeZeroes(0, 512),
        discard: () => image.discard(0, 65536),
        datasync: () => image.datasync(),
        info: () => image.info(),
        snapshots: () => image.snapshots.list(),
        map: async () => { for await (const _ of image.map()) ; },
        check: () => image.check(),
        open: () => qcow2.open(other),
        convert: () => qcow2.convert(other, at('new.raw'), { to: 'raw' }),
        inspect: () => qcow2.inspect(Buffer.alloc(512)),
      }
      for (const [name, call] of Object.entries(each)) {
        armPanics('call')
        await say(name, call())
        disarm()
        await say(name, image.read(Buffer.alloc(512), { position: 0 }))
      }
      await say('close', image.close())
      ${sound}`)
    const names = ['read', 'readv', 'write', 'writeZeroes', 'discard', 'datasync', 'info', 'snapshots', 'map', 'check']
    expect(heard).toEqual([
      ...[...names, 'open', 'convert', 'inspect'].flatMap(name => [`${name} ERR_QCOW2_INTERNAL`, `${name} ok`]),
      'close ok',
      ...SOUND,
    ])
  })

  it('in what a running job is asked is an error of the job, which nothing can cancel then', () => {
    const heard = panicking(`
      const abort = new AbortController()
      const job = { from: 'raw', to: 'qcow2', rate: 2 ** 23, overwrite: true }
      await say('progress', qcow2.convert(raw, at('new.qcow2'), {
        ...job, progressInterval: 1, onProgress: () => armPanics('call'),
      }))
      disarm()
      const aborted = qcow2.convert(raw, at('new.qcow2'), { ...job, signal: abort.signal })
      setTimeout(() => { armPanics('call'); abort.abort(); disarm() }, 50)
      await say('abort', aborted)
      await say('made', qcow2.open(at('new.qcow2')).then(image => image.close()))
      require('node:fs').rmSync(at('new.qcow2'))`)
    expect(heard).toEqual(['progress ERR_QCOW2_INTERNAL', 'abort ERR_QCOW2_INTERNAL', 'made ok'])
  })

  it('where a value is made is an error of its request alone', () => {
    const heard = panicking(`
      const image = await qcow2.open(disk)
      armPanics('value')
      const many = [image.info(), image.snapshots.list(), qcow2.open(other), image.read(Buffer.alloc(512), { position: 0 })]
      said.push((await Promise.all(many.map(code))).join(' '))
      disarm()
      await say('info', image.info())
      await say('close', image.close())
      ${sound}`)
    expect(heard).toEqual([
      'ERR_QCOW2_INTERNAL ERR_QCOW2_INTERNAL ERR_QCOW2_INTERNAL ok',
      'info ok',
      'close ok',
      ...SOUND,
    ])
  })

  it('in another thread of the process ends neither', () => {
    const heard = panicking(`
      const { Worker } = require('node:worker_threads')
      const { once } = require('node:events')
      const main = await qcow2.open(other, { flags: 'r+' })
      const worker = new Worker(\`
        const { parentPort, workerData } = require('node:worker_threads')
        const qcow2 = require(workerData.library)
        const { armPanics } = require(process.env.NAPI_RS_NATIVE_LIBRARY_PATH)
        qcow2.open(workerData.disk, { flags: 'r+' }).then(async image => {
          armPanics('write', 'disk.qcow2')
          const said = [await image.write(Buffer.alloc(512), { position: 0 }).catch(error => error.code)]
          armPanics('call')
          said.push(await image.read(Buffer.alloc(512), { position: 0 }).catch(error => error.code))
          // The image stays open, and closing it panics, too, when the environment ends.
          armPanics('drop', 'disk.qcow2')
          globalThis.image = image
          parentPort.postMessage(said.join(' '))
        })\`, { eval: true, workerData: { library: ${JSON.stringify(library)}, disk } })
      const [[heard], [exit]] = await Promise.all([once(worker, 'message'), once(worker, 'exit')])
      said.push(heard, 'exit ' + exit)
      disarm()
      await say('main', main.write(...block(0)))
      await say('close', main.close())
      ${sound}`)
    expect(heard).toEqual(['ERR_QCOW2_INTERNAL ERR_QCOW2_INTERNAL', 'exit 0', 'main ok', 'close ok', ...SOUND])
  })

  it('at the end of a process leaves its exit code', () => {
    const program = `${GIVEN}
      qcow2.open(disk, { flags: 'r+' }).then(async image => {
        await image.write(...block(0))
        globalThis.image = image
        armPanics(process.argv.at(-2), 'disk.qcow2')
        if (process.argv.at(-3) === 'exit') process.exit(7)
        process.exitCode = 7
      })`
    for (const how of ['exit', 'end']) {
      for (const place of ['drop', 'write', 'sync']) {
        const ended = runNode(program, { env: ENV, args: [how, place, folder] })
        expect({ how, place, ...ended }, last(ended.stderr)).toMatchObject({ how, place, code: 7, signal: null })
      }
    }
  })
})
