/** QEMU's names of ciphers, modes, generators of initialisation vectors, and hashes. */
export const CIPHER_ALGS = [
  'aes-128',
  'aes-192',
  'aes-256',
  'serpent-128',
  'serpent-192',
  'serpent-256',
  'twofish-128',
  'twofish-192',
  'twofish-256',
] as const
export const CIPHER_MODES = ['xts', 'cbc', 'ctr'] as const
export const IVGEN_ALGS = ['plain', 'plain64', 'essiv'] as const
export const HASH_ALGS = ['sha1', 'sha224', 'sha256', 'sha384', 'sha512', 'ripemd160'] as const
