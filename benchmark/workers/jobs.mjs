// Jobs of a queue by several worker processes: `jobs.mjs SOURCE FOLDER TIMES WORKERS [compress]`. Redis listens on a socket in the folder.
// Prints the jobs a second, from the first one that is put in to the last one that is done.

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { openQueue } from '../../dist/jobs/index.js'

const CLI = fileURLToPath(new URL('../../dist/cli.js', import.meta.url))
const [source, folder, times, workers, compress] = process.argv.slice(2)
const socket = join(folder, 'socket')
const children = []

/** Starts a program that is ended with this one. */
function start(...argv) {
  const child = spawn(argv[0], argv.slice(1), { stdio: ['ignore', 'pipe', 'inherit'] })
  children.push(child)
  return child
}

try {
  start(
    'redis-server',
    '--port',
    '0',
    '--unixsocket',
    socket,
    '--dir',
    folder,
    '--save',
    '',
    '--appendonly',
    'no',
  ).stdout.resume()
  while (!existsSync(socket)) await delay(10)
  const place = ['--redis', `unix://${socket}`, '--root', dirname(source), '--root', folder]
  for (let i = 0; i < Number(workers); i++) {
    const worker = start(process.execPath, CLI, 'worker', ...place, '--threads', '1')
    await once(worker.stdout, 'data')
    worker.stdout.resume()
  }
  const queue = await openQueue({ connection: `unix://${socket}` })
  const begin = performance.now()
  const targets = Array.from({ length: Number(times) }, (_, i) => join(folder, `${i}.qcow2`))
  const how = { source, from: 'raw', to: 'qcow2', compress: compress !== undefined }
  const jobs = await Promise.all(targets.map(target => queue.add('convert', { ...how, target })))
  await Promise.all(jobs.map(job => job.finished()))
  console.log(JSON.stringify({ rate: Number(times) / ((performance.now() - begin) / 1000) }))
  await queue.close()
} finally {
  for (const child of children.reverse()) {
    const gone = once(child, 'exit')
    child.kill('SIGTERM')
    await gone
  }
}
