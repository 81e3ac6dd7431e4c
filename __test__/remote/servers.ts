/** Real servers for tests: each in a process of its own, which goes down with the test file. */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, writeFileSync } from 'node:fs'
import { type AddressInfo, connect, createServer } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Upstream } from './proxy.js'

const path = `${process.env['PATH']}:/usr/sbin:/sbin`

function found(program: string, question: string): boolean {
  return spawnSync(program, [question], { env: { ...process.env, PATH: path }, stdio: 'ignore' }).error === undefined
}

/** Whether a program is there. Tests that need one that is not are skipped, visibly; with `QCOW2_REQUIRE_SERVERS=1` they fail. */
export function has(program: string, what: string, question = '-v'): boolean {
  if (found(program, question)) return true
  if (!['', '0', undefined].includes(process.env['QCOW2_REQUIRE_SERVERS'])) {
    throw new Error(`${program} is not installed and QCOW2_REQUIRE_SERVERS is set`)
  }
  process.stderr.write(`SKIPPED ${program} is not installed: ${what}\n`)
  return false
}

/** A program that serves, and how it is ended. */
export interface Serving {
  readonly upstream: Upstream
  stop(): Promise<void>
}

async function serving(child: ChildProcess, upstream: Upstream, ready: () => Promise<boolean>): Promise<Serving> {
  const gone = once(child, 'exit')
  let said = ''
  child.stderr?.on('data', (text: Buffer) => {
    said = `${said}${text}`.slice(-4096)
  })
  // What they have is thrown away.
  const stop = async (): Promise<void> => {
    child.kill('SIGKILL')
    await gone
  }
  for (let tries = 0; tries < 600; tries++) {
    if (child.exitCode !== null) throw new Error(`${child.spawnfile} ended: ${said}`)
    if (await ready()) return { upstream, stop }
    await sleep(25)
  }
  await stop()
  throw new Error(`${child.spawnfile} does not serve: ${said}`)
}

/** Whether somebody listens there. */
export const listens = (upstream: Upstream): Promise<boolean> =>
  new Promise(resolve => {
    const socket = connect('socketPath' in upstream ? { path: upstream.socketPath } : upstream)
    socket.once('connect', () => resolve(true)).once('error', () => resolve(false))
    socket.once('connect', () => socket.destroy())
  })

/** nginx, with the files of a folder; on a port as well, for those who know no sockets. */
export async function startNginx(folder: string, files: string): Promise<Serving & { readonly origin: string }> {
  const socketPath = join(folder, 'nginx.sock')
  const [port] = await freePorts(1)
  const config = join(folder, 'nginx.conf')
  const places = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(
    name => `${name}_temp_path ${join(folder, name)};`,
  )
  // Run by root it would serve as somebody who may not read the folder.
  const user = process.getuid?.() === 0 ? 'user root;' : ''
  writeFileSync(
    config,
    `${user} daemon off; master_process off; pid ${join(folder, 'nginx.pid')}; error_log stderr;
     events { worker_connections 64; }
     http { access_log off; ${places.join(' ')}
            server { listen unix:${socketPath}; listen 127.0.0.1:${port}; root ${files}; location /plain/ { alias ${files}/; max_ranges 0; } } }`,
  )
  const child = spawn('nginx', ['-c', config, '-p', folder, '-e', 'stderr'], {
    env: { ...process.env, PATH: path },
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  const upstream = { socketPath }
  const serves = await serving(child, upstream, async () => existsSync(socketPath) && (await listens(upstream)))
  return { ...serves, origin: `http://127.0.0.1:${port}` }
}

/** Ports that nobody uses. */
async function freePorts(count: number): Promise<number[]> {
  const servers = Array.from({ length: count }, () => createServer().listen(0, '127.0.0.1'))
  await Promise.all(servers.map(server => once(server, 'listening')))
  const ports = servers.map(server => (server.address() as AddressInfo).port)
  await Promise.all(servers.map(server => new Promise(resolve => server.close(resolve))))
  return ports
}

// On the oldest version of Node that this package runs on, the SDK says that its days are numbered.
process.env['AWS_SDK_JS_NODE_VERSION_SUPPORT_WARNING_DISABLED'] = 'true'

/** SeaweedFS, or what names it. */
const weed = process.env['QCOW2_WEED'] ?? 'weed'

/** Whether there is an S3-compatible server. */
export const hasS3 = (): boolean => has(weed, 'nothing was asked of an S3-compatible store', 'version')

/** Who may do everything there. */
export const S3_CREDENTIALS = { accessKeyId: 'key', secretAccessKey: 'secret-of-key' } as const

/** SeaweedFS: a store that speaks S3, all of it in one process. */
export async function startS3(folder: string): Promise<Serving & { readonly upstream: { port: number } }> {
  const data = join(folder, 'weed')
  mkdirSync(data)
  const config = join(folder, 's3.json')
  const { accessKeyId: accessKey, secretAccessKey: secretKey } = S3_CREDENTIALS
  writeFileSync(
    config,
    JSON.stringify({ identities: [{ name: 'all', credentials: [{ accessKey, secretKey }], actions: ['Admin'] }] }),
  )
  const names = ['master.port', 'volume.port', 'filer.port', 's3.port']
  const ports = await freePorts(2 * names.length)
  const options = names.flatMap((name, i) => [`-${name}=${ports[2 * i]}`, `-${name}.grpc=${ports[2 * i + 1]}`])
  const places = [
    `-dir=${data}`,
    '-ip=127.0.0.1',
    '-ip.bind=127.0.0.1',
    `-filer.localSocket=${join(data, 'filer.sock')}`,
  ]
  const small = ['-master.telemetry=false', '-volume.max=0', '-master.volumeSizeLimitMB=64', '-volume.preStopSeconds=0']
  const s3 = [
    '-filer',
    '-s3',
    `-s3.config=${config}`,
    '-s3.iam=false',
    '-s3.autoCreateBucket=false',
    '-s3.port.iceberg=0',
    '-s3.port.lance=0',
  ]
  const child = spawn(weed, ['-logtostderr', 'server', ...places, ...small, ...s3, ...options], {
    cwd: folder,
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  const upstream = { host: '127.0.0.1', port: ports[6] ?? 0 }
  const serves = await serving(child, upstream, () => listens(upstream))
  return { ...serves, upstream }
}
