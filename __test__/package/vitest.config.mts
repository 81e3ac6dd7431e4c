import { defineConfig } from 'vitest/config'

// Apart from the other tests: packs, installs into empty folders, and runs other versions of Node.
export default defineConfig({
  test: { include: ['__test__/package/*.test.ts'], testTimeout: 300_000, hookTimeout: 300_000, fileParallelism: false },
})
