// Calls of the API, one at a time, by tinybench: `micro.mjs FOLDER MILLISECONDS`; prints its table, and the medians as JSON.

import { open as openFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Bench } from 'tinybench'
import { create, inspect, open } from '../../dist/index.js'

const [folder, milliseconds] = process.argv.slice(2)
const BLOCK = 4096
const SIZE = 64 * 2 ** 20
const path = join(folder, 'micro.qcow2')
const image = await create(path, { size: SIZE, overwrite: true })
for (let position = 0; position < SIZE; position += 2 ** 20) await image.write(Buffer.alloc(2 ** 20, 1), { position })
const file = await openFile(path, 'r')
const buffer = Buffer.alloc(BLOCK)
let n = 0
const next = () => (n++ * 4097 * BLOCK) % SIZE

const bench = new Bench({ time: Number(milliseconds), warmupTime: Number(milliseconds) / 4 })
bench
  .add('Image.read, 4 KiB', () => image.read(buffer, { position: next() }))
  .add('Image.write, 4 KiB', () => image.write(buffer, { position: next() }))
  .add('Image.datasync, nothing to do', () => image.datasync())
  .add('FileHandle.read, 4 KiB', () => file.read(buffer, 0, BLOCK, next()))
  .add('open and close', async () => (await open(path, { format: 'qcow2', forceShare: true })).close())
  .add('Image.info', () => image.info())
  .add('inspect', () => inspect(path))
await bench.run()
await image.close()
await file.close()
process.stderr.write(`${JSON.stringify(bench.table(), undefined, 2)}\n`)
const failed = bench.tasks.find(({ result }) => result.state === 'errored')
if (failed) throw failed.result.error
// Its unit is a millisecond.
process.stdout.write(
  JSON.stringify(Object.fromEntries(bench.tasks.map(({ name, result }) => [name, result.latency.p50 * 1000]))),
)
