import { spawnSync } from 'node:child_process'
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { homedir, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { nodeFileTrace } from '@vercel/nft'
import { buildSync, transformSync } from 'esbuild'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'

const PLATFORM = 'linux-x64-gnu'
const ROOT = resolve('.')
const MIB = 2 ** 20
type Entry = Record<'import' | 'require', Record<'types' | 'default', string>>
const manifest: { version: string; exports: Record<string, Entry | string> } = JSON.parse(
  readFileSync('package.json', 'utf8'),
)
const { version } = manifest

let work: string
let user: string

function run(program: string, args: readonly string[], cwd: string, env: NodeJS.ProcessEnv = {}) {
  const { status, stdout, stderr, error } = spawnSync(program, args, {
    cwd,
    encoding: 'utf8',
    env: { ...process.env, ...env },
  })
  return { status: error ? error.message : status, stdout, stderr }
}

function must(program: string, args: readonly string[], cwd: string): string {
  const { status, stdout, stderr } = run(program, args, cwd)
  expect(status, `${program} ${args.join(' ')}\n${stdout}${stderr}`).toBe(0)
  return stdout
}

function filesIn(tarball: string): string[] {
  const listed = must('tar', ['-tzf', tarball], work).trim().split('\n')
  return listed.map(name => name.replace(/^package\//, '')).sort()
}

beforeAll(() => {
  work = mkdtempSync(join(tmpdir(), 'qcow2-package-'))
  must(process.execPath, ['.ci/pack.mjs', 'dist', join(work, 'release'), PLATFORM], ROOT)
  user = join(work, 'user')
  mkdirSync(user)
  writeFileSync(join(user, 'package.json'), '{ "private": true }')
  const release = join(work, 'release')
  const own = [join(release, `qcow2-${version}.tgz`), join(release, `qcow2-${PLATFORM}-${version}.tgz`)]
  must('npm', ['install', '--offline', '--no-audit', '--no-fund', '--ignore-scripts', ...own], user)
  cpSync(join(ROOT, '__test__', 'package', 'consumer'), user, { recursive: true })
})

afterAll(() => rmSync(work, { recursive: true, force: true }))

describe('the packed package', () => {
  test('holds the built library, its types, and nothing else', () => {
    // The modules of the library are one file, and so are those of the command line.
    const types = readdirSync('src', { recursive: true, encoding: 'utf8' })
      .filter(name => /^(?!cli[\\/.]).*\.m?ts$/.test(name))
      .map(name => `dist/${name.replace(/\.(m?)ts$/, '.d.$1ts')}`)
    const entries = Object.values(manifest.exports).flatMap(entry =>
      typeof entry === 'string'
        ? []
        : [entry.import.default, entry.require.default].map(name => name.replace('./', '')),
    )
    const built = [...entries, 'dist/library.js', 'dist/addon.js', 'dist/cli.js', ...types]
    const documents = ['CHANGELOG.md', 'LICENSE', 'README.md', 'package.json']
    const commandLine = ['dist/command-line.js', 'dist/command-line.licenses.txt', 'dist/man/qcow2.1']
    const expected = [...documents, ...commandLine, ...built].sort()
    expect(filesIn(join(work, 'release', `qcow2-${version}.tgz`))).toEqual(expected)
  })

  test('is as small as it was, and starts as quickly: by what it has and loads, not by the clock', () => {
    const sizeOf = (name: string): number =>
      readdirSync(join(user, 'node_modules', name), { recursive: true, withFileTypes: true })
        .filter(entry => entry.isFile())
        .reduce((sum, { parentPath, name }) => sum + statSync(join(parentPath, name)).size, 0)
    expect(sizeOf('qcow2')).toBeLessThan(1.5 * MIB)
    const addon = sizeOf(`qcow2-${PLATFORM}`)
    if (addon > 20 * MIB) process.stderr.write('SKIPPED the size of the addon: it is a debug build\n')
    else expect(addon).toBeLessThan(7 * MIB)
    const script = `const before = new Set(process.moduleLoadList)
      require('qcow2')
      const own = Object.keys(require.cache).filter(name => name.includes('qcow2'))
      const builtin = process.moduleLoadList.filter(name => !before.has(name) && /^NativeModule [a-z_]+$/.test(name))
      console.log(JSON.stringify({ own: own.length, builtin }))`
    const loaded = JSON.parse(must(process.execPath, ['-e', script], user)) as { own: number; builtin: string[] }
    // The entry, the library, what finds the addon, and the addon.
    expect(loaded.own).toBe(4)
    for (const name of ['stream', 'net', 'tls', 'crypto', 'child_process', 'http', 'worker_threads']) {
      expect(loaded.builtin).not.toContain(`NativeModule ${name}`)
    }
  })

  test('leaves the addon to the platform package, with the licences of what is linked into it', () => {
    const expected = ['LICENSE', 'README.md', 'THIRD-PARTY-LICENSES.txt', 'package.json', `qcow2.${PLATFORM}.node`]
    expect(filesIn(join(work, 'release', `qcow2-${PLATFORM}-${version}.tgz`))).toEqual(expected)
    const notices = readFileSync(join(user, 'node_modules', `qcow2-${PLATFORM}`, 'THIRD-PARTY-LICENSES.txt'), 'utf8')
    for (const name of ['napi ', 'zstd-sys ', 'libdeflate-sys ', 'aes ', "Rust's standard library"]) {
      expect(notices).toContain(`\n${name}`)
    }
    expect(notices).not.toContain('qcow2-engine')
  })

  test('comes with a bill of materials: every crate of the addon, every package of the command line', () => {
    const bom = JSON.parse(readFileSync(join(work, 'release', 'qcow2.cdx.json'), 'utf8'))
    expect(bom).toMatchObject({ bomFormat: 'CycloneDX', metadata: { component: { purl: `pkg:npm/qcow2@${version}` } } })
    const purls = (bom.components as { purl: string }[]).map(({ purl }) => purl)
    for (const purl of ['pkg:cargo/napi@', 'pkg:cargo/zstd-sys@', 'pkg:npm/commander@']) {
      expect(purls).toContainEqual(expect.stringMatching(`^${purl}`))
    }
    // What only builds or tests it is no part of it.
    for (const name of ['cargo/proptest', 'cargo/napi-derive@', 'npm/vitest'])
      expect(purls.join(' ')).not.toContain(name)
  })

  test('shows errors by the names of their classes', () => {
    const script = `require('qcow2').open('nothing').catch(error => console.log(require('node:util').inspect(error)))`
    expect(must(process.execPath, ['-e', script], user)).toMatch(/^Qcow2Error: /)
  })

  test('has a manifest without scripts and development dependencies', () => {
    const manifest: Record<string, unknown> = JSON.parse(
      readFileSync(join(user, 'node_modules/qcow2/package.json'), 'utf8'),
    )
    expect(manifest).not.toHaveProperty('scripts')
    expect(manifest).not.toHaveProperty('devDependencies')
    expect(manifest).not.toHaveProperty('dependencies')
    expect(Object.keys(manifest['optionalDependencies'] as object)).toHaveLength(8)
  })

  test('works by require and by import, with one identity of every class', () => {
    const { names } = JSON.parse(must(process.execPath, ['smoke.cjs'], user)) as { names: number }
    expect(names).toBeGreaterThan(5)
  })

  test('has jobs at an entry of their own, which says what to install where that is missing', () => {
    const { code, message, same } = JSON.parse(must(process.execPath, ['jobs.cjs'], user)) as Record<string, unknown>
    expect({ code, same }).toEqual({ code: 'ERR_QCOW2_PEER_MISSING', same: true })
    expect(message).toContain('npm install bullmq ioredis')
    const bin = join(user, 'node_modules/.bin/qcow2')
    const { status, stderr } = run(bin, ['worker', '--redis', 'redis://127.0.0.1:1', '--root', '.'], user)
    expect(status).toBe(1)
    expect(stderr).toContain('npm install bullmq ioredis')
    // Where it is installed, it is what is loaded.
    const found = join(user, 'node_modules')
    for (const name of ['bullmq', 'ioredis']) symlinkSync(join(ROOT, 'node_modules', name), join(found, name))
    const there = JSON.parse(must(process.execPath, ['jobs.cjs'], user)) as Record<string, unknown>
    for (const name of ['bullmq', 'ioredis']) unlinkSync(join(found, name))
    expect(there).toMatchObject({ code: 'ECONNREFUSED' })
  })

  test('loads the library that NAPI_RS_NATIVE_LIBRARY_PATH names', () => {
    const moved = join(work, 'elsewhere.node')
    const addon = join(user, 'node_modules', `qcow2-${PLATFORM}`, `qcow2.${PLATFORM}.node`)
    cpSync(addon, moved)
    const script = `require('qcow2'); console.log(Object.keys(require.cache).filter(name => name.endsWith('.node')).join())`
    const { stdout, stderr } = run(process.execPath, ['-e', script], user, { NAPI_RS_NATIVE_LIBRARY_PATH: moved })
    expect(stdout.trim(), stderr).toBe(moved)
  })

  test('names the package of every platform where bundlers and tracers look', () => {
    const { optionalDependencies } = JSON.parse(
      readFileSync(join(user, 'node_modules/qcow2/package.json'), 'utf8'),
    ) as {
      optionalDependencies: Record<string, string>
    }
    const loader = readFileSync(join(user, 'node_modules/qcow2/dist/addon.js'), 'utf8')
    for (const name of Object.keys(optionalDependencies)) {
      expect(loader).toContain(`packaged('${name}')`)
      expect(loader).toContain(`/../../${name}/${name.replace('-', '.')}.node\``)
    }
    // ncc's parser sees nothing in a file whose syntax it does not know.
    expect(transformSync(loader, { target: 'es2020' }).code).toBe(transformSync(loader, { target: 'esnext' }).code)
  })

  test('works in a bundle, beside node_modules and beside the addon alone', () => {
    writeFileSync(
      join(user, 'app.js'),
      `require('qcow2').inspect(Buffer.alloc(512)).then(found => console.log(found.safe))`,
    )
    const outfile = join(user, 'bundled', 'app.js')
    buildSync({ entryPoints: [join(user, 'app.js')], outfile, bundle: true, platform: 'node' })
    expect(must(process.execPath, [outfile], user)).toBe('false\n')
    const alone = join(work, 'alone')
    cpSync(join(user, 'bundled'), alone, { recursive: true })
    const { status, stderr } = run(process.execPath, ['app.js'], alone)
    expect(status).toBe(1)
    expect(stderr).toMatch(/ERR_QCOW2_ADDON_MISSING|lay its \.node file beside the script/)
    const addon = `qcow2.${PLATFORM}.node`
    cpSync(join(user, 'node_modules', `qcow2-${PLATFORM}`, addon), join(alone, addon))
    expect(must(process.execPath, ['app.js'], alone)).toBe('false\n')
  })

  test('is traced with its addon', async () => {
    const { fileList } = await nodeFileTrace([join(user, 'app.js')], { base: user })
    expect([...fileList]).toContain(`node_modules/qcow2-${PLATFORM}/qcow2.${PLATFORM}.node`)
  })

  test('says one clear line without the addon', () => {
    const moved = join(work, 'without')
    cpSync(join(user, 'node_modules', 'qcow2'), join(moved, 'node_modules', 'qcow2'), { recursive: true })
    const { status, stdout, stderr } = run(process.execPath, ['node_modules/qcow2/dist/cli.js', 'info', 'disk'], moved)
    expect({ status, stdout }).toEqual({ status: 1, stdout: '' })
    expect(stderr).toMatch(/^qcow2: the package qcow2-.* is not installed.*\n$/)
  })

  test('installs the command line', () => {
    const bin = join(user, 'node_modules/.bin/qcow2')
    expect(must(bin, ['--version'], user)).toContain(version)
    must(bin, ['create', '-q', '-f', 'qcow2', 'new.qcow2', '10M'], user)
    const info = JSON.parse(must(bin, ['info', '--output=json', 'new.qcow2'], user)) as Record<string, unknown>
    expect(info).toMatchObject({ format: 'qcow2', 'virtual-size': 10 * 1024 * 1024, 'cluster-size': 65536 })
    const { status, stderr } = run(bin, ['info', 'no-such-file'], user)
    expect(status).toBe(1)
    expect(stderr).toContain('no-such-file')
  })

  test.each([
    { module: 'Node16', resolution: 'Node16', skipLibCheck: false },
    { module: 'NodeNext', resolution: 'NodeNext', skipLibCheck: true },
    { module: 'ESNext', resolution: 'Bundler', skipLibCheck: false },
  ])('has types for $resolution, skipLibCheck: $skipLibCheck', ({ module, resolution, skipLibCheck }) => {
    cpSync(join(user, 'consumer.ts'), join(user, 'consumer.mts'))
    const tsc = join(ROOT, 'node_modules/typescript/bin/tsc')
    const types = ['--types', 'node', '--typeRoots', join(ROOT, 'node_modules/@types')]
    const strict = ['--strict', '--exactOptionalPropertyTypes', '--noUncheckedIndexedAccess']
    const target = ['--target', 'ES2022', '--lib', 'ES2022,ESNext.Disposable', '--noEmit']
    const how = ['--module', module, '--moduleResolution', resolution, '--skipLibCheck', String(skipLibCheck)]
    // As CommonJS and as an ES module.
    must(process.execPath, [tsc, ...how, ...target, ...strict, ...types, 'consumer.ts', 'consumer.mts'], user)
  })

  test('has one manifest for every resolution and registry', () => {
    const root = join(user, 'node_modules', 'qcow2')
    const { exports, bin, files } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
      exports: { '.': Record<'import' | 'require', Record<'types' | 'default', string>> }
      bin: Record<string, string>
      files: string[]
    }
    const named = [...Object.values(exports['.']).flatMap(kind => Object.values(kind)), ...Object.values(bin)]
    for (const name of named) expect(existsSync(join(root, name)), name).toBe(true)
    expect(Object.keys(exports['.'].import)).toEqual(['types', 'default'])
    expect(files).not.toContain('src')
  })
})

describe('other versions of Node', () => {
  const cache = process.env['QCOW2_CACHE'] ?? join(homedir(), '.cache', 'qcow2-ci')

  /** The executable of a Node release, from the registry's package of it; undefined where that cannot be had. */
  function nodeBinary(release: string): string | undefined {
    const name = `node-${process.platform}-${process.arch}`
    const prefix = join(cache, `node-${release}`)
    const binary = join(prefix, 'node_modules', name, 'bin', 'node')
    if (!existsSync(binary)) {
      mkdirSync(prefix, { recursive: true })
      const args = ['install', '--no-save', '--no-audit', '--no-fund', '--prefix', prefix, `${name}@${release}`]
      run('npm', args, prefix)
    }
    return existsSync(binary) ? binary : undefined
  }

  test.each(['20.17.0', '22', '24', '26'])('works on Node %s', release => {
    const binary = nodeBinary(release)
    if (!binary) {
      process.stderr.write(`SKIPPED Node ${release}: its package cannot be installed here\n`)
      return
    }
    const { node } = JSON.parse(must(binary, ['smoke.cjs'], user)) as { node: string }
    expect(node.split('.')[0]).toBe(release.split('.')[0])
  })
})
