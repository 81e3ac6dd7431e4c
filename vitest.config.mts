import { availableParallelism } from 'node:os'
import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

const dist = (name: string) => fileURLToPath(new URL(`./dist/${name}`, import.meta.url))

// Tests run against the built package, the files that users get: `npm test` builds them first.
export default defineConfig({
  resolve: {
    alias: [
      { find: /^qcow2$/, replacement: dist('index.js') },
      { find: /^qcow2\/jobs$/, replacement: dist('jobs/index.js') },
    ],
  },
  test: {
    include: ['__test__/**/*.test.ts'],
    exclude: ['__test__/package/**'],
    server: { deps: { external: [/\/dist\//] } },
    testTimeout: 120_000,
    hookTimeout: 60_000,
    pool: 'forks',
    // Vitest leaves one core free, which is half of a small machine; most tests wait for a tool or a disk half of their time.
    maxWorkers: Math.max(2, availableParallelism() - 1),
  },
})
