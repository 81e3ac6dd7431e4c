// Converts one disk many times at once, as an app does: `converts.mjs SOURCE FOLDER TIMES`.

import { join } from 'node:path'
import { convert } from '../../dist/index.js'

const [source, folder, times] = process.argv.slice(2)
const targets = Array.from({ length: Number(times) }, (_, i) => join(folder, String(i)))
// As qemu-img: nobody waits for the disk.
await Promise.all(targets.map(target => convert(source, target, { from: 'raw', to: 'qcow2', durable: false })))
