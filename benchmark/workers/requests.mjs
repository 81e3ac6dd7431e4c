// Requests of 4 KiB from JavaScript for a while, and how many a second as JSON: the arguments of crates/engine/examples/requests.rs,
// `--by image|file` for `Image` or a `FileHandle` of Node, and `--block` for another size.

import { open as openFile } from 'node:fs/promises'
import { parseArgs } from 'node:util'
import { open } from '../../dist/index.js'

const text = { type: 'string' }
const flag = { type: 'boolean', default: false }
const { values } = parseArgs({
  options: {
    ...{ by: text, image: text, format: text, kind: text, cache: text, depth: text, seconds: text, size: text },
    ...{ step: text, count: text, block: { type: 'string', default: '4096' }, backing: text, luks: flag },
  },
})
const [depth, size, step, count] = [values.depth, values.size, values.step, values.count].map(Number)
const BLOCK = Number(values.block)
const writes = values.kind === 'write'

async function requester() {
  const flags = writes ? 'r+' : 'r'
  if (values.by === 'file') {
    const file = await openFile(values.image, flags)
    const request = writes
      ? (buffer, position) => file.write(buffer, 0, BLOCK, position)
      : (buffer, position) => file.read(buffer, 0, BLOCK, position)
    return { request, close: () => file.close() }
  }
  const secret = values.luks ? 'secret' : undefined
  const image = await open(values.image, {
    flags,
    format: values.format,
    cache: values.cache,
    references: 'allow',
    secret,
  })
  const request = writes
    ? (buffer, position) => image.write(buffer, { position })
    : (buffer, position) => image.read(buffer, { position })
  return { request, close: () => image.close() }
}

const { request, close } = await requester()
let next = 0
let done = 0
const lane = async (end, limit) => {
  const buffer = Buffer.alloc(BLOCK, 0x5a)
  while (next < limit && performance.now() < end) {
    const position = (next++ * step) % size
    await request(buffer, position)
    done++
  }
}
const run = (seconds, limit) => {
  const end = performance.now() + seconds * 1000
  return Promise.all(Array.from({ length: depth }, () => lane(end, limit)))
}
// The first thousands of calls are those of an interpreter: on an image that grows, they take part of its space.
await run(Number(values.seconds) / 4, Math.floor(count / 8))
done = 0
const begun = performance.now()
await run(Number(values.seconds), count)
const rate = (done * 1000) / (performance.now() - begun)
await close()
process.stdout.write(JSON.stringify({ rate, throughput: (rate * BLOCK) / 1e6 }))
