/**
 * The addon, typed. The one module that loads it.
 *
 * `../dist/binding.js` is the loader that the native build generates; the path is right from `src/` and from `dist/`.
 */
import * as binding from '../dist/binding.js'

export const native = binding
