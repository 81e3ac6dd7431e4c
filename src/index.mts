// A thin ESM face of the CommonJS build: one copy of every class, so `instanceof` agrees across both.
export * from './index.js'
