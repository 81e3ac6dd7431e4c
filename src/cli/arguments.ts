/** The arguments of the process with every byte that they have. */

import { readFileSync } from 'node:fs'
import { decodeText, encodeText, shownText } from '../text.js'
import { CommandFailure } from './failure.js'

const NUL = 0
const END = Buffer.of(NUL)

/** Where this program, when it starts itself again, finds the bytes of its arguments: Node gives text to a process alone. */
const HANDED = 'QCOW2_ARGUMENTS'

/** What a process that gets the same arguments has in its environment, so that it has all their bytes. */
export function handedOver(): Record<string, string> {
  const bytes = exactArguments(process.argv.slice(2)).map(argument => Buffer.concat([encodeText(argument), END]))
  return { [HANDED]: Buffer.concat(bytes).toString('base64') }
}

/**
 * The last arguments of this process, `shown` as Node has them: it puts replacement characters where an argument is not UTF-8. There
 * the bytes are taken from the system, as strings that have every byte (`text.ts`).
 */
export function exactArguments(shown: readonly string[]): string[] {
  if (process.platform !== 'linux' || !shown.some(argument => argument.includes('\uFFFD'))) return [...shown]
  const exact = ofProcess().slice(-shown.length)
  const odd = shown.find((argument, index) => exact[index] === undefined || shownText(exact[index]) !== argument)
  if (odd === undefined) return exact
  throw new CommandFailure(`The argument '${odd}' is not UTF-8, and /proc/self/cmdline does not have its bytes`)
}

/** What the process was started with. Each argument ends with a null byte. */
function ofProcess(): string[] {
  const handed = process.env[HANDED]
  let bytes: Buffer
  try {
    bytes = handed === undefined ? readFileSync('/proc/self/cmdline') : Buffer.from(handed, 'base64')
  } catch {
    return []
  }
  const found: string[] = []
  for (let at = 0, end = bytes.indexOf(NUL); end >= 0; at = end + 1, end = bytes.indexOf(NUL, at)) {
    found.push(decodeText(bytes.subarray(at, end)))
  }
  return found
}
