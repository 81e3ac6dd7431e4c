// node .ci/pack.mjs ARTIFACTS FOLDER [PLATFORM...]: builds the packages of a release from dist/ and the .node files in
// ARTIFACTS, and packs each into FOLDER/*.tgz. Refuses an incomplete set, unless only some platforms are asked for.
import { spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { bundleLibrary } from './bundle-library.mjs'
import { fail, manifest, root } from './lib.mjs'
import { addonNotices, billOfMaterials } from './linked.mjs'
import { binaryName, MATERIALS, NOTICES, packageName, platforms, problemsOf, tripleOf } from './release.mjs'

const [artifacts, target, ...only] = process.argv.slice(2)
if (!artifacts || !target) fail('usage: node .ci/pack.mjs ARTIFACTS FOLDER [PLATFORM...]')
const wanted = only.length > 0 ? only : platforms
for (const name of wanted) if (!platforms.includes(name)) fail(`${name} is not among ${platforms.join(', ')}`)
const folder = resolve(target)
if (existsSync(folder) && readdirSync(folder).length > 0) fail(`${folder} is not empty`)

const rootFolder = join(folder, 'root')
mkdirSync(rootFolder, { recursive: true })
const write = published => writeFileSync(join(rootFolder, 'package.json'), `${JSON.stringify(published, null, 2)}\n`)

// napi writes the platform packages beside a manifest that names its targets.
write(manifest)
const napi = join(root, 'node_modules', '@napi-rs', 'cli', 'dist', 'cli.js')
const made = spawnSync(process.execPath, [napi, 'create-npm-dirs', '--cwd', rootFolder], { encoding: 'utf8' })
if (made.status !== 0) fail(`napi create-npm-dirs: ${made.stdout}${made.stderr}`)
cpSync(join(rootFolder, 'npm'), join(folder, 'npm'), { recursive: true })
rmSync(join(rootFolder, 'npm'), { recursive: true })

for (const platform of platforms) {
  const at = join(folder, 'npm', platform)
  if (!wanted.includes(platform)) {
    rmSync(at, { recursive: true })
    continue
  }
  const binary = join(artifacts, binaryName(platform))
  if (existsSync(binary)) cpSync(binary, join(at, binaryName(platform)))
  cpSync(join(root, 'LICENSE'), join(at, 'LICENSE'))
  writeFileSync(join(at, NOTICES), addonNotices(tripleOf(platform)))
  const manifestAt = join(at, 'package.json')
  const own = JSON.parse(readFileSync(manifestAt, 'utf8'))
  writeFileSync(manifestAt, `${JSON.stringify({ ...own, files: [...own.files, NOTICES] }, null, 2)}\n`)
}
writeFileSync(join(folder, MATERIALS), billOfMaterials(wanted.map(tripleOf)))

// The published manifest: what a user's npm needs, without what only this repository does.
const { devDependencies, scripts, napi: config, allowScripts, overrides, ...published } = manifest
const optionalDependencies = Object.fromEntries(platforms.map(name => [packageName(name), manifest.version]))
write({ ...published, optionalDependencies })
for (const file of ['README.md', 'LICENSE', 'CHANGELOG.md', 'dist']) {
  const filter = path => !/\.node$|\.stamp\.json$|binding\.d\.ts$/.test(path)
  if (existsSync(join(root, file))) cpSync(join(root, file), join(rootFolder, file), { recursive: true, filter })
}

await bundleLibrary(join(rootFolder, 'dist'))

const problems = problemsOf(folder, wanted)
for (const problem of problems) process.stderr.write(`release: ${problem}\n`)
if (problems.length > 0) fail('nothing was packed: the set is not complete')

for (const at of [rootFolder, ...wanted.map(name => join(folder, 'npm', name))]) {
  const packed = spawnSync('npm', ['pack', '--ignore-scripts', '--loglevel=error', '--pack-destination', folder], {
    cwd: at,
    encoding: 'utf8',
    shell: process.platform === 'win32',
  })
  if (packed.status !== 0) fail(`npm pack in ${at}: ${packed.stderr}`)
  process.stdout.write(packed.stdout)
}
