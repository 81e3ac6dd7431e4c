import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

const dist = (name: string) => fileURLToPath(new URL(`./dist/${name}`, import.meta.url))

// Tests run against the built package, the files that users get: `npm test` builds them first.
export default defineConfig({
  resolve: { alias: [{ find: /^qcow2$/, replacement: dist('index.js') }] },
  test: {
    include: ['__test__/**/*.test.ts'],
    exclude: ['__test__/package/**'],
    server: { deps: { external: [/\/dist\//] } },
    testTimeout: 60_000,
    hookTimeout: 60_000,
    // The tests share two cores with the addon's own workers, in CI at least.
    pool: 'forks',
  },
})
