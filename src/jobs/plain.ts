/** Results as JSON has them. */

/** An error as JSON has it. */
export interface PlainError {
  /** Its code. */
  readonly code: string
  /** What it says. */
  readonly message: string
}

/** As JSON has it: without bytes, which stand beside a text where that is not exact; errors with their code and message. */
export type Plain<T> = T extends Error
  ? PlainError
  : T extends readonly (infer U)[]
    ? readonly Plain<U>[]
    : T extends object
      ? {
          readonly [K in keyof T as NonNullable<T[K]> extends Uint8Array | readonly Uint8Array[] ? never : K]: Plain<
            T[K]
          >
        }
      : T

/** See {@link Plain}. */
export const plain = <T>(value: T): Plain<T> => JSON.parse(JSON.stringify(value, jsonOf)) as Plain<T>

/** Before JSON calls it, a Buffer's own `toJSON` has made an object of it: so the holder is asked. */
function jsonOf(this: unknown, key: string, value: unknown): unknown {
  const own: unknown = typeof this === 'object' && this !== null ? Reflect.get(this, key) : value
  if (own instanceof Uint8Array || (Array.isArray(own) && own.length > 0 && own.every(isBytes))) return undefined
  if (own instanceof Error)
    return { code: 'code' in own ? String(own.code) : 'ERR_QCOW2_INTERNAL', message: own.message }
  return value
}

const isBytes = (value: unknown): boolean => value instanceof Uint8Array
