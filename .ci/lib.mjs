// What `npm start`, `npm test` and `.ci/run` share: checks the tools, installs, builds what changed. Plain Node, no
// dependency, and no syntax newer than the oldest Node that should still print a clear line instead of a syntax error.
import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = dirname(dirname(fileURLToPath(import.meta.url)))
export const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))

const STAMP = join(root, 'dist', '.stamp.json')
const INSTALL_STAMP = join(root, 'node_modules', '.lock-hash')

/** Ends the process with one line. */
export function fail(line) {
  process.stderr.write(`qcow2: ${line}\n`)
  process.exit(1)
}

/** Progress of the set-up goes to stderr: stdout belongs to the command. */
export function say(line) {
  process.stderr.write(`qcow2: ${line}\n`)
}

/** Whether dotted version `have` is at least `need`. */
export function atLeast(have, need) {
  const a = have.split('.').map(Number)
  const b = need.split('.').map(Number)
  for (let i = 0; i < b.length; i++) {
    if ((a[i] || 0) !== b[i]) return (a[i] || 0) > b[i]
  }
  return true
}

function checkTools() {
  const node = manifest.engines.node.replace('>=', '')
  if (!atLeast(process.versions.node, node)) {
    fail(`Node ${node} or newer is needed, this is ${process.versions.node}: install it from https://nodejs.org`)
  }
  const rust = /^rust-version = "([\d.]+)"$/m.exec(readFileSync(join(root, 'Cargo.toml'), 'utf8'))[1]
  const cargo = spawnSync('cargo', ['--version'], { encoding: 'utf8', cwd: root })
  const found = cargo.status === 0 && /^cargo (\d+\.\d+\.\d+)/.exec(cargo.stdout)
  if (!found) fail(`cargo ${rust} or newer is needed to build the engine: install Rust from https://rustup.rs`)
  if (!atLeast(found[1], rust)) {
    fail(`cargo ${rust} or newer is needed to build the engine, this is ${found[1]}: run "rustup update stable"`)
  }
  if (process.platform !== 'win32' && ![process.env.CC || 'cc', 'gcc', 'clang'].some(onPath)) {
    fail(
      'a C compiler is needed to link the engine: install gcc or clang (Debian: build-essential, macOS: Xcode tools)',
    )
  }
}

/** Whether a program answers on the PATH. */
export function onPath(program) {
  return !spawnSync(program, ['--version'], { stdio: 'ignore' }).error
}

/**
 * Runs a program to its end with this process's terminal; resolves with its exit code.
 * `options.tap`, if given, sees every line of its output, which is still shown.
 */
export function run(program, args, options) {
  const { tap, ...rest } = options || {}
  const output = tap ? 'pipe' : 'inherit'
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { cwd: root, stdio: ['inherit', output, output], ...rest })
    if (tap) {
      for (const [from, to] of [
        [child.stdout, process.stdout],
        [child.stderr, process.stderr],
      ]) {
        let pending = ''
        from.setEncoding('utf8')
        from.on('data', text => {
          to.write(text)
          const lines = (pending + text).split('\n')
          pending = lines.pop()
          lines.forEach(tap)
        })
      }
    }
    // The child is in the terminal's group and gets the signal itself; wait for it to tidy up.
    const wait = () => {}
    for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, wait)
    child.on('error', reject)
    child.on('close', (code, signal) => {
      for (const name of ['SIGINT', 'SIGTERM']) process.off(name, wait)
      resolve(signal ? 1 : code)
    })
  })
}

/** Runs npm with the npm that started us, where there is one. */
function npm(args) {
  const cli = process.env.npm_execpath
  // Output of the set-up goes to stderr (file descriptor 2) throughout.
  const stdio = ['ignore', 2, 2]
  return cli && /\.c?js$/.test(cli)
    ? run(process.execPath, [cli, ...args], { stdio })
    : run('npm', args, { stdio, shell: process.platform === 'win32' })
}

function* filesBelow(path) {
  if (!existsSync(path)) return
  for (const entry of readdirSync(path, { withFileTypes: true }).sort((a, b) => (a.name < b.name ? -1 : 1))) {
    const child = join(path, entry.name)
    if (entry.isDirectory()) {
      if (!['target', 'node_modules', 'tests', 'fuzz', 'testkit', 'benches'].includes(entry.name))
        yield* filesBelow(child)
    } else if (entry.isFile()) yield child
  }
}

/** A hash over the names and contents of files and folders below the root. */
function hashOf(paths, extra) {
  const hash = createHash('sha256').update(extra || '')
  for (const path of paths) {
    const full = join(root, path)
    const files = /\.\w+$/.test(path) ? [full].filter(existsSync) : filesBelow(full)
    for (const file of files) hash.update(file.slice(root.length)).update('\0').update(readFileSync(file)).update('\0')
  }
  return hash.digest('hex')
}

const readStamp = () => (existsSync(STAMP) ? JSON.parse(readFileSync(STAMP, 'utf8')) : {})

async function install() {
  const hash = hashOf(['package-lock.json'], `${process.platform} ${process.arch}`)
  if (existsSync(INSTALL_STAMP) && readFileSync(INSTALL_STAMP, 'utf8') === hash) return
  say('installing development dependencies (npm ci)')
  if ((await npm(['ci', '--no-progress', '--loglevel=error'])) !== 0) fail('npm ci failed, see above')
  writeFileSync(INSTALL_STAMP, hash)
}

/** Builds one half when its inputs changed since its last build. */
async function build(half, script, inputs, before) {
  const { version, napi, scripts } = manifest
  const hash = hashOf(inputs, JSON.stringify([process.platform, process.arch, version, napi, scripts[script]]))
  if (readStamp()[half] === hash) return
  say(`building the ${half} (npm run ${script})`)
  mkdirSync(join(root, 'dist'), { recursive: true })
  if (before) before()
  if ((await npm(['run', '--silent', script])) !== 0) fail(`npm run ${script} failed, see above`)
  writeFileSync(STAMP, `${JSON.stringify({ ...readStamp(), [half]: hash })}\n`)
}

/** Removes the output of TypeScript files that may be gone; the addon stays. */
function dropOldTypeScriptOutput() {
  for (const entry of readdirSync(join(root, 'dist'), { withFileTypes: true })) {
    const kept = entry.name === 'binding.d.ts' || entry.name.endsWith('.node') || entry.name === '.stamp.json'
    if (!kept) rmSync(join(root, 'dist', entry.name), { recursive: true })
  }
}

/** Brings a clone to the state in which everything runs; does nothing that is already done. */
export async function prepare() {
  checkTools()
  await install()
  await build('engine', 'build:native', ['Cargo.toml', 'Cargo.lock', 'crates'])
  const typescript = ['src', 'tsconfig.json', 'tsconfig.build.json', 'package-lock.json', '.ci/build-cli.mjs']
  await build('library', 'build:ts', typescript, dropOldTypeScriptOutput)
}
