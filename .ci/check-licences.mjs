// Every crate and npm package that ships must be under a licence that goes with MIT, and every crate must come from the
// registry. What `cargo deny` checks too, for machines without it: see deny.toml, whose list of licences this reads.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { root } from './lib.mjs'
import { bundledPackages, cargoMetadata } from './linked.mjs'

const deny = readFileSync(join(root, 'deny.toml'), 'utf8')
const allowed = new Set([.../allow = \[([^\]]*)\]/.exec(deny)[1].matchAll(/"([^"]+)"/g)].map(found => found[1]))

/** Whether an SPDX expression can be met with allowed licences alone. */
function isAllowed(expression) {
  const tokens = expression.replaceAll('/', ' OR ').match(/\(|\)|[^\s()]+/g) ?? []
  let at = 0
  const term = () => {
    if (tokens[at] === '(') {
      at++
      const inner = either()
      at++
      return inner
    }
    let name = tokens[at++]
    if (tokens[at] === 'WITH') {
      name = `${name} WITH ${tokens[at + 1]}`
      at += 2
    }
    return allowed.has(name)
  }
  const both = () => {
    let met = term()
    while (tokens[at] === 'AND') {
      at++
      met = term() && met
    }
    return met
  }
  const either = () => {
    let met = both()
    while (tokens[at] === 'OR') {
      at++
      met = both() || met
    }
    return met
  }
  return tokens.length > 0 && either() && at === tokens.length
}

const problems = []
const crates = cargoMetadata().packages
for (const { name, version, license, source } of crates) {
  if (!isAllowed(license ?? '')) problems.push(`crate ${name} ${version} is under ${license ?? 'no licence'}`)
  if (source && !source.startsWith('registry+')) problems.push(`crate ${name} ${version} comes from ${source}`)
}

const packages = bundledPackages()
for (const { name, version, license } of packages) {
  if (!isAllowed(license ?? '')) problems.push(`npm package ${name} ${version} is under ${license ?? 'no licence'}`)
}

for (const problem of problems) process.stderr.write(`licences: ${problem}\n`)
process.stdout.write(
  `licences: ${crates.length} crates, ${packages.length} npm packages, ${problems.length} problems\n`,
)
process.exitCode = problems.length === 0 ? 0 : 1
