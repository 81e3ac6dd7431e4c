// A thin ESM face of the CommonJS build: see the package's own.
export * from './index.js'
