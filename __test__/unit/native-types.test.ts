import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { expect, it } from 'vitest'

const text = (path: string): string => readFileSync(fileURLToPath(new URL(path, import.meta.url)), 'utf8')

it('every object of the addon is held against its type', () => {
  const declarations = text('../../dist/binding.d.ts')
  const compared = text('../types/native.ts')
  const names = [...declarations.matchAll(/^export interface (\w+)/gm)].map(([, name]) => name)
  expect(names.length).toBeGreaterThan(30)
  // A parameter or a field is compared with what it belongs to.
  const used = (name: string | undefined): boolean => new RegExp(`[:<] ?${name}\\b`).test(declarations)
  expect(names.filter(name => !used(name) && !compared.includes(`[binding.${name},`))).toEqual([])
})
