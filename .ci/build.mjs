// npm run build: installs and builds what changed.
import { prepare } from './lib.mjs'

await prepare()
