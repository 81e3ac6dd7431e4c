/** Node's streams, loaded when the first one is made: few callers need them, and they take longer to load than the library. */
export const nodeStream = (): typeof import('node:stream') => require('node:stream') as typeof import('node:stream')
