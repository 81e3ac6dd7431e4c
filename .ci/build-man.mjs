// npm run build:man: the manual page, dist/man/qcow2.1, of the commands as they are declared.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { root } from './lib.mjs'

// A machine that makes the library need not have the addon.
process.env.NAPI_RS_NATIVE_LIBRARY_PATH = join(root, '.ci', 'no-addon.cjs')
const { manualPage } = createRequire(import.meta.url)('../dist/cli/manual.js')
const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
mkdirSync(join(root, 'dist', 'man'), { recursive: true })
writeFileSync(join(root, 'dist', 'man', 'qcow2.1'), await manualPage('qcow2', version))
