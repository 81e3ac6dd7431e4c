/** One image, several users: handles of this process, other processes of this library, QEMU. */

import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { open as openFile } from 'node:fs/promises'
import { join } from 'node:path'
import { check, convert, create, type OpenOptions, open } from 'qcow2'
import { afterEach, describe, expect, it } from 'vitest'
import { failure, pattern, temporaryFolder, writeRaw } from '../api/fixtures.js'
import { describeWithQemu, ok, qemuImg } from '../interop/qemu.js'
import { library } from '../lifecycle/child.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const SIZE = 2 ** 20

async function fresh(name: string): Promise<string> {
  await using image = await create(at(name), { size: SIZE, overwrite: true })
  await image.write(pattern(0, SIZE), { position: 0 })
  return at(name)
}

/** Whether opening works, or its error's code. */
async function tried(path: string, options: OpenOptions): Promise<string> {
  try {
    await (await open(path, options)).close()
    return 'open'
  } catch (error) {
    return String(Object(error).code)
  }
}

const children: ChildProcess[] = []
afterEach(async () => {
  for (const child of children.splice(0)) {
    if (child.exitCode !== null || child.signalCode !== null) continue
    child.kill('SIGKILL')
    await once(child, 'exit')
  }
})

/** Starts a program that says `ready` when it has what it needs, and waits for that. */
async function holder(command: string, args: string[], stdin: string): Promise<ChildProcess> {
  const child = spawn(command, args, { stdio: ['pipe', 'pipe', 'inherit'] })
  children.push(child)
  child.stdin.write(stdin)
  let printed = ''
  for await (const chunk of child.stdout.iterator({ destroyOnReturn: false })) {
    printed += String(chunk)
    if (/ready|bytes at offset/.test(printed)) return child
  }
  throw new Error(`${command} ended: ${printed}`)
}

/** Another process of this library that has the image open. */
const other = (path: string, options: OpenOptions): Promise<ChildProcess> => {
  const program = `
    const { open } = require(${JSON.stringify(library)})
    open(${JSON.stringify(path)}, ${JSON.stringify(options)}).then(async image => {
      globalThis.image = image
      if (!image.readOnly) await image.write(Buffer.alloc(1000, 7), { position: 0 })
      console.log('ready')
      setInterval(() => {}, 1000)
    })`
  return holder(process.execPath, ['-e', program], '')
}

const qemuIo = (path: string, ...flags: string[]): Promise<ChildProcess> =>
  holder(process.env['QEMU_IO_PROG'] ?? 'qemu-io', [...flags, '-f', 'qcow2', path], 'read 0 512\n')

const READ: OpenOptions = {}
const WRITE: OpenOptions = { flags: 'r+' }
const SHARE: OpenOptions = { forceShare: true }
const UNLOCKED: OpenOptions = { flags: 'r+', locking: 'off' }

const table: [holder: OpenOptions, expected: Record<'READ' | 'WRITE' | 'SHARE' | 'UNLOCKED', string>][] = [
  [WRITE, { READ: 'ERR_QCOW2_LOCKED', WRITE: 'ERR_QCOW2_LOCKED', SHARE: 'open', UNLOCKED: 'open' }],
  [READ, { READ: 'open', WRITE: 'ERR_QCOW2_LOCKED', SHARE: 'open', UNLOCKED: 'open' }],
  [SHARE, { READ: 'open', WRITE: 'open', SHARE: 'open', UNLOCKED: 'open' }],
  [UNLOCKED, { READ: 'open', WRITE: 'open', SHARE: 'open', UNLOCKED: 'open' }],
]

async function allTried(path: string): Promise<Record<string, string>> {
  return {
    READ: await tried(path, READ),
    WRITE: await tried(path, WRITE),
    SHARE: await tried(path, SHARE),
    UNLOCKED: await tried(path, UNLOCKED),
  }
}

describe.runIf(process.platform === 'linux').each(table)('while %j has the image open', (options, expected) => {
  it('in this process', async () => {
    const path = await fresh('same.qcow2')
    const image = await open(path, options)
    expect(await allTried(path)).toEqual(expected)
    await image.close()
    expect(await tried(path, WRITE)).toBe('open')
  })

  it('in another process, until that one is killed', async () => {
    const path = await fresh('other.qcow2')
    const child = await other(path, options)
    expect(await allTried(path)).toEqual(expected)
    child.kill('SIGKILL')
    await once(child, 'exit')
    expect(await tried(path, WRITE)).toBe('open')
    expect((await check(path)).corruptions).toBe(0)
  })
})

describe.runIf(process.platform === 'linux')('a locked image', () => {
  it('is named, with what conflicts, before anything changes', async () => {
    const path = await fresh('named.qcow2')
    await using _writer = await open(path, WRITE)
    const error = await failure(() => open(path, WRITE))
    expect([error.code, error.path]).toEqual(['ERR_QCOW2_LOCKED', path])
    expect(error.message).toContain('"write"')
    expect((await failure(() => open(path))).message).toContain('shared "write"')
  })

  it('is not replaced', async () => {
    const path = await fresh('target.qcow2')
    await using image = await open(path)
    const replaced = await failure(() => create(path, { size: SIZE, overwrite: true }))
    expect(replaced.code).toBe('ERR_QCOW2_LOCKED')
    const raw = writeRaw(at('source.raw'), SIZE, [])
    const converted = await failure(() => convert(raw, path, { from: 'raw', to: 'qcow2', overwrite: true }))
    expect(converted.code).toBe('ERR_QCOW2_LOCKED')
    const { buffer } = await image.read(Buffer.alloc(512), { position: 0 })
    expect(buffer).toEqual(pattern(0, 512))
  })

  it('is one through a FileHandle too, and closing gives the lock back while the handle stays open', async () => {
    const path = await fresh('handle.qcow2')
    await using handle = await openFile(path, 'r+')
    const image = await open(handle, WRITE)
    await image.write(Buffer.from('x'), { position: 0 })
    expect(await tried(path, READ)).toBe('ERR_QCOW2_LOCKED')
    await image.close()
    expect(await tried(path, WRITE)).toBe('open')
    await using reading = await openFile(path, 'r')
    const error = await failure(() => open(reading, WRITE))
    expect(error.code).toBe('ERR_QCOW2_READ_ONLY')
  })

  it('holds its backing file for reading, and its data file as itself', async () => {
    const backing = await fresh('backing.qcow2')
    const options = { size: SIZE, overwrite: true, backingFile: backing, backingFormat: 'qcow2' as const }
    const overlay = await create(at('overlay.qcow2'), options)
    expect([await tried(backing, READ), await tried(backing, WRITE)]).toEqual(['open', 'ERR_QCOW2_LOCKED'])
    await overlay.close()
    expect(await tried(backing, WRITE)).toBe('open')

    const data = at('locked.data')
    const image = await create(at('with-data.qcow2'), { size: SIZE, overwrite: true, dataFile: data })
    expect(await tried(data, { ...WRITE, format: 'raw' })).toBe('ERR_QCOW2_LOCKED')
    await image.close()
    expect(await tried(data, { ...WRITE, format: 'raw' })).toBe('open')
  })

  it('of several that want it at once, one gets it', async () => {
    const path = await fresh('race.qcow2')
    let won = 0
    for (let round = 0; round < 5; round++) {
      const images = await Promise.allSettled(Array.from({ length: 4 }, () => open(path, WRITE)))
      const opened = images.filter(end => end.status === 'fulfilled')
      expect(opened.length).toBeLessThanOrEqual(1)
      won += opened.length
      for (const { value } of opened) await value.close()
    }
    expect(won).toBeGreaterThan(2)
  })
})

describeWithQemu('QEMU and this library', () => {
  it('a writing qemu-io keeps out readers and writers', async () => {
    const path = await fresh('qemu-writes.qcow2')
    const child = await qemuIo(path)
    expect(await allTried(path)).toMatchObject(table[0]?.[1] ?? {})
    child.kill('SIGKILL')
    await once(child, 'exit')
    expect(await tried(path, WRITE)).toBe('open')
  })

  it('a reading qemu-io keeps out writers', async () => {
    const path = await fresh('qemu-reads.qcow2')
    await qemuIo(path, '-r')
    expect(await allTried(path)).toEqual(table[1]?.[1])
  })

  it('an open handle keeps qemu-img out in turn', async () => {
    const path = await fresh('ours.qcow2')
    const image = await open(path, WRITE)
    const refused = qemuImg('info', path)
    expect([refused.code, refused.stderr]).toEqual([1, expect.stringContaining('shared "write" lock')])
    ok(qemuImg('info', '-U', path))
    await image.close()
    ok(qemuImg('check', path))
    await using reader = await open(path)
    ok(qemuImg('check', path))
    expect(qemuImg('resize', path, '2M').stderr).toContain('"write" lock')
    expect(reader.virtualSize).toBe(SIZE)
  })
})
