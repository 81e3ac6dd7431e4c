// Opens an image many times in one process, reads of each, and closes all: `open-images.mjs IMAGE COUNT`; microseconds for each as
// JSON.

import { open } from '../../dist/index.js'

const [path, text] = process.argv.slice(2)
const count = Number(text)
const begun = performance.now()
const images = await Promise.all(Array.from({ length: count }, () => open(path, { format: 'qcow2' })))
const buffer = Buffer.alloc(4096)
for (const image of images) await image.read(buffer, { position: 0 })
await Promise.all(images.map(image => image.close()))
process.stdout.write(JSON.stringify({ each: ((performance.now() - begun) * 1000) / count }))
