// npm run iotests [-- [-o OPTIONS] [--matrix] [--all-options] [-j JOBS] [--timeout SECONDS] [--diffs FOLDER] [--sample N] [--update] TEST...]
//
// QEMU's own suite on this command line: every test of the list that needs no virtual machine, in the standing of qemu-img. Prints a table
// and a score; ends with 1 if a test fails that expected.json says to pass, and says so if one passes that it does not know of.
//   --cell NAME    whose the tools are: ours (default), 'our qemu-img' or 'our qemu-io', the others being QEMU's own
//   --matrix       all three
//   --all-options  with each set of options of expected.json
//   --sample N     every Nth test of the list
//   --update       writes expected.json from what passed
//   --available    only brings the suite; ends with 1, saying why, where that cannot be done
// A test that fails against what is expected is tried once more, alone: some of them wait for a time that a busy machine does not keep.
import { spawn } from 'node:child_process'
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { availableParallelism, tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { suiteFolder } from './suite.mjs'
import { makeTools } from './tools.mjs'

const here = dirname(fileURLToPath(import.meta.url))
const EXPECTED = join(here, 'expected.json')
const expected = JSON.parse(readFileSync(EXPECTED, 'utf8'))

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    options: { type: 'string', short: 'o' },
    cell: { type: 'string', default: 'ours' },
    matrix: { type: 'boolean', default: false },
    'all-options': { type: 'boolean', default: false },
    jobs: { type: 'string', short: 'j', default: String(availableParallelism()) },
    timeout: { type: 'string', default: '300' },
    diffs: { type: 'string' },
    sample: { type: 'string', default: '1' },
    update: { type: 'boolean', default: false },
    available: { type: 'boolean', default: false },
  },
})

/** Who each tool is, by the name of the cell. */
const CELLS = {
  ours: { 'qemu-img': 'ours', 'qemu-io': 'ours', 'qemu-nbd': 'ours' },
  'our qemu-img': { 'qemu-img': 'ours', 'qemu-io': 'qemu', 'qemu-nbd': 'qemu' },
  'our qemu-io': { 'qemu-img': 'qemu', 'qemu-io': 'ours', 'qemu-nbd': 'qemu' },
}

/** Runs one test in folders of its own; resolves to `passed`, `failed`, `not run` or `timed out`, and what it printed. */
function runTest(suite, test, options, tools, timeout) {
  const work = mkdtempSync(join(tmpdir(), 'qcow2-io-'))
  const env = { ...process.env, ...tools, TEST_DIR: join(work, 't'), SOCK_DIR: join(work, 's') }
  mkdirSync(env.TEST_DIR)
  mkdirSync(env.SOCK_DIR)
  return new Promise(resolve => {
    const child = spawn('./check', ['-qcow2', ...options, test], {
      cwd: suite,
      env,
      detached: true,
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    let output = ''
    child.stdout.on('data', bytes => (output += bytes))
    child.stderr.on('data', bytes => (output += bytes))
    let late = false
    const timer = setTimeout(() => {
      late = true
      process.kill(-child.pid, 'SIGKILL')
    }, timeout * 1000)
    child.on('close', code => {
      clearTimeout(timer)
      rmSync(work, { recursive: true, force: true })
      const notRun = /^Not run: /m.test(output)
      resolve({ state: late ? 'timed out' : notRun ? 'not run' : code === 0 ? 'passed' : 'failed', output })
    })
  })
}

/** `-o X` of the suite, or another of its own switches. */
const switches = name => (name === '' ? [] : name.startsWith('-') ? [name] : ['-o', name])

async function runAll(suite, cell, name, tests, { diffs, jobs }) {
  const folder = mkdtempSync(join(tmpdir(), 'qcow2-tools-'))
  const tools = makeTools(folder, CELLS[cell])
  const waiting = [...tests]
  const results = new Map()
  const worker = async () => {
    for (let test = waiting.shift(); test !== undefined; test = waiting.shift()) {
      const { state, output } = await runTest(suite, test, switches(name), tools, Number(values.timeout))
      results.set(test, state)
      if (state !== 'passed' && diffs !== undefined) {
        mkdirSync(diffs, { recursive: true })
        writeFileSync(join(diffs, `${test}${name === '' ? '' : ` ${name.replaceAll('/', '_')}`}.txt`), output)
      }
    }
  }
  await Promise.all(Array.from({ length: jobs }, worker))
  rmSync(folder, { recursive: true })
  return results
}

function broughtSuite() {
  try {
    return suiteFolder()
  } catch (error) {
    process.stdout.write(`QEMU's own suite cannot be had: ${error.message}\n`)
    process.exit(1)
  }
}

const suite = broughtSuite()
if (values.available) process.exit(0)
// The suite writes into its own folder.
const scratch = mkdtempSync(join(tmpdir(), 'qcow2-suite-'))
cpSync(join(suite, '..', '..'), scratch, { recursive: true })
const copy = join(scratch, 'tests', 'qemu-iotests')

let broken = 0
try {
  const cells = values.matrix ? Object.keys(CELLS) : [values.cell]
  const sets = values['all-options'] ? Object.keys(expected.options) : [values.options ?? '']
  for (const cell of cells) {
    for (const name of sets) {
      const wanted = expected.options[name] ?? expected.options['']
      const every = wanted.tests.split(' ').filter((_, index) => index % Number(values.sample) === 0)
      const tests = positionals.length > 0 ? positionals : every
      const started = Date.now()
      const failing = wanted.failing?.[cell] ?? {}
      const how = { diffs: values.diffs, jobs: Number(values.jobs) }
      const results = await runAll(copy, cell, name, tests, how)
      const again = tests.filter(test => results.get(test) !== 'passed' && !(test in failing))
      for (const [test, state] of await runAll(copy, cell, name, again, { ...how, jobs: 1 })) results.set(test, state)
      const passed = tests.filter(test => results.get(test) === 'passed')
      const fresh = tests.filter(test => results.get(test) !== 'passed' && !(test in failing))
      const better = passed.filter(test => test in failing)
      const seconds = Math.round((Date.now() - started) / 1000)
      process.stdout.write(
        `${cell}${name === '' ? '' : `, ${name}`}: ${passed.length} of ${tests.length} pass (${seconds} s)\n`,
      )
      for (const test of tests) {
        const state = results.get(test)
        if (state !== 'passed')
          process.stdout.write(`  ${test} ${state}${test in failing ? `: ${failing[test]}` : ' (NEW)'}\n`)
      }
      if (better.length > 0)
        process.stdout.write(`  passes now, and expected.json does not know it: ${better.join(' ')}\n`)
      if (cell in (wanted.failing ?? {})) broken += fresh.length
      if (values.update && positionals.length === 0 && values.sample === '1') {
        wanted.failing ??= {}
        wanted.failing[cell] = Object.fromEntries(
          tests.filter(test => results.get(test) !== 'passed').map(test => [test, failing[test] ?? results.get(test)]),
        )
      }
    }
  }
  if (values.update) writeFileSync(EXPECTED, `${JSON.stringify(expected, null, 2)}\n`)
} finally {
  rmSync(scratch, { recursive: true, force: true })
}
if (broken > 0) process.stdout.write(`${broken} tests fail that should pass\n`)
process.exitCode = broken > 0 && !values.update ? 1 : 0
