import { createRequire } from 'node:module'
import { expect, test } from 'vitest'

const require = createRequire(import.meta.url)

test('import and require give the same objects', async () => {
  const common: Record<string, unknown> = require('qcow2')
  // The exact specifier that users write; resolved by Node, not by the test runner's alias.
  const module: Record<string, unknown> = await import(/* @vite-ignore */ require.resolve('../dist/index.mjs'))
  const names = Object.keys(common)
  expect(names).toContain('version')
  expect(Object.keys(module).filter(name => name !== '__esModule' && name !== 'default')).toEqual(names.toSorted())
  for (const name of names) expect(module[name]).toBe(common[name])
})

test('the version is the package manifest’s', () => {
  const manifest: { version: string } = require('../package.json')
  const { version }: { version: string } = require('qcow2')
  expect(version).toBe(manifest.version)
})
