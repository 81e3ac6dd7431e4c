// npm run build:cli: the command line as one file, dist/command-line.js, with the packages that it is made of, and their licences beside it. One small file is
// found, read and compiled several times as fast as what it is made of.
import { createHash } from 'node:crypto'
import { chmodSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { build } from 'esbuild'
import { fail, root } from './lib.mjs'

const { metafile } = await build({
  absWorkingDir: root,
  entryPoints: ['src/cli.ts'],
  outfile: 'dist/command-line.js',
  bundle: true,
  platform: 'node',
  format: 'cjs',
  target: 'node20',
  // The manifest is read where it lies; the addon is no JavaScript; who has the SDK of S3, or queues, has them beside this package.
  external: ['qcow2/package.json', '*.node', '@aws-sdk/client-s3', 'bullmq', 'ioredis'],
  // Commander starts other programs as commands, which this one has none of: their module is not loaded.
  alias: { 'node:child_process': './.ci/no-child-process.cjs' },
  minify: true,
  metafile: true,
  allowOverwrite: true,
  logLevel: 'warning',
})

// What is started, beside it.
const bundle = readFileSync(join(root, 'dist', 'command-line.js'))
await build({
  absWorkingDir: root,
  entryPoints: ['src/cli/start.ts'],
  outfile: 'dist/cli.js',
  platform: 'node',
  format: 'cjs',
  target: 'node20',
  banner: { js: '#!/usr/bin/env node' },
  define: { BUNDLE: JSON.stringify(createHash('sha256').update(bundle).digest('hex').slice(0, 16)) },
  minify: true,
  allowOverwrite: true,
  logLevel: 'warning',
})
chmodSync(join(root, 'dist', 'cli.js'), 0o755)

/** The folder of the package that a file belongs to; nothing for this package's own. */
const packageOf = file => /^(?:.*\/)?node_modules\/(?:@[^/]+\/)?[^/]+/.exec(file)?.[0]
const packages = new Set(Object.keys(metafile.inputs).map(packageOf).filter(Boolean))
const notices = [...packages].sort().map(folder => {
  const { name, version, license } = JSON.parse(readFileSync(join(root, folder, 'package.json'), 'utf8'))
  const file = readdirSync(join(root, folder)).find(entry => /^licen[cs]e/i.test(entry))
  if (file === undefined) fail(`${folder} has no licence file`)
  return `${name} ${version} (${license})\n\n${readFileSync(join(root, folder, file), 'utf8').trim()}\n`
})
const head = 'command-line.js contains the packages below, each under its own licence.\n'
writeFileSync(join(root, 'dist', 'command-line.licenses.txt'), [head, ...notices].join(`\n${'-'.repeat(80)}\n\n`))
