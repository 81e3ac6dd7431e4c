/** A Redis of a test's own, on a socket in its folder, and workers in processes of their own. */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { describe } from 'vitest'
import { CLI } from '../cli/run.js'

const found = spawnSync('redis-server', ['--version']).status === 0

/** Tests that need Redis: skipped where it is absent, in plain sight, and failed where tools are required. */
export function describeWithRedis(name: string, tests: () => void): void {
  if (!found && process.env['QCOW2_REQUIRE_QEMU'] === '1') {
    throw new Error('QCOW2_REQUIRE_QEMU=1, but redis-server is not installed')
  }
  if (!found) process.stderr.write(`SKIPPED (no redis-server): ${name}\n`)
  describe.skipIf(!found)(name, tests)
}

export class RedisServer {
  readonly #folder: string
  #child: ChildProcess | undefined

  constructor(folder: string) {
    this.#folder = join(folder, 'redis')
    mkdirSync(this.#folder)
  }

  get url(): string {
    return `unix://${this.#socket}`
  }

  get #socket(): string {
    return join(this.#folder, 'socket')
  }

  /** Starts it, with what an earlier one wrote. */
  async start(): Promise<void> {
    const where = ['--port', '0', '--unixsocket', this.#socket, '--dir', this.#folder]
    const args = [...where, '--save', '', '--appendonly', 'yes', '--maxmemory-policy', 'noeviction']
    this.#child = spawn('redis-server', args, { stdio: 'ignore' })
    for (let tries = 0; !existsSync(this.#socket); tries++) {
      if (tries === 500) throw new Error('redis-server does not listen')
      await delay(10)
    }
  }

  async stop(): Promise<void> {
    await ended(this.#child, 'SIGTERM')
  }
}

/** Ends a process and waits; resolves to its exit code. */
export async function ended(child: ChildProcess | undefined, signal: NodeJS.Signals): Promise<number | null> {
  if (child === undefined || child.exitCode !== null || child.signalCode !== null) return child?.exitCode ?? null
  const gone = once(child, 'exit')
  child.kill(signal)
  await gone
  return child.exitCode
}

/** `qcow2 worker`: a machine, as far as the queue can see. */
export class WorkerProcess {
  readonly lines: string[] = []
  readonly child: ChildProcess
  stderr = ''

  constructor(args: readonly string[], env: NodeJS.ProcessEnv = {}) {
    this.child = spawn(process.execPath, [CLI, 'worker', ...args], {
      env: { ...process.env, ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    let rest = ''
    this.child.stdout?.on('data', (bytes: Buffer) => {
      const lines = (rest + bytes.toString()).split('\n')
      rest = lines.pop() ?? ''
      this.lines.push(...lines)
    })
    this.child.stderr?.on('data', (bytes: Buffer) => {
      this.stderr += bytes.toString()
    })
  }

  /** Waits for a line. */
  async said(pattern: RegExp): Promise<string> {
    for (let tries = 0; tries < 2000; tries++) {
      const line = this.lines.find(each => pattern.test(each))
      if (line !== undefined) return line
      await delay(10)
    }
    throw new Error(`no line like ${pattern}: ${this.lines.join('\n')}\n${this.stderr}`)
  }

  /** How many lines are like that. */
  count(pattern: RegExp): number {
    return this.lines.filter(line => pattern.test(line)).length
  }
}
