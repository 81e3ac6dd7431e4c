/** What callers' objects threw in answer to the addon, by number, until the addon says that a request failed with it. */

const thrown = new Map<number, unknown>()
let last = 0

/** Keeps what was thrown, until {@link dropThrown}; its number. */
export function keepThrown(error: unknown): number {
  last = (last + 1) >>> 0
  thrown.set(last, error)
  return last
}

/** It is not asked for any more. */
export function dropThrown(number: number): void {
  thrown.delete(number)
}

/** What was thrown, if it is still kept. */
export function findThrown(number: number | undefined): { readonly error: unknown } | undefined {
  return number !== undefined && thrown.has(number) ? { error: thrown.get(number) } : undefined
}
