// npm test: installs, builds, and runs every test, Rust then TypeScript. Arguments go to vitest (npm test -- convert).
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, relative } from 'node:path'
import { onPath, prepare, root, run } from './lib.mjs'

await prepare()
const env = { ...process.env, ...(process.stdout.isTTY ? { FORCE_COLOR: '1', CARGO_TERM_COLOR: 'always' } : {}) }
const total = { passed: 0, failed: 0, skipped: 0 }
const parts = []
// Named again at the end: the rest of the output is long.
const failures = []
let ok = true

function report(name, counts) {
  for (const key of Object.keys(total)) total[key] += counts[key]
  parts.push(`${name} ${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`)
}

/** Runs cargo and adds up the summary lines of libtest or nextest. */
async function cargo(name, args) {
  const counts = { passed: 0, failed: 0, skipped: 0 }
  const code = await run('cargo', args, {
    env,
    tap: line => {
      // nextest says it as it happens and again in its summary.
      const failed = /^ *(?:FAIL|TIMEOUT|SIG\w+|ABORT) \[.*?\] (?:\(.*?\) )?(.*)$|^test (.*) \.\.\. FAILED$/.exec(line)
      const test = failed?.[1] ?? failed?.[2]
      if (test !== undefined && !failures.includes(test)) failures.push(test)
      if (!/test result: |Summary .* tests? run: /.test(line)) return
      for (const [, n, what] of line.matchAll(/(\d+) (passed|failed|timed out|ignored|skipped)/g)) {
        counts[what === 'ignored' ? 'skipped' : what === 'timed out' ? 'failed' : what] += Number(n)
      }
    },
  })
  // A build that fails runs no test and still must not count as nothing.
  if (code !== 0 && counts.failed === 0) counts.failed = 1
  ok &&= code === 0
  report(name, counts)
}

const nextest = spawnSync('cargo', ['nextest', '--version'], { stdio: 'ignore' }).status === 0
if (nextest) {
  await cargo('Rust', [
    'nextest',
    'run',
    '--workspace',
    '--no-fail-fast',
    '--status-level=slow',
    '--final-status-level=fail',
  ])
  await cargo('Rust documentation', ['test', '--workspace', '--doc', '--quiet'])
} else {
  await cargo('Rust', ['test', '--workspace', '--no-fail-fast', '--quiet'])
}

const folder = mkdtempSync(join(tmpdir(), 'qcow2-vitest-'))
const file = join(folder, 'report.json')
const vitest = ['node_modules/vitest/vitest.mjs', 'run', '--reporter=default', '--reporter=json']
const code = await run(process.execPath, [...vitest, `--outputFile.json=${file}`, ...process.argv.slice(2)], { env })
ok &&= code === 0
try {
  const result = JSON.parse(readFileSync(file, 'utf8'))
  report('TypeScript', {
    passed: result.numPassedTests,
    failed: result.numFailedTests,
    skipped: result.numPendingTests,
  })
  for (const file of result.testResults) {
    const failed = file.assertionResults.filter(test => test.status === 'failed')
    for (const { fullName, failureMessages } of failed) {
      failures.push(`${relative(root, file.name)}: ${fullName}: ${failureMessages[0]?.split('\n')[0]}`)
    }
    // A file that cannot be loaded has no tests to fail.
    if (failed.length === 0 && file.status === 'failed') failures.push(`${relative(root, file.name)}: ${file.message}`)
  }
} catch (error) {
  failures.push(`vitest: ${error.message}`)
  report('TypeScript', { passed: 0, failed: 1, skipped: 0 })
}
rmSync(folder, { recursive: true })
if (code !== 0 && failures.length === 0) failures.push(`vitest ended with ${code}: an error outside of a test`)

for (const failure of failures) process.stdout.write(`FAILED ${failure}\n`)
process.stdout.write(`\n${parts.join('\n')}\n`)
for (const tool of ['qemu-img', 'qemu-io']) {
  // nextest shows nothing of a test that passes, so say here what those tests could not do.
  if (!onPath(tool)) process.stdout.write(`SKIPPED ${tool} is not installed: tests against QEMU compared nothing\n`)
}
process.stdout.write(`npm test: ${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped\n`)
process.exitCode = ok ? 0 : 1
