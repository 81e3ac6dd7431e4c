/** The process: its name, its signals, its exit code. */

import { basename, extname } from 'node:path'
import { exactArguments } from './arguments.js'
import { directWriter } from './direct-writer.js'
import { runProgram } from './program.js'
import { report } from './report.js'
import { Objects } from './secrets.js'
import { Output, type Session } from './session.js'

const SIGNALS = { SIGHUP: 1, SIGINT: 2, SIGTERM: 15 } as const
type Signal = keyof typeof SIGNALS

/** Runs the command line of this process and sets its exit code. Never rejects. */
export async function main(argv: readonly string[]): Promise<void> {
  const abort = new AbortController()
  let exitCode = 0
  const program = programName(argv[1])
  const stderr = new Output(() => process.stderr, undefined, directWriter(2))
  // It can come when all is done: files are written to at once, and tell a moment later.
  const lost = (error: Error): void => {
    stderr.write(`${program}: the output cannot be written: ${error.message}\n`)
    stderr.flush()
    exitCode ||= 1
    process.exitCode = exitCode
  }
  const session: Session = {
    program,
    get stdin() {
      return process.stdin
    },
    stdout: new Output(() => process.stdout, lost, directWriter(1)),
    stderr,
    env: process.env,
    signal: abort.signal,
    release: () => {
      for (const signal of Object.keys(SIGNALS)) process.off(signal, onSignal)
    },
    objects: new Objects(),
  }
  let caught: Signal | undefined
  const onSignal = (signal: Signal): void => {
    // The second time the user means it: what is open is left to the operating system, but for the terminal's cursor.
    if (caught !== undefined) {
      if (process.stderr.isTTY) process.stderr.write('\u001b[?25h\u001b[?7h\n')
      process.exit(128 + SIGNALS[signal])
    }
    caught = signal
    abort.abort(new Error(`interrupted by ${signal}`))
  }
  for (const signal of Object.keys(SIGNALS)) process.on(signal, onSignal)
  try {
    const code = await runProgram(exactArguments(argv.slice(2)), session)
    // Unless the output was lost meanwhile.
    exitCode ||= code
  } catch (error) {
    exitCode = caught === undefined ? await report(error, session) : 128 + SIGNALS[caught]
  } finally {
    process.exitCode = exitCode
    session.release()
    await session.stdout.written()
    session.stderr.flush()
    if (session.stdout.abandoned) process.exit()
  }
}

/** As the user called it: a link named `qemu-img` speaks as qemu-img does. */
function programName(script: string | undefined): string {
  const name = basename(script ?? 'qcow2')
  return extname(name) === '.js' ? 'qcow2' : name
}
