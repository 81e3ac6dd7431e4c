// What is in the files of a release beside our own code: the crates that are linked into an addon, and the npm packages in the bundle of the command
// line; their licences as texts, and as a bill of materials (CycloneDX).
import { spawnSync } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { Enums, Models, Serialize, Spec } from '@cyclonedx/cyclonedx-library'
import { fail, manifest, root } from './lib.mjs'

/** The npm packages that build-cli.mjs puts into the command line's one file, without what they depend on. */
export const BUNDLED = ['cli-progress', 'commander']

/** The folder of an installed npm package, and its manifest. */
function installed(name) {
  const folder = join(root, 'node_modules', name)
  return { folder, ...JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8')) }
}

/** The bundled packages with all that they depend on, each as `{ name, version, license, folder }`. */
export function bundledPackages() {
  const found = new Map()
  const visit = name => {
    if (found.has(name)) return
    const { folder, version, license, dependencies } = installed(name)
    found.set(name, { name, version, license, folder })
    for (const dependency of Object.keys(dependencies ?? {})) visit(dependency)
  }
  BUNDLED.forEach(visit)
  return [...found.values()].sort((a, b) => (a.name < b.name ? -1 : 1))
}

/** What cargo knows of the dependencies, on one target or on all. */
export function cargoMetadata(triple) {
  const filter = triple === undefined ? [] : ['--filter-platform', triple]
  const { status, stdout, stderr } = spawnSync('cargo', ['metadata', '--format-version=1', '--locked', ...filter], {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 1 << 28,
  })
  if (status !== 0) fail(`cargo metadata: ${stderr}`)
  return JSON.parse(stdout)
}

const linkedTo = new Map()

/** The crates of others that are linked into the addon of a target: neither what builds it, nor what expands its macros. Asked of cargo once. */
function linkedCrates(triple) {
  if (!linkedTo.has(triple)) linkedTo.set(triple, askForLinked(triple))
  return linkedTo.get(triple)
}

function askForLinked(triple) {
  const { packages, resolve } = cargoMetadata(triple)
  const byId = new Map(packages.map(crate => [crate.id, crate]))
  const nodes = new Map(resolve.nodes.map(node => [node.id, node]))
  const linked = new Set()
  const visit = id => {
    const crate = byId.get(id)
    if (linked.has(crate) || crate.targets.some(({ kind }) => kind.includes('proc-macro'))) return
    linked.add(crate)
    for (const { pkg, dep_kinds: kinds } of nodes.get(id).deps) if (kinds.some(({ kind }) => kind === null)) visit(pkg)
  }
  visit(packages.find(({ name }) => name === 'qcow2-node').id)
  return [...linked]
    .filter(({ source }) => source !== null)
    .map(({ name, version, license, authors, manifest_path }) => ({
      name,
      version,
      license,
      authors,
      folder: dirname(manifest_path),
    }))
    .sort((a, b) => (a.name < b.name ? -1 : 1))
}

/** A licence that is offered beside others: its text is enough, and the shortest. */
const PREFERRED = /mit/i
const NOTICE = /^(licen[cs]e|copying|notice)/i

/** The texts of the licence files of a package, those of bundled sources in its folders among them. */
function textsOf({ name, license, folder }) {
  const below = readdirSync(folder, { withFileTypes: true }).filter(entry => entry.isDirectory())
  const files = [folder, ...below.map(entry => join(folder, entry.name))].flatMap(at =>
    readdirSync(at, { withFileTypes: true })
      .filter(entry => entry.isFile() && NOTICE.test(entry.name))
      .map(entry => join(at, entry.name)),
  )
  const free = / OR |\//.test(license) && files.find(file => PREFERRED.test(file.slice(folder.length)))
  const taken = files.filter(file => !free || file === free || /third-party/i.test(file))
  if (taken.length === 0 && license !== 'MIT') fail(`${name} is under ${license} and has no licence file`)
  return taken.map(file => readFileSync(file, 'utf8').trim())
}

/** The words of MIT, for who gives the licence by name alone. */
function mitOf(holders) {
  const [title, , , ...words] = readFileSync(join(root, 'LICENSE'), 'utf8').trim().split('\n')
  return [title, '', `Copyright (c) ${holders}`, ...words].join('\n')
}

/** One text with the licences of `packages`, each text once, below those that it is for. */
export function noticesOf(head, packages) {
  const byText = new Map()
  for (const each of packages) {
    const found = textsOf(each)
    const holders = each.authors?.join(', ') || `the authors of ${each.name}`
    for (const text of found.length > 0 ? found : [mitOf(holders)]) {
      byText.set(text, [...(byText.get(text) ?? []), `${each.name} ${each.version} (${each.license})`])
    }
  }
  const parts = [...byText].map(([text, names]) => `${names.join('\n')}\n\n${text}\n`)
  return [`${head}\n`, ...parts].join(`\n${'-'.repeat(80)}\n\n`)
}

/** The notices of an addon; Rust's standard library is in each. */
export function addonNotices(triple) {
  const head = 'The addon contains the packages below, each under its own licence.'
  const std = `Rust's standard library (MIT OR Apache-2.0)\n\n${mitOf('The Rust Project contributors')}\n`
  return [noticesOf(head, linkedCrates(triple)), std].join(`\n${'-'.repeat(80)}\n\n`)
}

/** The bill of materials of a release for some targets, as CycloneDX in JSON. Nothing in it depends on when or where it is made. */
export function billOfMaterials(triples) {
  const component = (type, { name, version, license }) => {
    const made = new Models.Component(Enums.ComponentType.Library, name, {
      version,
      purl: `pkg:${type}/${name}@${version}`,
    })
    made.bomRef.value = `${type}:${name}@${version}`
    made.licenses.add(new Models.LicenseExpression(license.replaceAll('/', ' OR ')))
    return made
  }
  const { name, version, license } = manifest
  const bom = new Models.Bom()
  bom.metadata.component = component('npm', { name, version, license })
  const crates = new Map(triples.flatMap(linkedCrates).map(crate => [`${crate.name}@${crate.version}`, crate]))
  const parts = [
    ...bundledPackages().map(each => component('npm', each)),
    ...[...crates.values()].map(each => component('cargo', each)),
  ]
  for (const part of parts) {
    bom.components.add(part)
    bom.metadata.component.dependencies.add(part.bomRef)
  }
  const serializer = new Serialize.JsonSerializer(new Serialize.JSON.Normalize.Factory(Spec.Spec1dot6))
  return `${serializer.serialize(bom, { sortLists: true, space: 2 })}\n`
}
