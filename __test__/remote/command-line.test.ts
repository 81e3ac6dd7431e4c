/** Disks on a web server, named on the command line. */

import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { convert, create } from 'qcow2'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { temporaryFolder, writeRaw } from '../api/fixtures.js'
import { has, type Serving, startNginx } from './servers.js'

const MIB = 2 ** 20
const cli = fileURLToPath(new URL('../../dist/cli.js', import.meta.url))

describe.skipIf(!has('nginx', 'no web server was named on the command line'))('the command line', () => {
  const folder = temporaryFolder()
  const files = join(folder, 'files')
  let server: Serving & { readonly origin: string }

  beforeAll(async () => {
    mkdirSync(files)
    const raw = writeRaw(join(folder, 'disk.raw'), 64 * MIB, [
      [0, MIB],
      [40 * MIB, 3 * MIB],
    ])
    await convert(raw, join(files, 'disk.qcow2'), { from: 'raw', to: 'qcow2' })
    server = await startNginx(folder, files)
  })

  afterAll(() => server.stop())

  const qcow2 = (...args: string[]) => {
    const { status, stdout, stderr } = spawnSync(process.execPath, [cli, ...args], { cwd: folder, encoding: 'utf8' })
    return { status, stdout, stderr }
  }
  const url = (name = 'disk.qcow2'): string => `${server.origin}/${name}`

  it('takes an address wherever it reads an image', () => {
    const done = { status: 0, stderr: '' }
    expect(qcow2('convert', '-O', 'raw', url(), 'copy.raw')).toEqual({ ...done, stdout: '' })
    expect(readFileSync(join(folder, 'copy.raw')).equals(readFileSync(join(folder, 'disk.raw')))).toBe(true)
    const local = join(files, 'disk.qcow2')
    for (const [command, ...options] of [['map', '--output=json'], ['check']] as const) {
      expect(qcow2(command, ...options, url())).toEqual({ ...qcow2(command, ...options, local), ...done })
    }
    const info = JSON.parse(qcow2('info', '--output=json', `${url()}?signature=secret`).stdout)
    expect(info).toMatchObject({ filename: `${url()}?…`, format: 'qcow2', 'virtual-size': 64 * MIB })
    expect(qcow2('compare', url(), 'disk.raw')).toMatchObject({ ...done, stdout: 'Images are identical.\n' })
    expect(qcow2('dd', '-O', 'raw', 'bs=1M', 'count=1', `if=${url()}`, 'of=part.raw')).toMatchObject(done)
    expect(readFileSync(join(folder, 'part.raw')).equals(readFileSync(join(folder, 'disk.raw')).subarray(0, MIB))).toBe(
      true,
    )
  })

  it('says what is wrong, and no credentials', () => {
    const secret = 'hunter2'
    const withSecret = (name: string): string => `${url(name).replace('://', `://user:${secret}@`)}?key=${secret}`
    for (const [args, message] of [
      [['info', withSecret('none.qcow2')], `Could not open '${url('none.qcow2')}?…': No such file or directory`],
      [['convert', '-O', 'raw', withSecret('none.qcow2'), 'x.raw'], 'No such file or directory'],
      [['info', withSecret('plain/disk.qcow2')], 'with the whole file'],
      [['convert', '-O', 'raw', 'disk.raw', withSecret('x.raw')], 'a disk on a web server can only be read'],
      [['resize', withSecret('disk.qcow2'), '1G'], 'it can be read only'],
      [['compact', withSecret('disk.qcow2')], 'can only be read'],
    ] as const) {
      const { status, stdout, stderr } = qcow2(...args)
      expect(`${stdout}${stderr}`).toContain(message)
      expect(`${stdout}${stderr}`).not.toContain(secret)
      expect(status).toBe(1)
    }
    expect(existsSync(join(folder, 'x.raw'))).toBe(false)
  })

  it('asks for nothing that an image names', async () => {
    const harmless = 'x'.repeat(url().length)
    await (await create(join(folder, harmless), { size: MIB })).close()
    await (await create(join(folder, 'asks.qcow2'), { backingFile: harmless, backingFormat: 'qcow2' })).close()
    const bytes = readFileSync(join(folder, 'asks.qcow2'))
    bytes.write(url(), bytes.indexOf(harmless))
    writeFileSync(join(folder, 'asks.qcow2'), bytes)
    expect(qcow2('convert', '-O', 'raw', 'asks.qcow2', 'x.raw')).toMatchObject({
      status: 1,
      stderr: expect.stringContaining("'http:' is a protocol"),
    })
    const chain = qcow2('info', '--backing-chain', 'asks.qcow2')
    expect(chain.status).toBe(1)
    expect(existsSync(join(folder, 'x.raw'))).toBe(false)
  })
})
