/**
 * The addon: found and loaded. Looked for in this order: the file that `NAPI_RS_NATIVE_LIBRARY_PATH` names, the local build beside the
 * compiled library, the platform's own package (`qcow2-linux-x64-gnu` and so on), which npm installs as an optional dependency.
 *
 * A file of its own in the package, in the syntax of ES2020 and without imports of ours: what bundlers and tracers read here, they have to
 * understand. ncc knows no newer syntax, and finds no addon in a file that it cannot read.
 */

import { existsSync } from 'node:fs'
import { dirname, isAbsolute, join, resolve } from 'node:path'

/** The addon, or why there is none. */
export type Loaded = { readonly addon: unknown } | { readonly message: string; readonly cause?: unknown }

interface Packages {
  /** Loads whatever can be required from that place. */
  readonly load: (name: string) => unknown
  readonly addons: Readonly<Record<string, () => unknown>>
}

/**
 * The platform packages, seen from a file. Their names are written out for what traces imports (nft), which knows a `createRequire` by
 * the very words here. Bundlers leave them alone, as they must: an addon does not fit into a script.
 */
function packagesFrom(file: string): Packages {
  const module = require('node:module') as typeof import('node:module')
  const packaged = module.createRequire(file)
  return {
    load: name => packaged(name),
    addons: {
      'linux-x64-gnu': () => packaged('qcow2-linux-x64-gnu'),
      'linux-x64-musl': () => packaged('qcow2-linux-x64-musl'),
      'linux-arm64-gnu': () => packaged('qcow2-linux-arm64-gnu'),
      'linux-arm64-musl': () => packaged('qcow2-linux-arm64-musl'),
      'darwin-x64': () => packaged('qcow2-darwin-x64'),
      'darwin-arm64': () => packaged('qcow2-darwin-arm64'),
      'win32-x64-msvc': () => packaged('qcow2-win32-x64-msvc'),
      'win32-arm64-msvc': () => packaged('qcow2-win32-arm64-msvc'),
    },
  }
}

/**
 * The same as files of the folders beside this package: ncc takes those that are there into the bundle's folder, and puts their place there
 * for `__dirname`, which a module of the ES kind does not have.
 */
const filesBeside = (load: (file: string) => unknown): Packages['addons'] => ({
  'linux-x64-gnu': () => load(`${__dirname}/../../qcow2-linux-x64-gnu/qcow2.linux-x64-gnu.node`),
  'linux-x64-musl': () => load(`${__dirname}/../../qcow2-linux-x64-musl/qcow2.linux-x64-musl.node`),
  'linux-arm64-gnu': () => load(`${__dirname}/../../qcow2-linux-arm64-gnu/qcow2.linux-arm64-gnu.node`),
  'linux-arm64-musl': () => load(`${__dirname}/../../qcow2-linux-arm64-musl/qcow2.linux-arm64-musl.node`),
  'darwin-x64': () => load(`${__dirname}/../../qcow2-darwin-x64/qcow2.darwin-x64.node`),
  'darwin-arm64': () => load(`${__dirname}/../../qcow2-darwin-arm64/qcow2.darwin-arm64.node`),
  'win32-x64-msvc': () => load(`${__dirname}/../../qcow2-win32-x64-msvc/qcow2.win32-x64-msvc.node`),
  'win32-arm64-msvc': () => load(`${__dirname}/../../qcow2-win32-arm64-msvc/qcow2.win32-arm64-msvc.node`),
})

/**
 * The files from which the addon is looked for: this one; where a bundler took it into a script that does not know its own place, the
 * script that was started, then the working folder.
 */
function places(): readonly string[] {
  if (typeof __filename === 'string' && isAbsolute(__filename) && existsSync(__filename)) return [__filename]
  const started = process.argv[1]
  return [...(started === undefined ? [] : [resolve(started)]), resolve('here.js')]
}

/** Loads the addon. Never throws. */
export function loadAddon(): Loaded {
  const from = places().map(file => ({ folder: dirname(file), ...packagesFrom(file) }))
  const explicit = process.env['NAPI_RS_NATIVE_LIBRARY_PATH']
  if (explicit) {
    const loaded = attempt(() => from[0]?.load(explicit))
    return 'addon' in loaded ? loaded : failed(`${explicit} (NAPI_RS_NATIVE_LIBRARY_PATH)`, loaded.error)
  }
  const platform = `${process.platform}-${process.arch}`
  let broken: Loaded | undefined
  let wanted: readonly string[] = []
  for (const { folder, load, addons } of from) {
    // On Linux the one for the C library that is there loads, the other is not installed or fails.
    const suffixes = Object.keys(addons).filter(suffix => `${suffix}-`.startsWith(`${platform}-`))
    if (suffixes.length === 0) return noSuchPlatform(platform, Object.keys(addons))
    wanted = suffixes.map(suffix => `qcow2-${suffix}`)
    const beside = filesBeside(load)
    const local = suffixes.map(suffix => join(folder, `qcow2.${suffix}.node`))
    const ways: readonly (readonly [name: string, read: () => unknown])[] = [
      ...local.map(file => [file, () => load(file)] as const),
      ...suffixes.map(suffix => [`qcow2-${suffix}`, () => addons[suffix]?.()] as const),
      ...suffixes.map(suffix => [`qcow2.${suffix}.node`, () => beside[suffix]?.()] as const),
    ]
    for (const [name, read] of ways) {
      const loaded = attempt(read)
      if ('addon' in loaded) return loaded
      if (broken === undefined && !isMissing(loaded.error, name)) broken = failed(name, loaded.error)
    }
  }
  return broken ?? notInstalled(wanted.join(' or '))
}

function attempt(read: () => unknown): { readonly addon: unknown } | { readonly error: unknown } {
  try {
    return { addon: read() }
  } catch (error) {
    return { error }
  }
}

/** A module of the ES kind has no `__dirname`: then that way leads nowhere. */
const isMissing = (error: unknown, name: string): boolean =>
  error instanceof ReferenceError ||
  (error instanceof Error && 'code' in error && error.code === 'MODULE_NOT_FOUND' && error.message.includes(name))

function noSuchPlatform(platform: string, suffixes: readonly string[]): Loaded {
  const known = new Set(suffixes.map(suffix => suffix.replace(/-(gnu|musl|msvc)$/, '')))
  return { message: `qcow2 has no addon for ${platform}; it has one for ${[...known].join(', ')}` }
}

function failed(name: string, cause: unknown): Loaded {
  return {
    message: `the addon ${name} cannot be loaded: ${cause instanceof Error ? cause.message : String(cause)}`,
    cause,
  }
}

const notInstalled = (name: string): Loaded => ({
  message:
    `the package ${name} with the addon for this platform is not installed. npm installs it with qcow2 unless optional ` +
    'dependencies are left out (--omit=optional), or node_modules came from another platform: run npm install here. In a bundle, ' +
    'keep qcow2 external, or lay its .node file beside the script',
})
