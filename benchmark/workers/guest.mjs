// One installation in a guest: guest.mjs FOLDER FORMAT KERNEL INITRAMFS SOURCE. Makes an empty disk, serves it over NBD, starts a guest without
// hardware acceleration (TCG) that installs onto it, and prints how long the installation took, and how big the image is.

import { spawn } from 'node:child_process'
import { rmSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { check, create, open, serveNbd } from '../../dist/index.mjs'
import { BEGIN, END } from '../lib/guest.mjs'

const [folder, format, kernel, initramfs, source] = process.argv.slice(2)
const path = join(folder, `guest.${format}`)
const socket = join(folder, 'guest.sock')
rmSync(path, { force: true })
await (await create(path, { format, size: 2 * 2 ** 30 })).close()
const image = await open(path, { flags: 'r+', format, cache: 'none', discard: 'unmap' })
const server = await serveNbd(image, { path: socket })

const drive = (node, more) => ['-blockdev', `node-name=${node},${more}`, '-device', `virtio-blk-pci,drive=${node}`]
const machine = spawn(
  'qemu-system-x86_64',
  [
    ...[
      '-accel',
      'tcg',
      '-cpu',
      'max',
      '-m',
      '512',
      '-smp',
      '1',
      '-nodefaults',
      '-no-reboot',
      '-display',
      'none',
      '-serial',
      'stdio',
    ],
    ...['-kernel', kernel, '-initrd', initramfs, '-append', 'console=ttyS0 quiet panic=-1'],
    ...drive('target', `driver=nbd,server.type=unix,server.path=${socket},cache.direct=on`),
    ...drive('source', `driver=file,filename=${source},read-only=on`),
  ],
  { stdio: ['ignore', 'pipe', 'inherit'] },
)
const begun = { at: 0 }
const ended = { at: 0, state: '' }
let said = ''
machine.stdout.setEncoding('utf8').on('data', text => {
  said = (said + text).slice(-65_536)
  if (begun.at === 0 && said.includes(BEGIN)) begun.at = performance.now()
  const end = new RegExp(`${END} (\\d+)`).exec(said)
  if (end !== null && ended.at === 0) Object.assign(ended, { at: performance.now(), state: end[1] })
})
await new Promise((resolve, reject) => machine.on('error', reject).on('close', resolve))
await server.close()
await image.close()
if (ended.state !== '0')
  throw new Error(`the installation ended with ${ended.state || 'nothing'}:\n${said.slice(-4000)}`)
if (format === 'qcow2') {
  const { corruptions, leaks } = await check(path)
  if (corruptions + leaks > 0) throw new Error(`the image has ${corruptions} errors and ${leaks} leaks`)
}
console.log(JSON.stringify({ wall: (ended.at - begun.at) / 1000, size: (statSync(path).blocks * 512) / 2 ** 20 }))
rmSync(path)
