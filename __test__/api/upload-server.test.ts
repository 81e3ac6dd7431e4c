/** `examples/upload`: uploads into a real web server, refused, cancelled, and downloaded again. */

import { type ChildProcess, spawn } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { type ClientRequest, type IncomingMessage, request } from 'node:http'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { compare, convert } from 'qcow2'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { temporaryFolder } from './fixtures.js'

const SERVER = fileURLToPath(new URL('../../examples/upload/server.mjs', import.meta.url))
const folder = temporaryFolder()
const disks = temporaryFolder()
const MIB = 1 << 20
const QUOTA = 10 * MIB
const at = (name: string): string => join(folder, name)
let server: ChildProcess
let url: string
let image: Buffer

beforeAll(async () => {
  server = spawn(process.execPath, [SERVER, disks, '0', String(QUOTA)], { stdio: ['ignore', 'pipe', 'inherit'] })
  const listening = once(server.stdout!, 'data')
  writeFileSync(at('disk.raw'), randomBytes(3 * MIB))
  await convert(at('disk.raw'), at('disk.qcow2'), { from: 'raw', to: 'qcow2' })
  image = readFileSync(at('disk.qcow2'))
  url = /^\S+/.exec(String((await listening)[0]))?.[0] ?? ''
})
afterAll(() => server.kill())

/** Sends a request; its body is written by `send`. */
async function ask(
  method: string,
  path: string,
  headers: Record<string, string | number> = {},
  send: (out: ClientRequest) => void = out => out.end(),
): Promise<{ status: number | undefined; body: Buffer }> {
  return await new Promise((resolve, reject) => {
    const out = request(new URL(path, url), { method, headers, agent: false })
    out.on('response', (response: IncomingMessage) => {
      const answer = buffer(response).then(body => ({ status: response.statusCode, body }))
      answer.then(resolve, reject).finally(() => out.destroy())
    })
    out.on('error', reject)
    send(out)
  })
}

const put = (name: string, bytes: Buffer, length: number | undefined = bytes.length) =>
  ask('PUT', `/disks/${name}`, length === undefined ? {} : { 'content-length': length }, out => out.end(bytes))
const told = ({ status, body }: { status: number | undefined; body: Buffer }) => ({
  status,
  ...(JSON.parse(body.toString()) as { code?: string; virtualSize?: number; format?: string }),
})

it('stores what is uploaded, and gives it back', async () => {
  expect(told(await put('one.qcow2', image))).toMatchObject({ status: 201, virtualSize: 3 * MIB, format: 'qcow2' })
  const { status, body } = await ask('GET', '/disks/one.qcow2')
  expect(status).toBe(200)
  writeFileSync(at('back.qcow2'), body)
  expect(await compare(at('disk.raw'), at('back.qcow2'), { formatA: 'raw' })).toMatchObject({ identical: true })
  expect(JSON.parse((await ask('GET', '/disks')).body.toString())).toEqual([{ name: 'one.qcow2', size: body.length }])
  expect((await ask('GET', '/')).body.toString()).toContain('<h1>Disks</h1>')
})

it('refuses what is wrong, too large or there already, before all of it has come', async () => {
  const hostile = Buffer.from(image)
  hostile.writeBigUInt64BE(1n << 20n, 72)
  const begins = (length: number) =>
    ask('PUT', '/disks/two.qcow2', { 'content-length': length }, out => out.write(hostile.subarray(0, 65536)))
  expect(told(await begins(QUOTA))).toMatchObject({ status: 413, code: 'ERR_QCOW2_LIMIT' })
  expect(told(await begins(MIB))).toMatchObject({ status: 422, code: 'ERR_QCOW2_UNSUPPORTED_FEATURE' })
  expect(told(await put('two.qcow2', hostile))).toMatchObject({ status: 422, code: 'ERR_QCOW2_UNSUPPORTED_FEATURE' })
  expect(told(await put('one.qcow2', image))).toMatchObject({ status: 409, code: 'EEXIST' })
  expect(told(await put('two.qcow2', Buffer.from('no image')))).toMatchObject({ status: 415 })
  expect((await ask('GET', '/disks/none')).status).toBe(404)
  expect((await ask('GET', '/disks/../secret')).status).toBe(404)
  expect(readdirSync(disks)).toEqual(['one.qcow2'])
})

it('leaves nothing of an upload whose connection is closed, and takes the next one', async () => {
  const closed = ask('PUT', '/disks/two.qcow2', { 'content-length': image.length }, out => {
    out.write(image.subarray(0, MIB), () => setTimeout(() => out.destroy(), 50))
  })
  await expect(closed).rejects.toThrow()
  await sleep(50)
  expect(readdirSync(disks)).toEqual(['one.qcow2'])
  expect(told(await put('two.qcow2', image))).toMatchObject({ status: 201 })
  expect(readdirSync(disks).sort()).toEqual(['one.qcow2', 'two.qcow2'])
})
