/**
 * How a command ends when it cannot do what was asked: the lines for stderr and the exit code. Nothing below
 * `main` writes errors or exits, so that every message goes through one place.
 */
export class CommandFailure extends Error {
  override readonly name = 'CommandFailure'
  readonly exitCode: number
  /** Printed below the message, without the program's name in front. */
  readonly hint: string | undefined
  /** The command that the message is said in the name of, behind the program's. */
  readonly command: string | undefined

  constructor(message: string, options: { exitCode?: number; hint?: string; command?: string; cause?: unknown } = {}) {
    super(message, { cause: options.cause })
    this.exitCode = options.exitCode ?? 1
    this.hint = options.hint
    this.command = options.command
  }
}

/** A wrong command line: where to find help is added. */
export class UsageFailure extends CommandFailure {}

/** An option that the command does not have, or not in this form: said in the name of the command, as getopt does. */
export class OptionFailure extends UsageFailure {}

/** An option that qemu-img has and this version does not: refused by name, never ignored. */
export const unsupported = (what: string, why: string): CommandFailure =>
  new CommandFailure(`${what} is not supported: ${why} (ERR_QCOW2_UNSUPPORTED_OPTION)`)
