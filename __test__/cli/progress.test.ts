import { PassThrough } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { describe, expect, it } from 'vitest'
import { type ProgressChoice, withProgress } from '../../dist/cli/progress.js'
import { Objects } from '../../dist/cli/secrets.js'
import { Output, type Session } from '../../dist/cli/session.js'

const GIB = 2 ** 30

/** A session whose streams are kept, each a terminal or not. */
function sessionOn(terminals: { stdout: boolean; stderr: boolean }, env: NodeJS.ProcessEnv = {}) {
  const stream = (isTTY: boolean) => {
    const kept = Object.assign(new PassThrough({ encoding: 'utf8' }), { isTTY, columns: 100 })
    return { output: new Output(kept), text: () => String(kept.read() ?? '') }
  }
  const [stdout, stderr] = [stream(terminals.stdout), stream(terminals.stderr)]
  const session: Session = {
    program: 'qcow2',
    stdin: new PassThrough(),
    release: () => undefined,
    stdout: stdout.output,
    stderr: stderr.output,
    env,
    signal: new AbortController().signal,
    objects: new Objects(),
  }
  return { session, stdout: stdout.text, stderr: stderr.text }
}

const CHOICE: ProgressChoice = { progress: false, quiet: false, verb: 'Converting', step: 1 }

/** A job that takes its time. */
const work = (session: Session, choice: Partial<ProgressChoice>, steps = 20, pause = 20) =>
  withProgress(session, { ...CHOICE, ...choice }, async ({ onProgress, signal }) => {
    expect(signal).toBe(session.signal)
    for (let step = 0; step <= steps; step += 1) {
      onProgress?.({ phase: 'convert', current: (4 * GIB * step) / steps, total: 4 * GIB, steps: [] })
      await sleep(pause)
    }
    return 'done'
  })

describe('progress', () => {
  it('is a bar with sizes, speed and time left on a terminal, without being asked', async () => {
    const { session, stdout, stderr } = sessionOn({ stdout: true, stderr: true })
    expect(await work(session, {})).toBe('done')
    const text = stderr()
    expect(stdout()).toBe('')
    expect(text).toMatch(/Converting ━+╌* \d+% {2}[\d.]+ GiB of 4 GiB {2}[\d.]+ GiB\/s {2}ETA \d+s/)
    expect(text).toMatch(/Converting ━+ 100% {2}4 GiB of 4 GiB/)
    // The cursor that was hidden is shown again.
    expect(text.lastIndexOf('\u001b[?25h')).toBeGreaterThan(text.lastIndexOf('\u001b[?25l'))
  })

  it('says nothing about the time left while nothing moves', async () => {
    const { session, stderr } = sessionOn({ stdout: true, stderr: true })
    await withProgress(session, CHOICE, async ({ onProgress }) => {
      for (let step = 0; step < 20; step += 1) {
        onProgress?.({ phase: 'convert', current: GIB, total: 4 * GIB, steps: [] })
        await sleep(25)
      }
    })
    const told = [...stderr().matchAll(/ETA (\w+|\?)/g)].map(([, time]) => time)
    expect(told).toContain('?')
    for (const time of told) expect(time).toMatch(/^(\?|\d+s)$/)
  })

  it('is no bar for what is done at once', async () => {
    const { session, stderr } = sessionOn({ stdout: true, stderr: true })
    await work(session, {}, 3, 1)
    expect(stderr()).toBe('')
  })

  it('is the lines of qemu-img where a program reads them', async () => {
    for (const stderrIsTerminal of [true, false]) {
      const { session, stdout, stderr } = sessionOn({ stdout: false, stderr: stderrIsTerminal })
      await work(session, { progress: true }, 8, 1)
      const percents = ['0.00', '12.50', '25.00', '37.50', '50.00', '62.50', '75.00', '87.50', '100.00', '100.00']
      expect(stdout()).toBe(`${percents.map(percent => `    (${percent}/100%)\r`).join('')}\n`)
      expect(stderr()).toBe('')
    }
  })

  it('skips steps too small to see', async () => {
    const { session, stdout } = sessionOn({ stdout: false, stderr: false })
    await work(session, { progress: true, step: 50 }, 8, 1)
    expect(stdout()).toBe('    (0.00/100%)\r    (62.50/100%)\r    (100.00/100%)\r    (100.00/100%)\r\n')
  })

  it('has each step of what was passed between two looks, and where the job turned out to be longer', async () => {
    const { session, stdout } = sessionOn({ stdout: false, stderr: false })
    await withProgress(session, { ...CHOICE, progress: true, whole: () => true }, async ({ onProgress }) => {
      onProgress?.({ phase: 'amend', current: 100, total: 200, steps: [1, 2, 4, 60, 61, 100] })
      onProgress?.({ phase: 'amend', current: 100, total: 400, steps: [] })
      onProgress?.({ phase: 'amend', current: 400, total: 400, steps: [399, 400] })
    })
    const percents = ['0.00', '2.00', '30.00', '50.00', '25.00', '99.75', '100.00']
    expect(stdout()).toBe(`${percents.map(percent => `    (${percent}/100%)\r`).join('')}\n`)
  })

  it('ends at 100 % only where the result says so', async () => {
    const { session, stdout } = sessionOn({ stdout: false, stderr: false })
    await withProgress(session, { ...CHOICE, progress: true, whole: () => false }, async ({ onProgress }) => {
      onProgress?.({ phase: 'compare', current: 200, total: 200, steps: [100, 200] })
    })
    expect(stdout()).toBe('    (0.00/100%)\r    (50.00/100%)\r\n')
  })

  it('is silent without a terminal, and where silence was asked for', async () => {
    for (const [terminal, quiet, env] of [
      [false, false, {}],
      [true, true, {}],
      [true, false, { TERM: 'dumb' }],
    ] as const) {
      const { session, stdout, stderr } = sessionOn({ stdout: terminal, stderr: terminal }, env)
      await work(session, { quiet }, 15, 20)
      expect([stdout(), stderr()]).toEqual(['', ''])
    }
  })

  it('leaves the terminal as it was when the job fails, and never says 100%', async () => {
    const { session, stderr } = sessionOn({ stdout: true, stderr: true })
    const failure = new Error('no')
    const job = withProgress(session, CHOICE, async ({ onProgress }) => {
      await sleep(300)
      onProgress?.({ phase: 'convert', current: GIB, total: 4 * GIB, steps: [] })
      throw failure
    })
    await expect(job).rejects.toBe(failure)
    const text = stderr()
    expect(text).toContain(' 25%  1 GiB of 4 GiB')
    expect(text).not.toContain('100%')
    expect(text.lastIndexOf('\u001b[?25h')).toBeGreaterThan(text.lastIndexOf('25%'))
    const lines = sessionOn({ stdout: false, stderr: false })
    await expect(
      withProgress(lines.session, { ...CHOICE, progress: true }, () => Promise.reject(failure)),
    ).rejects.toBe(failure)
    expect(lines.stdout()).toBe('    (0.00/100%)\r\n')
  })
})

describe('output', () => {
  it('gathers what is written, and hands it on in large pieces', () => {
    const chunks: string[] = []
    const stream = new PassThrough({ encoding: 'utf8', highWaterMark: 1 << 20 })
    stream.on('data', chunk => chunks.push(chunk))
    const output = new Output(stream)
    for (let index = 0; index < 10_000; index += 1) output.write('twelve bytes')
    output.flush()
    stream.read()
    expect(chunks.join('')).toBe('twelve bytes'.repeat(10_000))
    expect(chunks.length).toBeLessThan(5)
  })

  it('notices that nobody reads and stays quiet, and tells of all else once', () => {
    const stream = new PassThrough()
    const output = new Output(stream)
    stream.emit('error', Object.assign(new Error('write EPIPE'), { code: 'EPIPE' }))
    expect(output.closed).toBe(true)
    output.write('x')
    output.flush()
    expect(stream.read()).toBeNull()
    const heard: Error[] = []
    const file = new PassThrough()
    const lost = new Output(file, error => heard.push(error))
    for (let n = 0; n < 2; n++) file.emit('error', Object.assign(new Error('full'), { code: 'ENOSPC' }))
    expect(lost.closed).toBe(true)
    expect(heard).toMatchObject([{ message: 'full' }])
  })
})
