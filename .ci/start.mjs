// npm start: the demonstration job. npm start -- ARGS: the command line, in the folder npm was called from.
import { join } from 'node:path'
import { prepare, root, run } from './lib.mjs'

await prepare()
const args = process.argv.slice(2)
const [script, cwd] = args.length > 0 ? ['dist/cli.js', process.env.INIT_CWD || process.cwd()] : ['.ci/demo.mjs', root]
process.exitCode = await run(process.execPath, [join(root, script), ...args], { cwd })
