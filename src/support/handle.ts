/** What handles of things in this process have in common: how `console.log` shows them, and that they cannot be sent to another thread. */

import type { InspectOptions } from 'node:util'

/** The name of the method that `util.inspect` calls. */
export const INSPECT: unique symbol = Symbol.for('nodejs.util.inspect.custom') as never

/** Node's `inspect`, as it gives itself to that method. */
export type Inspect = (value: unknown, options: InspectOptions) => string

/** `Image { path: '…', … }`. */
export function inspectAs(
  name: string,
  values: Readonly<Record<string, unknown>>,
  depth: number,
  options: InspectOptions,
  inspect: Inspect,
): string {
  if (depth < 0) return `[${name}]`
  const known = Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined))
  return `${name} ${inspect(known, options)}`
}

/**
 * The value of a property of its own, by which structured cloning refuses the handle and says why: `postMessage` would make an object
 * without anything of it.
 */
export const staysHere = (what: string): symbol =>
  Symbol(`${what} stays in its thread: send its name, and open that there`)
