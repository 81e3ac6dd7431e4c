/** Commands about the program itself: sleep, sigraise, abort, quit. And those that need what is not here. */

import { setTimeout as wait } from 'node:timers/promises'
import type { Context } from './context.js'
import { type Arguments, refused } from './line.js'
import { toNumber } from './numbers.js'

const LAST_SIGNAL = 64n

export async function sleep({ session }: Context, { operands: [text = ''] }: Arguments): Promise<boolean> {
  if (!/^\s*\+?\d+$/.test(text)) throw refused(`${text} is not a valid number`)
  await wait(Number(text), undefined, { signal: session.signal })
  return true
}

/** Ends the process as the signal does, at once: nothing is flushed but what was printed. */
export async function sigraise({ session }: Context, { operands: [text = ''] }: Arguments): Promise<boolean> {
  const signal = toNumber(text)
  if (signal > LAST_SIGNAL) throw refused(`signal argument '${text}' is too large to be a valid signal`)
  await session.stdout.written()
  session.release()
  process.kill(process.pid, Number(signal))
  return true
}

export async function abort({ session }: Context): Promise<boolean> {
  await session.stdout.written()
  // Not Node's own way, which prints where its code was.
  process.kill(process.pid, 'SIGABRT')
  return true
}

export async function quit(context: Context): Promise<boolean> {
  context.ended = true
  return true
}

/** A command of QEMU's that asks for a device or a driver that no image here has. */
export const absent =
  (said: (args: Arguments) => string) =>
  async (_: Context, args: Arguments): Promise<boolean> => {
    throw refused(`${said(args)}: Operation not supported`)
  }
