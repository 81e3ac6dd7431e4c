/** What a short command loads: a script that looks at many images pays it for each. */

import { spawnSync } from 'node:child_process'
import {
  chmodSync,
  chownSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { create } from 'qcow2'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { CLI } from './run.js'

let folder: string
beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), 'qcow2-start-'))
  await (await create(join(folder, 'disk.qcow2'), { size: 2 ** 20 })).close()
  writeFileSync(
    join(folder, 'tell.cjs'),
    `process.on('exit', () => require('node:fs').writeFileSync('loaded', process.moduleLoadList.join('\\n')))`,
  )
})
afterAll(() => rmSync(folder, { recursive: true }))

test('a short command loads neither what starts programs nor a second way to files', () => {
  const run = spawnSync(process.execPath, ['--require', './tell.cjs', CLI, 'info', 'disk.qcow2'], {
    cwd: folder,
    encoding: 'utf8',
  })
  expect(run.stderr).toBe('')
  expect(run.stdout).toContain('file format: qcow2')
  const loaded = readFileSync(join(folder, 'loaded'), 'utf8').split('\n')
  expect(loaded).toContain('NativeModule internal/modules/cjs/loader')
  for (const name of ['child_process', 'fs/promises', 'readline', 'http', 'worker_threads', 'tls', 'crypto']) {
    expect(loaded).not.toContain(`NativeModule ${name}`)
  }
})

/** What runs through a pipe of the shell, as scripts have it: Node gives its children sockets. */
const piped = (line: string, env: NodeJS.ProcessEnv = {}) =>
  spawnSync('sh', ['-c', line], {
    cwd: folder,
    encoding: 'utf8',
    env: { ...process.env, NODE: process.execPath, CLI, XDG_CACHE_HOME: join(folder, 'cache'), ...env },
  })

test('what is printed into a file or a pipe opens no stream', () => {
  for (const line of [
    '$NODE --require ./tell.cjs $CLI info disk.qcow2 | cat',
    '$NODE --require ./tell.cjs $CLI info disk.qcow2 > out; cat out',
  ]) {
    const run = piped(line)
    expect(run.stdout).toContain('file format: qcow2')
    const loaded = readFileSync(join(folder, 'loaded'), 'utf8').split('\n')
    for (const name of ['stream', 'net']) expect(loaded).not.toContain(`NativeModule ${name}`)
  }
})

test('a pipe that is full waits for its reader, and what is printed arrives whole and in order', async () => {
  const image = await create(join(folder, 'noisy.qcow2'), { size: 2 ** 30 })
  for (let at = 0; at < 2 ** 30; at += 2 ** 18) await image.write(Buffer.alloc(512, 1), { position: at })
  await image.close()
  const whole = piped('$NODE $CLI map --output=json noisy.qcow2 > whole; wc -c < whole')
  expect(Number(whole.stdout)).toBeGreaterThan(2 ** 18)
  const slow = piped(
    '$NODE $CLI map --output=json noisy.qcow2 | { sleep 0.3; cat; } > slow; cmp whole slow && echo same',
  )
  expect(slow).toMatchObject({ stdout: 'same\n', stderr: '' })
  const enough = piped('{ $NODE $CLI map --output=json noisy.qcow2; echo $? >&2; } | head -c 10')
  expect(enough).toMatchObject({ stdout: '[{ "start"', stderr: '0\n' })
})

test('compiled code is kept for the user alone, and what is damaged or of others is not run', () => {
  const cache = join(folder, 'kept')
  const info = () => piped('$NODE $CLI info disk.qcow2', { XDG_CACHE_HOME: cache })
  const first = info()
  const [name = '', ...more] = readdirSync(join(cache, 'qcow2'))
  expect(more).toEqual([])
  const file = join(cache, 'qcow2', name)
  expect(statSync(file).mode & 0o777).toBe(0o600)
  const whole = readFileSync(file)
  const { ino } = statSync(file)
  expect(info().stdout).toBe(first.stdout)
  expect(statSync(file).ino).toBe(ino)
  for (const damage of [Buffer.alloc(0), whole.subarray(0, 1000), Buffer.alloc(whole.length)]) {
    writeFileSync(file, damage)
    expect(info()).toMatchObject({ stdout: first.stdout, stderr: '', status: 0 })
    expect(readFileSync(file).length).toBeGreaterThan(1000)
  }
  // Whatever it holds: others could have written it.
  chmodSync(file, 0o666)
  const writable = statSync(file).ino
  expect(info().stdout).toBe(first.stdout)
  expect(statSync(file)).toMatchObject({ mode: expect.toSatisfy((mode: number) => (mode & 0o777) === 0o600) })
  expect(statSync(file).ino).not.toBe(writable)
})

test.skipIf(process.getuid?.() !== 0)('another user’s home is left as it is, and nothing is said about it', () => {
  const shared = mkdtempSync(join(tmpdir(), 'qcow2-start-'))
  chmodSync(shared, 0o755)
  try {
    const home = join(shared, 'home')
    // Root with the HOME of a user, as by sudo: neither a folder without a cache nor one with it.
    for (const cache of ['.cache', '.cache/qcow2']) {
      mkdirSync(join(home, cache), { recursive: true })
      for (const made of [home, join(home, '.cache'), join(home, cache)]) chownSync(made, 1234, 1234)
      const run = piped('$NODE $CLI info disk.qcow2', { HOME: home, XDG_CACHE_HOME: undefined })
      expect(run).toMatchObject({ stderr: '', status: 0 })
      expect(readdirSync(join(home, '.cache'), { recursive: true })).toEqual(cache === '.cache' ? [] : ['qcow2'])
    }
    // A user with the HOME of root, into which nobody else looks. The program lies where users can read it.
    const closed = join(shared, 'closed')
    mkdirSync(join(closed, '.cache'), { recursive: true, mode: 0o700 })
    const program = join(shared, 'dist')
    mkdirSync(program)
    const needed = readdirSync(dirname(CLI)).filter(name => /^(?:cli|command-line|addon)\.js$|\.node$/.test(name))
    for (const name of needed) cpSync(join(dirname(CLI), name), join(program, name))
    cpSync(join(dirname(CLI), '..', 'package.json'), join(shared, 'package.json'))
    const line = 'setpriv --reuid 1234 --regid 1234 --clear-groups "$NODE" "$CLI" --version'
    const env = { HOME: closed, XDG_CACHE_HOME: undefined, CLI: join(program, 'cli.js') }
    expect(piped(line, env)).toMatchObject({ stderr: '', status: 0 })
  } finally {
    rmSync(shared, { recursive: true })
  }
})

test('without a folder to keep it in, everything works', () => {
  for (const env of [
    { XDG_CACHE_HOME: '/proc/none' },
    { XDG_CACHE_HOME: 'relative' },
    { NODE_DISABLE_COMPILE_CACHE: '1', XDG_CACHE_HOME: join(folder, 'off') },
  ]) {
    expect(piped('$NODE $CLI info disk.qcow2', env)).toMatchObject({ stderr: '', status: 0 })
  }
  expect(existsSync(join(folder, 'off'))).toBe(false)
  expect(existsSync(join(folder, 'relative'))).toBe(false)
})
