// The delay of the event loop while converts run: `event-loop.mjs SOURCE FOLDER TIMES`; its 99th percentile and the longest, as JSON.

import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { convert } from '../../dist/index.js'

const [source, folder, times] = process.argv.slice(2)
const RESOLUTION_MS = 1
const histogram = monitorEventLoopDelay({ resolution: RESOLUTION_MS })
histogram.enable()
const targets = Array.from({ length: Number(times) }, (_, i) => join(folder, `loop-${i}`))
const options = { from: 'raw', to: 'qcow2', durable: false, overwrite: true, onProgress: () => {} }
await Promise.all(targets.map(target => convert(source, target, options)))
histogram.disable()
// The timer itself takes its resolution.
process.stdout.write(JSON.stringify({ delay: histogram.percentile(99) / 1e6 - RESOLUTION_MS }))
