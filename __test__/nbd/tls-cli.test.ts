/** The command line over TLS, beside QEMU's tools: each against the other, and in the same words. */

import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { create } from 'qcow2'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { asQemuImg, asQemuNbd, CLI, execute, haveQemu, type Outcome } from '../cli/run.js'
import { type Credentials, haveOpenssl, makeCredentials } from './certificates.js'

const MIB = 2 ** 20
// Paths of sockets must be short.
const folder = mkdtempSync(join(tmpdir(), 'q-'))
const running: ChildProcess[] = []
let credentials: Credentials
let last = 0
const name = (kind: string): string => join(folder, `${++last}.${kind}`)

beforeAll(async () => {
  if (!haveOpenssl) return
  credentials = makeCredentials(folder)
  symlinkSync(CLI, join(folder, 'qemu-nbd'))
  const image = await create(join(folder, 'disk.qcow2'), { size: 8 * MIB })
  await image.write(Buffer.alloc(131_072, 7), { position: MIB })
  await image.close()
})
afterAll(() => {
  for (const child of running) child.kill()
  rmSync(folder, { recursive: true, force: true })
})

async function ok(run: Promise<Outcome>): Promise<string> {
  const { code, stdout, stderr } = await run
  expect([code, stderr]).toEqual([0, ''])
  return stdout
}

const objects = () => {
  const { server, client, psk } = credentials
  return {
    server: `tls-creds-x509,id=t,dir=${server},endpoint=server,verify-peer=yes`,
    open: `tls-creds-x509,id=t,dir=${server},endpoint=server,verify-peer=no`,
    keys: `tls-creds-psk,id=t,dir=${psk},endpoint=server`,
    client: `tls-creds-x509,id=t,dir=${client},endpoint=client`,
    user: `tls-creds-psk,id=t,dir=${psk},endpoint=client,username=bob`,
  }
}

/** A port that was free. */
async function freePort(): Promise<number> {
  const server = createServer()
  await new Promise<void>(resolve => server.listen(0, '127.0.0.1', resolve))
  const address = server.address()
  await new Promise(resolve => server.close(resolve))
  return typeof address === 'object' && address !== null ? address.port : 0
}

/** Serves the disk; the object says how clients begin. Resolves when it listens. */
async function served(tool: 'ours' | 'theirs', object: string, ...where: readonly string[]): Promise<void> {
  const pid = name('pid')
  const args = ['-t', '-e', '9', '-f', 'qcow2', '--object', object, '--tls-creds', 't', '--pid-file', pid, ...where]
  const [program, ...before] = tool === 'ours' ? [process.execPath, join(folder, 'qemu-nbd')] : ['qemu-nbd']
  running.push(spawn(program ?? '', [...before, ...args, join(folder, 'disk.qcow2')], { cwd: folder, stdio: 'ignore' }))
  await expect.poll(() => existsSync(pid), { timeout: 20_000 }).toBe(true)
}

describe.skipIf(process.platform === 'win32' || !haveOpenssl || !haveQemu)('TLS on the command line', () => {
  it.each(['ours', 'theirs'] as const)('lets both tools in to a server of %s', async tool => {
    const { server, client, keys, user } = objects()
    const [path, port] = [name('sock'), String(await freePort())]
    // Two of them write to one disk: nobody does here.
    await served(tool, server, '-r', '-b', '127.0.0.1', '-p', port)
    await served(tool, keys, '-r', '-k', path)
    const socket = `server.type=unix,server.path=${path}`
    for (const [object, where, list] of [
      [client, `server.type=inet,server.host=localhost,server.port=${port}`, ['-b', 'localhost', '-p', port]],
      [user, socket, ['-k', path]],
    ] as const) {
      const described = `driver=nbd,${where},tls-creds=t`
      const args = ['convert', '--object', object, '-O', 'qcow2', '--image-opts', described]
      for (const run of [asQemuImg, (a: readonly string[], f: string) => execute('qemu-img', a, f)]) {
        const out = name('qcow2')
        await ok(run([...args, out], folder))
        const compared = await ok(execute('qemu-img', ['compare', join(folder, 'disk.qcow2'), out], folder))
        expect(compared).toBe('Images are identical.\n')
      }
      const raw = `driver=raw,file.driver=nbd,${where.replaceAll('server.', 'file.server.')},file.tls-creds=t`
      for (const each of [described, raw, `${described},reconnect-delay=3`]) {
        const map = ['map', '--object', object, '--output=json', '--image-opts', each]
        expect(await ok(asQemuImg(map, folder))).toBe(await ok(execute('qemu-img', map, folder)))
      }
      const read = ['io', '-r', '--object', object, '-c', 'read -P 7 1M 64k', '--image-opts', described]
      expect(await ok(asQemuImg(read, folder))).toContain('read 65536/65536 bytes')
      const listed = ['-L', '--object', object, '--tls-creds', 't', ...list]
      // qemu-nbd tells more of a server of its own: it asks for 64-bit lengths.
      const ours = await asQemuNbd(listed, folder)
      expect(ours.code).toBe(0)
      if (tool === 'ours') expect(ours).toEqual(await execute('qemu-nbd', listed, folder))
    }
    const hidden = ['-b', '127.0.0.1', '-p', port]
    const named = ['-L', '--object', client, '--tls-creds', 't', '--tls-hostname', 'other', ...hidden]
    for (const args of [named, ['-L', ...hidden]]) {
      const [ours, theirs] = [await asQemuNbd(args, folder), await execute('qemu-nbd', args, folder)]
      expect([ours.code, ours.stdout]).toEqual([theirs.code, theirs.stdout])
    }
    expect((await asQemuNbd(named, folder)).stderr).toContain('TLS with the server failed')
  })

  it('lets strangers in where nobody asks who they are', async () => {
    const path = name('sock')
    await served('ours', objects().open, '-r', '-k', path)
    const stranger = `tls-creds-x509,id=t,dir=${credentials.stranger},endpoint=client`
    const trusting = join(folder, 'trusting')
    mkdirSync(trusting)
    writeFileSync(join(trusting, 'ca-cert.pem'), readFileSync(join(credentials.client, 'ca-cert.pem')))
    const info = (object: string, hostname = ',tls-hostname=localhost') => [
      'info',
      '--object',
      object,
      '--image-opts',
      `driver=nbd,path=${path},tls-creds=t${hostname}`,
    ]
    expect((await execute('qemu-img', info(stranger), folder)).code).toBe(1)
    expect((await asQemuImg(info(stranger), folder)).code).toBe(1)
    const unknown = `tls-creds-x509,id=t,dir=${trusting},endpoint=client`
    await ok(execute('qemu-img', info(unknown), folder))
    await ok(asQemuImg(info(unknown), folder))
    // A socket has no name that a certificate could be for.
    expect(await asQemuImg(info(unknown, ''), folder)).toEqual(await execute('qemu-img', info(unknown, ''), folder))
  })

  it('refuses what makes no sense in the words of qemu-nbd', async () => {
    const { server, client, keys, user } = objects()
    const secret = 'secret,id=s,data=x'
    const disk = join(folder, 'disk.qcow2')
    for (const args of [
      ['-k', name('sock'), '--tls-creds', 't', disk],
      ['-k', name('sock'), '--object', secret, '--tls-creds', 's', disk],
      ['-k', name('sock'), '--object', client, '--tls-creds', 't', disk],
      ['-k', name('sock'), '--object', user, '--tls-creds', 't', disk],
      ['-L', '-k', name('sock'), '--object', server, '--tls-creds', 't'],
      ['-L', '-k', name('sock'), '--object', keys, '--tls-creds', 't'],
      ['-k', name('sock'), '--tls-hostname', 'x', disk],
      ['-k', name('sock'), '--object', server, '--tls-creds', 't', '--tls-hostname', 'x', disk],
      ['-k', name('sock'), '--object', 'tls-creds-x509,id=t,endpoint=server', disk],
      ['-k', name('sock'), '--object', `tls-creds-x509,id=t,endpoint=server,dir=${folder}/none`, disk],
      ['-k', name('sock'), '--object', `tls-creds-psk,id=t,endpoint=server,dir=${folder}/none`, disk],
      ['-k', name('sock'), '--object', `${user}x`, disk],
      ['-k', name('sock'), '--object', `${keys},username=x`, disk],
      ['-k', name('sock'), '--object', `${server},bla=x`, disk],
      ['-k', name('sock'), '--object', `${server},endpoint=both`, disk],
      ['-k', name('sock'), '--object', `${server},verify-peer=perhaps`, disk],
    ]) {
      const [ours, theirs] = [await asQemuNbd(args, folder), await execute('qemu-nbd', args, folder)]
      const first = ({ stderr }: Outcome): string | undefined =>
        stderr.split('\n')[0]?.replace(/^(qemu-nbd: )--object [^:]*: /, '$1')
      expect([first(ours), ours.code], args.join(' ')).toEqual([first(theirs), theirs.code])
    }
    const refused = async (...args: readonly string[]) => (await asQemuNbd([...args, disk], folder)).stderr
    expect(await refused('--object', server, '--tls-creds', 't', '--tls-authz', 'a')).toContain(
      "'--tls-authz' is not supported",
    )
    // A key that is encrypted needs what it is encrypted with.
    const locked = join(folder, 'locked')
    mkdirSync(locked)
    const copy = (file: string): void => writeFileSync(join(locked, file), readFileSync(join(credentials.server, file)))
    for (const file of ['ca-cert.pem', 'server-cert.pem']) copy(file)
    const key = ['-in', join(credentials.server, 'server-key.pem'), '-out', join(locked, 'server-key.pem')]
    await ok(execute('openssl', ['pkey', ...key, '-aes256', '-passout', 'pass:sesame'], folder))
    const opened = (word: string) =>
      refused(
        ...[
          '--object',
          `secret,id=s,data=${word}`,
          '--object',
          `tls-creds-x509,id=t,dir=${locked},endpoint=server,passwordid=s`,
        ],
        ...['--tls-creds', 't', '-r', '-k', '/nonexistent/sock'],
      )
    expect(await opened('sesame')).toContain('Failed to bind socket')
    expect(await opened('simsim')).toContain('these make no TLS')
    expect(await refused('--object', `${server},priority=NORMAL`)).toContain("'priority' is not supported")
    expect(await refused('--object', `tls-creds-anon,id=t,dir=${folder}`)).toContain(
      "'tls-creds-anon' is not supported",
    )
    writeFileSync(join(folder, 'keys.psk'), 'qemu:no digits\n')
    const line = await refused('--object', `tls-creds-psk,id=t,endpoint=server,dir=${folder}`)
    expect(line).toContain('is not USER:KEY')
    expect(line).not.toContain('no digits')
  })

  it('begins with the name of the server that the certificate is for', async () => {
    const path = name('sock')
    await served('ours', objects().server, '-r', '-k', path)
    for (const [hostname, code] of [
      ['localhost', 0],
      ['127.0.0.1', 0],
      ['other', 1],
    ] as const) {
      const described = `driver=nbd,path=${path},tls-creds=t,tls-hostname=${hostname}`
      const args = ['info', '--object', objects().client, '--image-opts', described]
      const [ours, theirs] = [await asQemuImg(args, folder), await execute('qemu-img', args, folder)]
      expect([ours.code, theirs.code], hostname).toEqual([code, code])
    }
  })
})
