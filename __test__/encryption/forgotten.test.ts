/** Copies of secrets that calls make are overwritten when they have ended. The addon's functions are watched, and run as they are. */

import { createRequire } from 'node:module'
import { join } from 'node:path'
import { afterEach, expect, it } from 'vitest'
import {
  compact,
  compare,
  convert,
  create,
  createQcow2Stream,
  measure,
  open,
  rebase,
  type Secret,
} from '../../dist/index.js'
import { failure, temporaryFolder } from '../api/fixtures.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const addon: Record<string, unknown> = createRequire(import.meta.url)('../../dist/native.js').native

/** Every array of bytes that is a secret in what the addon gets, and what it held then. */
const seen: { readonly bytes: Uint8Array; readonly text: string; readonly name: string }[] = []

function watch(name: string, value: unknown): void {
  if (typeof value !== 'object' || value === null) return
  for (const [key, inner] of Object.entries(value)) {
    if (inner instanceof Uint8Array && key === 'bytes') {
      seen.push({ bytes: inner, text: Buffer.from(inner).toString(), name })
    } else watch(name, inner)
  }
}

const originals = Object.entries(addon)
for (const name of [
  'unlockLayer',
  'createImage',
  'convertImage',
  'beginClone',
  'createOverlay',
  'addKey',
  'removeKeys',
]) {
  const original = addon[name] as (...values: unknown[]) => unknown
  addon[name] = (...values: unknown[]) => {
    for (const value of values) watch(name, value)
    return original(...values)
  }
}
afterEach(() => {
  seen.length = 0
})

/** What the addon got as secrets while `work` ran; all of it is overwritten. */
async function forgotten(work: () => Promise<unknown>): Promise<string[]> {
  seen.length = 0
  await work().catch(() => undefined)
  for (const { bytes, name } of seen)
    expect(
      bytes.every(byte => byte === 0),
      name,
    ).toBe(true)
  return seen.map(({ name, text }) => `${name} ${text}`)
}

const encrypt = { secret: 'one', iterTime: 1 } as const
const closed = async (image: Promise<{ close(): Promise<void> }>): Promise<void> => (await image).close()

it('are overwritten, however a call ends', async () => {
  expect(originals.length).toBeGreaterThan(20)
  const path = at('a.qcow2')
  const made = () => closed(create(path, { size: 1 << 20, overwrite: true, encrypt }))
  expect(await forgotten(made)).toEqual(['createImage one', 'unlockLayer one'])
  const bytes = Buffer.from('one')
  const secrets: readonly (Secret | (() => Secret))[] = ['one', bytes, () => 'one', () => bytes]
  for (const secret of secrets) {
    expect(await forgotten(() => closed(open(path, { secret })))).toEqual(['unlockLayer one'])
    const options = { to: 'raw', secret, overwrite: true } as const
    expect(await forgotten(() => convert([path, path], at('out.raw'), options))).toEqual([
      'unlockLayer one',
      'unlockLayer one',
    ])
    expect(await forgotten(() => compare(path, path, { secretA: secret, secretB: secret }))).toHaveLength(2)
    expect(await forgotten(() => compact(path, { secret }))).toEqual(['unlockLayer one'])
    expect(await forgotten(() => measure(path, { to: 'raw', secret }))).toEqual(['unlockLayer one'])
    expect(await forgotten(() => rebase(path, null, { secret }))).toEqual(['unlockLayer one'])
    const stream = async () => (await createQcow2Stream(path, { secret })).destroy()
    expect(await forgotten(stream)).toEqual(['unlockLayer one'])
  }
  expect(bytes.toString()).toBe('one')
  expect(await forgotten(() => closed(open(path, { secret: 'wrong' })))).toEqual(['unlockLayer wrong'])
  expect(
    await forgotten(() => convert(path, at('b.qcow2'), { to: 'qcow2', secret: 'one', create: { encrypt } })),
  ).toEqual(['unlockLayer one', 'convertImage one'])
  await using image = await open(path, { flags: 'r+', secret: 'one' })
  const key = { secret: 'one', newSecret: Buffer.from('two'), iterTime: 1 } as const
  expect(await forgotten(() => image.keys.add(key))).toEqual(['addKey one', 'addKey two'])
  expect(await forgotten(() => image.keys.change({ ...key, secret: 'nope' }))).toEqual(['addKey nope', 'addKey two'])
  expect(await forgotten(() => image.keys.remove({ secret: 'two' }))).toEqual(['removeKeys two'])
  expect(await forgotten(() => image.clone(at('c.qcow2'), { to: 'qcow2', create: { encrypt } }))).toEqual([
    'beginClone one',
  ])
  expect(await forgotten(() => image.createOverlay(at('o.qcow2'), { create: { encrypt } }))).toContain(
    'createOverlay one',
  )
  const broken = () => convert(path, at('d.qcow2'), { to: 'qcow2', secret: 'one', create: { encrypt, clusterSize: 5 } })
  expect(await failure(broken)).toMatchObject({ code: 'ERR_QCOW2_INVALID_ARGUMENT' })
})
