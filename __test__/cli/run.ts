/** Runs the built command line, and qemu-img beside it where there is one. */

import { execFile, spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, symlinkSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Readable, Writable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import { afterAll, describe } from 'vitest'
import { runProgram } from '../../dist/cli/program.js'
import { report } from '../../dist/cli/report.js'
import { Objects } from '../../dist/cli/secrets.js'
import { Output, type Session } from '../../dist/cli/session.js'

export const CLI = fileURLToPath(new URL('../../dist/cli.js', import.meta.url))

export interface Outcome {
  readonly code: number | null
  readonly signal: NodeJS.Signals | null
  readonly stdout: string
  readonly stderr: string
}

/** QEMU's tools that the environment names in place of those on the path. */
const PROGRAMS: Readonly<Record<string, string | undefined>> = {
  'qemu-img': process.env['QEMU_IMG_PROG'],
  'qemu-io': process.env['QEMU_IO_PROG'],
}
const program = (name: string): string => PROGRAMS[name] ?? name

/** Runs a program to its end, in `cwd`; both of its streams are pipes. */
export function execute(
  file: string,
  args: readonly string[],
  cwd: string,
  env: NodeJS.ProcessEnv = {},
): Promise<Outcome> {
  return new Promise(resolve => {
    const child = execFile(
      program(file),
      args,
      { cwd, env: { ...process.env, LC_ALL: 'C', ...env }, maxBuffer: 64 << 20 },
      (_, stdout, stderr) => resolve({ code: child.exitCode, signal: child.signalCode, stdout, stderr }),
    )
  })
}

/** A folder for the tests of a file, removed after them, with the command line in it under both of its names. */
export function workspace(): string {
  const folder = mkdtempSync(join(tmpdir(), 'qcow2-cli-'))
  symlinkSync(CLI, join(folder, 'qemu-img'))
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  return folder
}

export const qcow2 = (args: readonly string[], cwd: string, env?: NodeJS.ProcessEnv): Promise<Outcome> =>
  execute(process.execPath, [CLI, ...args], cwd, env)

/**
 * The command line under the name of the tool that it stands in for: the same code in this process, because a test of a thousand command
 * lines waits for a thousand starts of Node otherwise. Streams, signals and what else is the process's own have tests of their own, by
 * {@link qcow2} and {@link asQemuImgProcess}.
 */
export const asQemuImg = (args: readonly string[], folder: string, cwd = folder): Promise<Outcome> =>
  inTurn('qemu-img', args, cwd)

/** The same, as qemu-nbd: for what does not serve. */
export const asQemuNbd = (args: readonly string[], folder: string): Promise<Outcome> => inTurn('qemu-nbd', args, folder)

/** The same, as qemu-io. */
export const asQemuIo = (args: readonly string[], folder: string): Promise<Outcome> => inTurn('qemu-io', args, folder)

function inTurn(tool: string, args: readonly string[], cwd: string): Promise<Outcome> {
  const outcome = turn.then(() => inThisProcess(tool, args, cwd))
  turn = outcome.catch(() => undefined)
  return outcome
}

/** A process has one working directory: one command line at a time. */
let turn: Promise<unknown> = Promise.resolve()

async function inThisProcess(tool: string, args: readonly string[], cwd: string): Promise<Outcome> {
  process.chdir(cwd)
  const [stdout, stderr] = [new Collected(), new Collected()]
  const session: Session = {
    program: tool,
    stdin: Readable.from([]),
    stdout: new Output(stdout),
    stderr: new Output(stderr),
    env: { ...process.env, LC_ALL: 'C' },
    signal: new AbortController().signal,
    release: () => undefined,
    objects: new Objects(),
  }
  const code = await runProgram(args, session).catch(error => report(error, session))
  await Promise.all([session.stdout.written(), session.stderr.written()])
  return { code, signal: null, stdout: stdout.text, stderr: stderr.text }
}

class Collected extends Writable {
  text = ''

  override _write(chunk: Buffer, _: string, done: () => void): void {
    this.text += chunk.toString()
    done()
  }
}

/** As {@link asQemuImg}, in a process of its own. */
export const asQemuImgProcess = (args: readonly string[], folder: string, cwd = folder): Promise<Outcome> =>
  execute(process.execPath, [join(folder, 'qemu-img'), ...args], cwd)

export type Tool = 'ours' | 'theirs'

export interface BothTools extends Readonly<Record<Tool, (line: string) => Promise<Outcome>>> {
  /**
   * What becomes of a command line with either tool, ours first; or of one line each. One runs after the other: both lock what they
   * write, so that side by side the second would be refused an image that the first has open.
   */
  readonly inTurn: (line: string, theirLine?: string) => Promise<readonly [ours: Outcome, theirs: Outcome]>
}

/** Both tools in `folder`; words of a line stand apart by one space. */
export function bothTools(folder: string): BothTools {
  const ours = (line: string): Promise<Outcome> => asQemuImg(line.split(' '), folder)
  const theirs = (line: string): Promise<Outcome> => execute('qemu-img', line.split(' '), folder)
  return { ours, theirs, inTurn: async (line, theirLine = line) => [await ours(line), await theirs(theirLine)] }
}

const required = process.env['QCOW2_REQUIRE_QEMU'] === '1'
const found = spawnSync(program('qemu-img'), ['--version'], { encoding: 'utf8' })
export const haveQemu = found.status === 0 && spawnSync(program('qemu-io'), ['--version']).status === 0

/** Tests that need QEMU: skipped where it is absent, in plain sight, and failed where it is required. */
export function describeWithQemu(name: string, tests: () => void): void {
  if (!haveQemu && required) throw new Error('QCOW2_REQUIRE_QEMU=1, but qemu-img and qemu-io are not installed')
  if (!haveQemu) process.stderr.write(`SKIPPED (no qemu-img): ${name}\n`)
  describe.skipIf(!haveQemu)(name, tests)
}

/** The major version of qemu-img; 0 where there is none. */
export const qemuVersion = Number(/version (\d+)/.exec(found.stdout ?? '')?.[1] ?? 0)
