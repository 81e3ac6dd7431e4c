// node .ci/check-release.mjs FOLDER: refuses (exit code 1) a release that is not complete and of one version.
import { existsSync } from 'node:fs'
import { problemsOf } from './release.mjs'

const folder = process.argv[2]
if (!folder || !existsSync(folder)) {
  process.stderr.write('usage: node .ci/check-release.mjs FOLDER, as written by .ci/pack.mjs\n')
  process.exit(2)
}
const problems = problemsOf(folder)
for (const problem of problems) process.stderr.write(`release: ${problem}\n`)
process.stdout.write(problems.length === 0 ? 'release: complete\n' : `release: refused, ${problems.length} problems\n`)
process.exitCode = problems.length === 0 ? 0 : 1
