/** Secrets of encrypted images, and how new ones are encrypted. */

import { CIPHER_ALGS, CIPHER_MODES, HASH_ALGS, IVGEN_ALGS } from './cipher-names.js'
import { invalidArgument } from './errors.js'
import type { NativeEncrypt, NativeSecret } from './native.js'
import { flag, integer, oneOf, type Reader, readOptions } from './options.js'
import { type PathLike, toPath } from './source.js'
import { describe } from './units.js'

/** A secret: a string, whose UTF-8 bytes are the secret, bytes, or a file, all of whose bytes are the secret (a line's end in it too). */
export type SecretBytes =
  | string
  | Uint8Array
  | {
      /** Its whole content is the secret. */
      readonly file: PathLike
    }

/**
 * What opens an encrypted image. With `allowWeak`, the image can be written to also where its encryption is weak, as legacy AES is;
 * `ERR_QCOW2_UNSUPPORTED_FEATURE` without it.
 */
export type Secret =
  | SecretBytes
  | {
      /** The secret itself. */
      readonly secret: SecretBytes
      /** Open what is encrypted weakly for writing, too. */
      readonly allowWeak: boolean
    }

/** A layer that is encrypted. */
export interface EncryptedLayer {
  /** Its file; undefined where only a descriptor is known. */
  readonly path: string | undefined
  /** How many layers lie above it in its image: 0 for the top. */
  readonly depth: number
  /** Of `convert`: which of the sources its image is, from 0; absent for a target that exists. */
  readonly source?: number
  /** By what its guest data is encrypted. */
  readonly encryption: 'aes' | 'luks'
}

/**
 * The secret of every encrypted layer, or a function that is asked for each of them. Without one (`undefined`) a layer stays closed: it
 * can be looked at, and reading its data is refused. A secret is tried on each key slot, which takes as long as the image wants a guess to
 * take, about a minute for each at most, and can be aborted; of a slot with argon2 (LUKS version 2), which may want 4 GiB of memory, only
 * when it has been tried.
 */
export type Secrets = Secret | ((layer: EncryptedLayer) => Secret | undefined | Promise<Secret | undefined>)

/** How a new image is encrypted. Names and defaults are QEMU's. */
export interface Encrypt {
  /**
   * Default `'luks'`: LUKS version 1. `'aes'` is the legacy AES encryption of QEMU, for readers that know no other: the first 16 bytes of
   * the secret are its key, nothing else can be chosen, and it is refused without `allowWeak`.
   */
  format?: 'luks' | 'aes' | undefined
  /** What opens the image. */
  secret: SecretBytes
  /** How long a guess of the secret takes on this machine, in milliseconds: 1 to 60000. Default 2000. */
  iterTime?: number | undefined
  /** Default `'aes-256'`. QEMU 10 cannot read keys of 192 bits in another mode than `xts`. */
  cipherAlg?: (typeof CIPHER_ALGS)[number] | undefined
  /** Default `'xts'`. */
  cipherMode?: (typeof CIPHER_MODES)[number] | undefined
  /** Default `'plain64'`; `'essiv'` for `cbc` where nothing else is said. */
  ivgenAlg?: (typeof IVGEN_ALGS)[number] | undefined
  /** The hash of `essiv`. Default `'sha256'`. */
  ivgenHashAlg?: (typeof HASH_ALGS)[number] | undefined
  /** Take a format or a combination that is known to be weak; it is refused otherwise. Default false. */
  allowWeak?: boolean | undefined
  /** Default `'sha256'`. */
  hashAlg?: (typeof HASH_ALGS)[number] | undefined
}

/** The copies of secrets that the call whose options are being read made. */
let copies: Uint8Array[] | undefined

/**
 * Runs a call that takes secrets, and overwrites its copies of them when it has ended, however it does. `call` reads its options at once, not
 * behind an `await`.
 */
export async function forgetting<T>(call: () => Promise<T>): Promise<T> {
  const outer = copies
  const own: Uint8Array[] = []
  copies = own
  let running: Promise<T>
  try {
    running = call()
  } finally {
    copies = outer
  }
  try {
    return await running
  } finally {
    for (const copy of own) copy.fill(0)
  }
}

/** Overwrites a secret that was asked for. */
export const forget = ({ bytes }: NativeSecret): void => {
  bytes?.fill(0)
}

function copied(bytes: Uint8Array): NativeSecret {
  copies?.push(bytes)
  return { bytes }
}

/** Reads {@link SecretBytes}. They are copied: what the caller does with its own does not matter. */
const secretBytes: Reader<NativeSecret> = (value, name) => {
  if (typeof value === 'string') return copied(new TextEncoder().encode(value))
  if (value instanceof Uint8Array) return copied(Uint8Array.from(value))
  if (typeof value === 'object' && value !== null && 'file' in value) {
    return { file: toPath(value.file, `${name}.file`) }
  }
  throw invalidArgument(name, `${name} must be a string, a Uint8Array or { file }, not ${describe(typeof value)}`)
}

const WEAK_SECRET = { secret: secretBytes, allowWeak: flag } as const

/** Reads a {@link Secret}. */
export const secret: Reader<NativeSecret> = (value, name) => {
  if (typeof value !== 'object' || value === null || !('secret' in value)) return secretBytes(value, name)
  const { secret, allowWeak } = readOptions(value, name, WEAK_SECRET)
  if (secret === undefined) throw invalidArgument('secret', `${name}: the option secret is needed`)
  return { ...secret, allowWeak }
}

/** Secrets that were checked: one for all, or a function to ask. What it gives is whose who asked, to {@link forget}. */
export type ReadSecrets = (layer: EncryptedLayer) => Promise<NativeSecret | undefined>

/** Reads {@link Secrets}. */
export const secrets: Reader<ReadSecrets> = (value, name) => {
  if (typeof value !== 'function') {
    const one = secret(value, name)
    return () => Promise.resolve(copyOf(one))
  }
  return async layer => {
    const given: unknown = await Reflect.apply(value, undefined, [layer])
    return given === undefined ? undefined : secret(given, name)
  }
}

/** Milliseconds that a guess of a secret takes. */
export const ITER_TIME = integer(1, 60_000)

/** The same secret in bytes of its own. */
export const copyOf = ({ bytes, ...rest }: NativeSecret): NativeSecret =>
  bytes === undefined ? rest : { ...rest, bytes: Uint8Array.from(bytes) }

const ENCRYPT = {
  format: oneOf('luks', 'aes'),
  secret: secretBytes,
  iterTime: ITER_TIME,
  allowWeak: flag,
  cipherAlg: oneOf(...CIPHER_ALGS),
  cipherMode: oneOf(...CIPHER_MODES),
  ivgenAlg: oneOf(...IVGEN_ALGS),
  ivgenHashAlg: oneOf(...HASH_ALGS),
  hashAlg: oneOf(...HASH_ALGS),
} as const

/** Reads an {@link Encrypt}. */
export const encrypt: Reader<NativeEncrypt> = (value, name) => {
  const { secret, ...options } = readOptions(value, name, ENCRYPT)
  if (secret === undefined) throw invalidArgument('secret', `${name}: the option secret is needed`)
  return { ...options, secret: { ...secret, allowWeak: options.allowWeak } }
}
