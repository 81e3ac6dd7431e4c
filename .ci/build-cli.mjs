// npm run build:cli: the command line as one file, dist/command-line.js, with the packages that it is made of, and their licences beside it. One small file is
// found, read and compiled several times as fast as what it is made of.
import { createHash } from 'node:crypto'
import { chmodSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { build } from 'esbuild'
import { fail, root } from './lib.mjs'
import { bundledPackages, noticesOf } from './linked.mjs'

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

/** The package that a file belongs to; nothing for this package's own. */
const packageOf = file => /^(?:.*\/)?node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(file)?.[1]
const inBundle = new Set(Object.keys(metafile.inputs).map(packageOf).filter(Boolean))
const known = bundledPackages().filter(({ name }) => inBundle.delete(name))
if (inBundle.size > 0) fail(`${[...inBundle].join(', ')}: in the bundle, and not among what linked.mjs lists`)
const head = 'command-line.js contains the packages below, each under its own licence.'
writeFileSync(join(root, 'dist', 'command-line.licenses.txt'), noticesOf(head, known))
