/** The utility process: a Node process of its own, so that nothing that an image does can end the app. */

import type { ToJobs } from './bridge.js'
import { serveJobs } from './jobs.js'

const port = process.parentPort
const take = serveJobs(message => port.postMessage(message))
port.on('message', ({ data }) => take(data as ToJobs))
