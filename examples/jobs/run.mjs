// Three workers on one machine, one of which is killed: `node examples/jobs/run.mjs`.

import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as delay } from 'node:timers/promises'
import { create, open } from 'qcow2'
import { openQueue } from 'qcow2/jobs'

const manifest = createRequire(import.meta.url).resolve('qcow2/package.json')
const command = join(manifest, '..', 'dist', 'cli.js')
const folder = mkdtempSync(join(tmpdir(), 'qcow2-jobs-'))
const images = join(folder, 'images')
const socket = join(folder, 'redis.sock')
const address = `unix://${socket}`
mkdirSync(images)

const redis = spawn('redis-server', ['--port', '0', '--unixsocket', socket, '--dir', folder, '--appendonly', 'yes'], {
  stdio: 'ignore',
})
const ended = once(redis, 'exit')
while (!existsSync(socket)) await delay(20)

/** A worker, whose lines are printed with its name. */
async function startWorker(name) {
  const child = spawn(process.execPath, [command, 'worker', '--root', images, '--lock', '1', '--rate', '16M'], {
    env: { ...process.env, QCOW2_REDIS: address },
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const lines = createInterface({ input: child.stdout })
  lines.on('line', line => console.log(`${name}: ${line}`))
  await once(lines, 'line')
  return { child, gone: once(child, 'exit') }
}

try {
  const source = await create(join(images, 'source.qcow2'), { size: 2 ** 24 })
  for (let at = 0; at < 2 ** 22; at += 2 ** 20) await source.write(Buffer.alloc(2 ** 20, 7), { position: at })
  await source.close()

  const workers = await Promise.all(['anna', 'bert', 'carl'].map(startWorker))
  const queue = await openQueue({ connection: address })
  const jobs = []
  for (let i = 0; i < 12; i++) {
    const target = `copy-${i}.qcow2`
    const data = { source: 'source.qcow2', target, to: 'qcow2', compress: true }
    jobs.push(await queue.add('convert', data, { id: `copy-${i}` }))
  }
  const all = Promise.all(jobs.map(job => job.finished()))

  await jobs[1].finished()
  console.log('anna is killed')
  workers[0].child.kill('SIGKILL')
  console.log('bert is asked to end, and finishes what it does')
  workers[1].child.kill('SIGTERM')
  await all
  console.log(await queue.counts())
  console.log(await (await queue.add('check', { source: 'copy-11.qcow2' })).finished())
  await queue.close()
  workers[2].child.kill('SIGTERM')
  await Promise.all(workers.map(({ gone }) => gone))

  const made = readdirSync(images)
  console.log(`${made.length} files: ${made.sort().join(' ')}`)
  const copy = await open(join(images, 'copy-11.qcow2'))
  console.log(`${copy.virtualSize} bytes of disk in each`)
  await copy.close()
} finally {
  redis.kill()
  await ended
  rmSync(folder, { recursive: true })
}
