/** Signals and outputs that fail: what the process does, what it leaves, and its exit code. */

import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, existsSync, openSync, readdirSync, truncateSync, writeFileSync } from 'node:fs'
import { connect } from 'node:net'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { create, open } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { noise } from './noise.js'
import { CLI, qcow2, workspace } from './run.js'

const folder = workspace()
const SIZE = 4 << 20

beforeAll(async () => {
  writeFileSync(join(folder, 'disk.raw'), noise(SIZE))
  const image = await create(join(folder, 'disk.qcow2'), { size: SIZE })
  await image.write(noise(SIZE), { position: 0 })
  await image.close()
})

interface Running {
  readonly child: ChildProcess
  readonly stdout: () => string
  readonly stderr: () => string
  readonly ended: Promise<unknown[]>
}

function start(args: readonly string[]): Running {
  const child = spawn(process.execPath, [CLI, ...args], { cwd: folder, stdio: ['ignore', 'pipe', 'pipe'] })
  const text = { stdout: '', stderr: '' }
  for (const name of ['stdout', 'stderr'] as const) {
    child[name].setEncoding('utf8').on('data', (chunk: string) => {
      text[name] += chunk
    })
  }
  return { child, stdout: () => text.stdout, stderr: () => text.stderr, ended: once(child, 'close') }
}

async function until(what: () => boolean): Promise<void> {
  const deadline = Date.now() + 20_000
  while (!what()) {
    if (Date.now() > deadline) throw new Error('it did not happen within 20 s')
    await sleep(20)
  }
}

/** Long enough for anything here: the rate makes it more than a minute. */
const SLOW = ['convert', '-r', '64k', '-O', 'qcow2', 'disk.raw', 'out.qcow2']
const onUnix = describe.skipIf(process.platform === 'win32')

onUnix('SIGUSR1', () => {
  it('asks a job how far it is', async () => {
    const job = start(['convert', '-r', '2M', '-O', 'raw', 'disk.raw', 'asked.raw'])
    const asking = setInterval(() => job.child.kill('SIGUSR1'), 100)
    // Before the handler is there the signal is Node's: it is sent when the job runs.
    await until(() => job.stderr().includes('/100%)') || job.child.exitCode !== null)
    clearInterval(asking)
    expect(await job.ended).toEqual([0, null])
    expect(job.stdout()).toBe('')
    const told = job
      .stderr()
      .split('\n')
      .filter(line => !/ebugger|inspector/.test(line))
    expect(told.slice(0, -1)).not.toEqual([])
    for (const line of told.slice(0, -1)) expect(line).toMatch(/^ {4}\(\d+\.\d\d\/100%\)$/)
  })

  it('is answered on the standard output with -p', async () => {
    const job = start(['convert', '-p', '-r', '2M', '-O', 'raw', 'disk.raw', 'asked-p.raw'])
    await until(() => job.stdout().includes('(0.00/100%)'))
    const before = job.stdout().length
    job.child.kill('SIGUSR1')
    await until(() => job.stdout().length > before)
    expect(await job.ended).toEqual([0, null])
    expect(job.stderr()).toBe('')
    expect(job.stdout()).toMatch(/^( {4}\(\d+\.\d\d\/100%\)\r)+\n$/)
  })

  it('closes the debugger that a signal opened before the program was there to hear it', async () => {
    const early = join(folder, 'early.cjs')
    writeFileSync(
      early,
      `process.debugPort = 0; process.kill(process.pid, 'SIGUSR1'); setTimeout(() => require(${JSON.stringify(CLI)}), 50)`,
    )
    const child = spawn(process.execPath, [early, ...SLOW], { cwd: folder, stdio: ['ignore', 'ignore', 'pipe'] })
    try {
      const [said] = (await once(child.stderr, 'data')) as [Buffer]
      const port = Number(/ws:\/\/127\.0\.0\.1:(\d+)\//.exec(String(said))?.[1])
      expect(port).toBeGreaterThan(0)
      const open = (): Promise<boolean> =>
        new Promise(resolve => {
          const socket = connect(port, '127.0.0.1', () => resolve(true)).on('error', () => resolve(false))
          socket.once('connect', () => socket.destroy())
        })
      expect(await open()).toBe(true)
      let still = true
      const deadline = Date.now() + 20_000
      while (still && Date.now() < deadline) {
        await sleep(50)
        still = await open()
      }
      expect({ still, ended: child.exitCode }).toEqual({ still: false, ended: null })
    } finally {
      const gone = once(child, 'exit')
      child.kill('SIGTERM')
      await gone
    }
  })

  it('opens no debugger where there is no job, and ends nothing', async () => {
    const script = `require(${JSON.stringify(CLI)}); process.kill(process.pid, 'SIGUSR1'); setTimeout(() => {}, 200)`
    const { status, signal, stderr } = spawnSync(process.execPath, ['-e', script], { encoding: 'utf8' })
    expect({ status, signal }).toEqual({ status: 1, signal: null })
    expect(stderr).not.toMatch(/[Dd]ebugger|inspector/)
  })
})

onUnix.each([
  ['SIGHUP', 129],
  ['SIGINT', 130],
  ['SIGTERM', 143],
] as const)('%s', (signal, code) => {
  it.each([
    ['convert', SLOW],
    ['convert to raw', ['convert', '-r', '64k', '-O', 'raw', 'disk.qcow2', 'out.raw']],
    ['convert, compressed, several threads', [...SLOW.slice(0, -2), '-c', '-m', '4', 'disk.raw', 'out.qcow2']],
  ])('ends %s, which leaves nothing', async (_, args) => {
    const before = readdirSync(folder).toSorted()
    const job = start([...args.slice(0, 1), '-p', ...args.slice(1)])
    await until(() => job.stdout().includes('(0.00/100%)'))
    job.child.kill(signal)
    expect(await job.ended).toEqual([code, null])
    expect(job.stderr()).toBe('')
    expect(readdirSync(folder).toSorted()).toEqual(before)
  })

  it('ends a commit, after which the image reads as before', async () => {
    const [base, top] = [join(folder, 'base.raw'), join(folder, 'top.qcow2')]
    writeFileSync(base, '')
    truncateSync(base, SIZE)
    const image = await create(top, {
      backingFile: base,
      backingFormat: 'raw',
      references: 'allow',
      overwrite: true,
    })
    await image.write(noise(SIZE), { position: 0 })
    await image.close()
    const job = start(['commit', '-p', '-r', '64k', 'top.qcow2'])
    await until(() => job.stdout().includes('(0.00/100%)'))
    job.child.kill(signal)
    expect(await job.ended).toEqual([code, null])
    await using after = await open(top, { references: 'allow' })
    const { buffer } = await after.read(Buffer.alloc(SIZE), { position: 0 })
    expect(buffer.equals(noise(SIZE))).toBe(true)
  })
})

onUnix('SIGPIPE', () => {
  it('is ignored, as in qemu-img', async () => {
    const job = start(['convert', '-p', '-r', '4M', '-O', 'raw', 'disk.raw', 'piped.raw'])
    await until(() => job.stdout().includes('(0.00/100%)'))
    job.child.kill('SIGPIPE')
    expect(await job.ended).toEqual([0, null])
  })
})

describe.skipIf(!existsSync('/dev/full'))('an output that is full', () => {
  it.each([
    ['--help'],
    ['--version'],
    ['convert --help'],
    ['create -f qcow2 -o help'],
    ['create -f qcow2 full.qcow2 1M'],
    ['info disk.qcow2'],
    ['info --output=json disk.qcow2'],
    ['map disk.qcow2'],
    ['map --output=json disk.qcow2'],
    ['map --output=svg disk.qcow2'],
    ['map --picture disk.qcow2'],
    ['check disk.qcow2'],
    ['compare disk.qcow2 disk.raw'],
    ['measure -O qcow2 disk.qcow2'],
    ['convert -p -O raw disk.qcow2 full.raw'],
    ['compact --dry-run disk.qcow2'],
    ['resize disk.qcow2 +0'],
  ])('%s says so and fails', async line => {
    const full = openSync('/dev/full', 'w')
    try {
      const { status, stderr } = spawnSync(process.execPath, [CLI, ...line.split(' ')], {
        cwd: folder,
        stdio: ['ignore', full, 'pipe'],
        encoding: 'utf8',
      })
      expect({ status, stderr }).toEqual({
        status: 1,
        stderr: expect.stringMatching(/^qcow2: the output cannot be written: .*ENOSPC.*\n$/),
      })
    } finally {
      closeSync(full)
    }
  })

  it('does not change the exit code of what found a difference, or failed', async () => {
    const { code } = await qcow2(['compare', 'disk.qcow2', 'gone'], folder)
    const full = openSync('/dev/full', 'w')
    const ended = spawnSync(process.execPath, [CLI, 'compare', 'disk.qcow2', 'gone'], {
      cwd: folder,
      stdio: ['ignore', full, full],
    })
    closeSync(full)
    expect(ended.status).toBe(code)
  })
})
