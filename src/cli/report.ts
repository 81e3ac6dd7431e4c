import { withoutCredentials } from '../remote/address.js'
import { describeError } from './errors.js'
import { CommandFailure } from './failure.js'
import { spoken } from './qemu-words.js'
import type { Session } from './session.js'

/** Writes what went wrong, after all that was printed before. Returns the exit code. */
export async function report(error: unknown, session: Session): Promise<number> {
  await session.stdout.written()
  const failure = error instanceof CommandFailure ? error : new CommandFailure(describeError(error), { cause: error })
  const typed = session.objects.asTyped(failure.message)
  const message = spoken(withoutCredentials(typed), session.program)
  const speaker = failure.command === undefined ? session.program : `${session.program} ${failure.command}`
  for (const line of message.split('\n')) session.stderr.write(`${speaker}: ${line}\n`)
  if (failure.hint !== undefined) session.stderr.write(`${failure.hint}\n`)
  return failure.exitCode
}
