/** Requests that come one by one and are done soon: the event loop looks for their completions, and stops looking. */

import { join } from 'node:path'
import { convert } from 'qcow2'
import { beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder, writeRaw } from '../api/fixtures.js'
import { runNode } from './child.js'

const folder = temporaryFolder()
const raw = join(folder, 'disk.raw')
const path = join(folder, 'disk.qcow2')
const MIB = 2 ** 20

beforeAll(async () => {
  writeRaw(raw, MIB, [[0, MIB]])
  await convert(raw, path, { from: 'raw', to: 'qcow2' })
})

const run = (program: string) => runNode(program, { args: [path] })
const one = `const [path] = process.argv.slice(1)
  const buffer = Buffer.alloc(512)
  const readMany = async image => {
    for (let i = 0; i < 2000; i++) await image.read(buffer, { position: i % 2048 * 512 })
  }
`

describe('a caller that awaits each read', () => {
  it('leaves the processor alone when it stops reading', () => {
    const ended = run(`${one}
      qcow2.open(path).then(async image => {
        await readMany(image)
        await new Promise(resolve => setTimeout(resolve, 50))
        const before = process.cpuUsage()
        await new Promise(resolve => setTimeout(resolve, 1000))
        const { user, system } = process.cpuUsage(before)
        console.log(user + system < 300_000 ? 'idle' : \`busy for \${user + system} us of a second\`)
        await image.close()
      })`)
    expect(ended).toMatchObject({ code: 0, stderr: '', stdout: 'idle\n' })
  })

  it('is served where a test runner replaced the timers and the clock', () => {
    const ended = run(`${one}
      globalThis.setImmediate = globalThis.setTimeout = () => undefined
      performance.now = Date.now = () => 0
      qcow2.open(path).then(async image => {
        await readMany(image)
        await image.close()
        console.log('done')
      })`)
    expect(ended).toMatchObject({ code: 0, stderr: '', stdout: 'done\n' })
  })

  it('is served in rounds with pauses of every length', () => {
    const ended = run(`${one}
      qcow2.open(path).then(async image => {
        for (let pause = 0; pause < 400; pause++) {
          const until = process.hrtime.bigint() + BigInt(pause * 1000)
          while (process.hrtime.bigint() < until);
          await image.read(buffer, { position: 0 })
          await image.read(buffer, { position: 512 })
        }
        await image.close()
        console.log('done')
      })`)
    expect(ended).toMatchObject({ code: 0, stderr: '', stdout: 'done\n' })
  })
})
