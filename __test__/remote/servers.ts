/** Real servers for tests: each in a process of its own, which goes down with the test file. */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Upstream } from './proxy.js'

const path = `${process.env['PATH']}:/usr/sbin:/sbin`

function found(program: string): boolean {
  return spawnSync(program, ['-v'], { env: { ...process.env, PATH: path }, stdio: 'ignore' }).error === undefined
}

/** Whether a program is there. Tests that need one that is not are skipped, visibly; with `QCOW2_REQUIRE_SERVERS=1` they fail. */
export function has(program: string, what: string): boolean {
  if (found(program)) return true
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
  const stop = async (): Promise<void> => {
    child.kill('SIGTERM')
    await Promise.race([gone, sleep(5000).then(() => child.kill('SIGKILL'))])
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

/** nginx, with the files of a folder. */
export async function startNginx(folder: string, files: string): Promise<Serving> {
  const socketPath = join(folder, 'nginx.sock')
  const config = join(folder, 'nginx.conf')
  const places = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map(
    name => `${name}_temp_path ${join(folder, name)};`,
  )
  // Run by root it would serve as somebody who may not read the folder.
  const user = process.getuid?.() === 0 ? 'user root;' : ''
  writeFileSync(
    config,
    `${user} daemon off; worker_processes 1; pid ${join(folder, 'nginx.pid')}; error_log stderr;
     events { worker_connections 64; }
     http { access_log off; ${places.join(' ')}
            server { listen unix:${socketPath}; root ${files}; location /plain/ { alias ${files}/; max_ranges 0; } } }`,
  )
  const child = spawn('nginx', ['-c', config, '-p', folder, '-e', 'stderr'], {
    env: { ...process.env, PATH: path },
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  const upstream = { socketPath }
  return serving(child, upstream, async () => existsSync(socketPath) && (await listens(upstream)))
}
