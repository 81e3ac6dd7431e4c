/** NBD over TLS, in both directions: this library's server and client, and the tools that there are, which judge them. */

import { type ChildProcess, execFileSync, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { connect, createServer, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { connect as secureConnect } from 'node:tls'
import {
  compare,
  convert,
  create,
  type Image,
  listNbd,
  type NbdClientTls,
  type NbdServer,
  type NbdServerTls,
  nbdSource,
  open,
  serveNbd,
} from 'qcow2'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { execute, haveQemu } from '../cli/run.js'
import { library } from '../lifecycle/child.js'
import { type Credentials, haveOpenssl, KEYS, makeCredentials } from './certificates.js'
import { kill, serverProcess } from './process.js'

// Paths of sockets must be short.
const folder = mkdtempSync(join(tmpdir(), 'q-'))
let credentials: Credentials
let serverTls: NbdServerTls
let clientTls: NbdClientTls
/** On a socket, which has no name. */
let named: NbdClientTls
const psk = Object.fromEntries(Object.entries(KEYS).map(([user, hex]) => [user, Buffer.from(hex, 'hex')]))
const bob: NbdClientTls = { psk: { user: 'bob', key: Buffer.from(KEYS.bob, 'hex') } }
const running: ChildProcess[] = []
beforeAll(() => {
  if (!haveOpenssl) return
  credentials = makeCredentials(folder)
  const { server, client } = credentials
  const read = (of: string, name: string): Buffer => readFileSync(join(of, name))
  serverTls = {
    cert: read(server, 'server-cert.pem'),
    key: read(server, 'server-key.pem'),
    ca: read(server, 'ca-cert.pem'),
  }
  clientTls = {
    cert: read(client, 'client-cert.pem'),
    key: read(client, 'client-key.pem'),
    ca: read(client, 'ca-cert.pem'),
  }
  named = { ...clientTls, hostname: 'localhost' }
})
afterAll(() => {
  for (const child of running) child.kill()
  rmSync(folder, { recursive: true, force: true })
})

const MIB = 2 ** 20
let last = 0
const name = (kind: string): string => join(folder, `${++last}.${kind}`)
const uri = (path: string, exportName = ''): string => `nbd+unix:///${exportName}?socket=${path}`
const at = ({ address }: NbdServer): string => {
  if ('path' in address) return uri(address.path)
  return `nbd://${address.host}:${address.port}`
}

const has = (program: string): boolean => spawnSync(program, ['--version']).status === 0
const haveLibnbd = has('nbdinfo') && has('nbdcopy')
if (!haveLibnbd) console.warn('SKIPPED tests with nbdinfo and nbdcopy, which are not installed')

async function disk(): Promise<Image> {
  const image = await create(name('qcow2'), { size: 8 * MIB })
  await image.write(Buffer.alloc(300_000, 'pattern of a disk'), { position: MIB })
  return image
}

async function out(program: string, ...args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await execute(program, args, folder)
  expect(stderr + String(code), [program, ...args].join(' ')).toBe('0')
  return stdout
}

/** What a client says until it waits for the answer to STARTTLS, which it gets. */
function startTls(server: NbdServer): Promise<Socket> {
  const { address } = server
  const socket = 'path' in address ? connect(address.path) : connect(address.port, address.host)
  const option = Buffer.from('IHAVEOPT\0\0\0\x05\0\0\0\0', 'latin1')
  socket.write(Buffer.concat([Buffer.from([0, 0, 0, 3]), option]))
  return new Promise((resolve, reject) => {
    let heard = 0
    socket.on('error', reject).on('data', bytes => {
      heard += bytes.length
      if (heard === 18 + 20) resolve(socket.off('error', reject).on('error', () => {}))
    })
  })
}

const ended = (socket: Socket): Promise<unknown> => new Promise(resolve => socket.resume().once('close', resolve))

describe.skipIf(process.platform === 'win32' || !haveOpenssl)('NBD over TLS', () => {
  it('is what our server and our client speak, by certificates and by keys', async () => {
    await using image = await disk()
    const [byCertificate, byKey] = [
      await serveNbd(image, { port: 0, tls: serverTls }),
      await serveNbd(image, { path: name('sock'), tls: { psk }, exportName: 'x' }),
    ]
    for (const [server, where, tls] of [
      [byCertificate, at(byCertificate), clientTls],
      [byCertificate, at(byCertificate), { ...clientTls, hostname: 'localhost' }],
      [byKey, `${at(byKey).replace('///', '///x')}`, bob],
    ] as const) {
      const source = nbdSource(where, { tls })
      expect((await listNbd(where, { tls })).map(each => each.size)).toEqual([8 * MIB])
      const copy = name('qcow2')
      await convert(source, copy, { from: 'raw', to: 'qcow2' })
      expect(await compare(source, copy, { formatA: 'raw' })).toMatchObject({ identical: true })
      await using opened = await open(source, { format: 'raw', flags: 'r+' })
      const writes = Array.from({ length: 20 }, (_, index) =>
        opened.write(Buffer.alloc(100_000, index), { position: 2 * MIB + index * 100_000 }),
      )
      await Promise.all(writes)
      await opened.datasync()
      const { buffer } = await image.read(Buffer.alloc(1), { position: 2 * MIB + 19 * 100_000 + 99_999 })
      expect(buffer[0]).toBe(19)
      expect(server.connections).toBe(1)
    }
    const { connections } = byKey
    expect(connections).toBeLessThan(2)
    await Promise.all([byKey.close(), byCertificate.close()])
  })

  it('is refused to who has no right to it, and refuses a server that has none', async () => {
    await using image = await disk()
    await using strict = await serveNbd(image, { port: 0, tls: serverTls })
    await using keyed = await serveNbd(image, { path: name('sock'), tls: { psk } })
    await using plain = await serveNbd(image, { path: name('sock') })
    const { stranger } = credentials
    const ofStranger = {
      ...clientTls,
      cert: readFileSync(join(stranger, 'client-cert.pem')),
      key: readFileSync(join(stranger, 'client-key.pem')),
    }
    const { ca: _, ...unsure } = clientTls as { ca?: Buffer }
    const wrongKey = { psk: { user: 'bob', key: Buffer.from(KEYS.qemu, 'hex') } }
    for (const [server, tls, why] of [
      [strict, undefined, 'wants TLS'],
      [strict, { ca: (clientTls as { ca: Buffer }).ca }, ''],
      [strict, ofStranger, ''],
      [strict, unsure, 'certificate'],
      [strict, { ...clientTls, ca: readFileSync(join(stranger, 'ca-cert.pem')) }, 'certificate'],
      [strict, { ...clientTls, hostname: 'other.example' }, "other.example. is not in the cert's altnames"],
      [strict, bob, 'handshake'],
      [keyed, named, 'handshake'],
      [keyed, wrongKey, ''],
      [keyed, { psk: { user: 'eve', key: psk['qemu'] ?? Buffer.alloc(1) } }, ''],
      [plain, bob, 'does not begin with TLS'],
    ] as const) {
      const failed = { code: expect.stringMatching(/^(ERR_QCOW2_IO|E[A-Z]+)$/), message: expect.stringContaining(why) }
      await expect(open(nbdSource(at(server), { tls }), { format: 'raw' }), why).rejects.toMatchObject(failed)
    }
    await expect.poll(() => strict.connections + keyed.connections + plain.connections).toBe(0)
    // Those that are in order are still let in.
    await using opened = await open(nbdSource(at(strict), { tls: clientTls }), { format: 'raw' })
    expect(opened.virtualSize).toBe(8 * MIB)
  })

  it('says what makes no TLS', async () => {
    await using image = await disk()
    const refused = (tls: unknown, field: string) =>
      expect(serveNbd(image, { path: name('sock'), tls } as never), JSON.stringify(tls)).rejects.toMatchObject({
        code: 'ERR_QCOW2_INVALID_ARGUMENT',
        field,
      })
    const { cert, key } = serverTls as { cert: Buffer; key: Buffer }
    await refused({}, 'tls')
    await refused('yes', 'tls')
    await refused({ cert }, 'tls')
    await refused({ cert, key: 'no key' }, 'tls')
    await refused({ cert, key: readFileSync(join(credentials.client, 'client-key.pem')) }, 'tls')
    await refused({ cert, key, crl: 'x' }, 'tls')
    await refused({ cert, key, hostname: 'x' }, 'hostname')
    await refused({ psk: {} }, 'psk')
    await refused({ psk: { a: 'text' } }, 'psk.a')
    await refused({ psk, cert }, 'cert')
    const source = (tls: unknown) => () => nbdSource('nbd://h', { tls } as never)
    expect(source({ psk: { user: 'x' } })).toThrow(expect.objectContaining({ code: 'ERR_QCOW2_INVALID_ARGUMENT' }))
    expect(source({ cert })).toThrow(expect.objectContaining({ field: 'tls' }))
    expect(source({ ca: 'no certificate' })).toThrow(expect.objectContaining({ field: 'tls' }))
    expect(source({ psk: { user: 'x', key: Buffer.alloc(257) } })).toThrow(expect.objectContaining({ field: 'key' }))
    expect(source({ hostname: 'h' })).not.toThrow()
    expect(() => nbdSource(uri('/s'), { tls: clientTls })).toThrow(expect.objectContaining({ field: 'hostname' }))
  })

  it('ends what is silent or garbage in time, and with the server', async () => {
    await using image = await disk()
    await using server = await serveNbd(image, { path: name('sock'), tls: serverTls, handshakeTimeout: 300 })
    const begin = performance.now()
    const silent = await startTls(server)
    await ended(silent)
    expect(performance.now() - begin).toBeGreaterThan(250)
    const garbage = await startTls(server)
    garbage.write(Buffer.alloc(100_000, 0x47))
    await ended(garbage)
    const half = await startTls(server)
    half.destroy()
    await expect.poll(() => server.connections).toBe(0)
    expect(performance.now() - begin).toBeLessThan(10_000)
    // A client in the middle of it, and one that is through.
    const slow = await serveNbd(image, { path: name('sock'), tls: serverTls })
    const waiting = ended(await startTls(slow))
    await using opened = await open(nbdSource(at(slow), { tls: named }), { format: 'raw' })
    await Promise.all([slow.close(), waiting])
    await expect(opened.read(Buffer.alloc(1), { position: 0 })).rejects.toMatchObject({ code: 'ERR_QCOW2_IO' })
  })

  it('answers what is under way when the server ends, also where the client goes on asking', async () => {
    await using image = await disk()
    const server = await serveNbd(image, { path: name('sock'), tls: { psk } })
    const secure = secureConnect({
      socket: await startTls(server),
      pskCallback: () => ({ identity: 'bob', psk: Buffer.from(KEYS.bob, 'hex') }),
      checkServerIdentity: () => undefined,
      ciphers: 'PSK',
      maxVersion: 'TLSv1.2',
    })
    // NBD_OPT_EXPORT_NAME is answered by 10 bytes.
    secure.write(Buffer.from('IHAVEOPT\0\0\0\x01\0\0\0\0', 'latin1'))
    await once(secure, 'readable')
    const LENGTH = 256 * 1024
    const read = Buffer.alloc(28)
    read.writeUInt32BE(0x25609513)
    read.writeUInt32BE(LENGTH, 24)
    // Some are under way at any time: for each answer it asks once more.
    let [heard, asked] = [0, 0]
    const answer = LENGTH + 16
    const all = new Promise(resolve => secure.on('error', () => {}).once('close', resolve))
    const ask = (): void => {
      for (; asked < (heard - 10) / answer + 12; asked++) if (secure.writable) secure.write(read)
    }
    secure.on('data', bytes => {
      heard += bytes.length
      ask()
    })
    await expect.poll(() => heard).toBeGreaterThan(10 * answer)
    await server.close()
    await all
    expect((heard - 10) % answer).toBe(0)
  })

  it('gives a server up that does not shake hands', async () => {
    const path = name('sock')
    const sockets: Socket[] = []
    const mute = createServer(socket => {
      sockets.push(socket.on('error', () => {}))
      socket.write(Buffer.from('NBDMAGICIHAVEOPT\0\x03', 'latin1'))
      // STARTTLS is answered, and then nothing.
      socket.on('data', bytes => {
        if (bytes.includes('IHAVEOPT')) socket.write(Buffer.from('0003e889045565a9000000050000000100000000', 'hex'))
      })
    })
    await new Promise<void>(resolve => mute.listen(path, resolve))
    const late = nbdSource(uri(path), { tls: named, connectTimeout: 300 })
    await expect(open(late)).rejects.toMatchObject({ code: 'ETIMEDOUT' })
    const aborted = { name: 'AbortError', cause: { name: 'TimeoutError' } }
    const patient = nbdSource(uri(path), { tls: named })
    await expect(open(patient, { signal: AbortSignal.timeout(100) })).rejects.toMatchObject(aborted)
    await expect.poll(() => sockets.every(socket => socket.destroyed || socket.readableEnded)).toBe(true)
    for (const socket of sockets) socket.destroy()
    mute.close()
  })

  it('comes back with another connection', async () => {
    const [file, path] = [name('raw'), name('sock')]
    writeFileSync(file, Buffer.alloc(MIB, 'pattern'))
    const options = `tls: { psk: { bob: Buffer.from('${KEYS.bob}', 'hex') } }`
    const server = await serverProcess(file, path, options)
    await using opened = await open(nbdSource(uri(path), { tls: bob, reconnect: 60_000 }), { format: 'raw' })
    await using given = await open(nbdSource(uri(path), { tls: bob }), { format: 'raw' })
    await kill(server)
    await expect(given.read(Buffer.alloc(7), { position: 0 })).rejects.toMatchObject({ code: 'ERR_QCOW2_IO' })
    const waits = opened.read(Buffer.alloc(7), { position: 0 })
    const again = await serverProcess(file, path, options)
    expect((await waits).buffer.toString()).toBe('pattern')
    await kill(again)
  })

  it('keeps no process, and goes with one', async () => {
    await using image = await disk()
    await using server = await serveNbd(image, { path: name('sock'), tls: { psk } })
    const program = (then: string) => `
      const qcow2 = require(${JSON.stringify(library)})
      const tls = { psk: { user: 'bob', key: Buffer.from(${JSON.stringify(KEYS.bob)}, 'hex') } }
      qcow2.open(qcow2.nbdSource(${JSON.stringify(at(server))}, { tls }), { format: 'raw' }).then(async image => {
        const { buffer } = await image.read(Buffer.alloc(7), { position: ${MIB} })
        console.log(buffer.toString())
        ${then}
      })`
    const run = (then: string) => execute(process.execPath, ['-e', program(then)], folder)
    const begin = performance.now()
    expect(await run('')).toMatchObject({ code: 0, stdout: 'pattern\n', stderr: '' })
    expect(await run('process.exit(3)')).toMatchObject({ code: 3, stdout: 'pattern\n', stderr: '' })
    expect(await run('await image.close()')).toMatchObject({ code: 0, stdout: 'pattern\n', stderr: '' })
    expect(performance.now() - begin).toBeLessThan(15_000)
    await expect.poll(() => server.connections, { timeout: 5000 }).toBe(0)
  })

  it.skipIf(!haveQemu || !haveLibnbd)("is what QEMU's tools and libnbd speak with our server", async () => {
    await using image = await disk()
    await using byCertificate = await serveNbd(image, { port: 0, tls: serverTls })
    const byKey = await serveNbd(image, { path: name('sock'), tls: { psk } })
    if (!('port' in byCertificate.address && 'path' in byKey.address)) throw new Error('no addresses')
    const { client, psk: keys } = credentials
    const raw = name('raw')
    for (const [object, described] of [
      [
        `tls-creds-x509,id=t,dir=${client},endpoint=client`,
        `server.type=inet,server.host=localhost,server.port=${byCertificate.address.port}`,
      ],
      [
        `tls-creds-psk,id=t,dir=${keys},endpoint=client,username=bob`,
        `server.type=unix,server.path=${byKey.address.path}`,
      ],
    ]) {
      const options = `driver=nbd,${described},tls-creds=t`
      await out('qemu-img', 'convert', '--object', object ?? '', '--image-opts', options, '-O', 'raw', raw)
      const { buffer } = await image.read(Buffer.alloc(8 * MIB), { position: 0 })
      expect(readFileSync(raw).equals(buffer)).toBe(true)
      const write = ['-c', 'write -P 5 4M 1M', '-c', 'flush', '-c', 'read -P 5 4M 1M']
      await out('qemu-io', '--object', object ?? '', ...write, '--image-opts', options)
    }
    const nbds = [
      `nbds://localhost:${byCertificate.address.port}/?tls-certificates=${client}`,
      `nbds+unix://bob@/?socket=${byKey.address.path}&tls-psk-file=${keys}/keys.psk`,
    ]
    for (const each of nbds) {
      const info = JSON.parse(await out('nbdinfo', '--json', each)) as Record<string, unknown>
      expect(info).toMatchObject({ TLS: true, exports: [{ 'export-size': 8 * MIB }] })
      writeFileSync(raw, Buffer.alloc(8 * MIB, `written over ${each}`))
      await out('nbdcopy', '--flush', raw, each)
      await out('nbdcopy', each, `${raw}.back`)
      expect(readFileSync(`${raw}.back`).equals(readFileSync(raw))).toBe(true)
    }
    const revoked = `tls-creds-x509,id=t,dir=${credentials.stranger},endpoint=client`
    const { port } = byCertificate.address
    const stranger = ['--image-opts', `driver=nbd,host=localhost,port=${port},tls-creds=t`]
    expect((await execute('qemu-img', ['info', '--object', revoked, ...stranger], folder)).code).toBe(1)
    await byKey.close()
  })

  it.skipIf(!haveQemu)('is what qemu-nbd speaks with our client', async () => {
    const file = name('raw')
    writeFileSync(file, Buffer.alloc(4 * MIB, 'a disk of another server'))
    const { server, psk: keys } = credentials
    const serve = async (object: string): Promise<string> => {
      const path = name('sock')
      const args = ['-t', '-e', '9', '-f', 'raw', '-k', path, '--object', object, '--tls-creds', 't', file]
      running.push(spawn('qemu-nbd', args, { stdio: 'ignore' }))
      const listens = (): boolean => spawnSync('test', ['-S', path]).status === 0
      await expect.poll(listens, { timeout: 20_000 }).toBe(true)
      return path
    }
    const [strict, keyed] = await Promise.all([
      serve(`tls-creds-x509,id=t,dir=${server},endpoint=server,verify-peer=yes`),
      serve(`tls-creds-psk,id=t,dir=${keys},endpoint=server`),
    ])
    for (const [path, tls] of [
      [strict, named],
      [strict, { ...clientTls, hostname: '127.0.0.1' }],
      [keyed, bob],
    ] as const) {
      const source = nbdSource(uri(path), { tls })
      const copy = name('raw')
      await convert(source, copy, { from: 'raw', to: 'raw' })
      expect(readFileSync(copy).equals(readFileSync(file))).toBe(true)
      const image = await open(source, { format: 'raw', flags: 'r+' })
      await image.write(Buffer.from(`by ${path}`), { position: MIB })
      await image.close()
      expect(readFileSync(file).includes(`by ${path}`)).toBe(true)
    }
    await expect(open(nbdSource(uri(strict)))).rejects.toMatchObject({ message: expect.stringContaining('wants TLS') })
    const other = nbdSource(uri(strict), { tls: { ...clientTls, hostname: 'other' } })
    await expect(open(other)).rejects.toMatchObject({ message: expect.stringContaining('altnames') })
  })

  it('takes no certificate that was revoked', async () => {
    const ca = join(folder, 'ca')
    execFileSync('sh', [
      '-c',
      `mkdir ${ca} && cd ${ca} && touch index && echo 01 > number && printf '%s\\n' '[ca]' 'default_ca=x' '[x]' \
        'database=${ca}/index' 'crlnumber=${ca}/number' 'default_md=sha256' 'default_crl_days=2' > conf &&
        for do in '-revoke ${credentials.client}/client-cert.pem' '-gencrl -out crl.pem'; do
          openssl ca -config conf -keyfile ${folder}/authority.key -cert ${folder}/authority.pem $do 2> said || exit 1
        done`,
    ])
    await using image = await disk()
    const tls = { ...serverTls, crl: readFileSync(join(ca, 'crl.pem')) }
    await using server = await serveNbd(image, { path: name('sock'), tls })
    await expect(open(nbdSource(at(server), { tls: named }))).rejects.toMatchObject({ syscall: expect.anything() })
    expect(server.connections).toBe(0)
  })
})
