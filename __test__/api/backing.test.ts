/** What an image may pull in, and what it never may. */

import { readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { open as openFile } from 'node:fs/promises'
import { join } from 'node:path'
import { convert, create, inspect, open, type Reference, type ReferencePolicy } from 'qcow2'
import { beforeAll, describe, expect, it, vi } from 'vitest'
import { failure, openRaw, pattern, temporaryFolder, writeRaw } from './fixtures.js'

const folder = temporaryFolder()
const at = (name: string): string => join(folder, name)
const SIZE = 1 << 20

/** An overlay whose backing file is recorded and not looked at. */
async function overlay(name: string, backingFile: string, backingFormat: 'qcow2' | 'raw' = 'qcow2'): Promise<string> {
  const image = await create(at(name), { size: SIZE, backingFile, backingFormat, references: 'layer', overwrite: true })
  await image.close()
  return at(name)
}

/** Makes the backing format extension one that nobody knows, so that the format has to be found out. */
function forgetFormat(path: string): string {
  const bytes = readFileSync(path)
  const extension = bytes.indexOf(Buffer.from([0xe2, 0x79, 0x2a, 0xca]))
  bytes.writeUInt32BE(0x1234abcd, extension)
  writeFileSync(path, bytes)
  return path
}

const firstBytes = async (path: string, references: ReferencePolicy): Promise<Buffer> => {
  await using image = await open(path, { references })
  return (await image.read(Buffer.alloc(16), { position: 0 })).buffer
}

beforeAll(async () => {
  writeRaw(at('base.raw'), SIZE, [[0, SIZE]])
  await convert(at('base.raw'), at('base.qcow2'), { from: 'raw', to: 'qcow2' })
  await overlay('top.qcow2', 'base.qcow2')
  await overlay('raw-top.qcow2', 'base.raw', 'raw')
  await overlay('two.qcow2', 'top.qcow2')
})

describe('references', () => {
  it('are denied by default, with the name and a way out', async () => {
    const error = await failure(() => open(at('top.qcow2')))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED', path: at('top.qcow2'), field: 'backing_file' })
    expect(error.message).toMatch(/base\.qcow2.*references/)
  })

  it('are followed where that is allowed, from the directory of the image', async () => {
    expect(await firstBytes(at('top.qcow2'), 'allow')).toEqual(pattern(0, 16))
    expect(await firstBytes(at('raw-top.qcow2'), 'allow')).toEqual(pattern(0, 16))
    await using image = await open(at('two.qcow2'), { references: 'allow' })
    expect(image.depth).toBe(3)
    expect((await image.chain()).map(layer => layer.filename)).toEqual(['two.qcow2', 'top.qcow2', 'base.qcow2'].map(at))
  })

  it('are left alone with layer', async () => {
    expect(await firstBytes(at('top.qcow2'), 'layer')).toEqual(Buffer.alloc(16))
    await using image = await open(at('top.qcow2'), { references: 'layer' })
    expect(image.depth).toBe(1)
    expect(await image.info()).toMatchObject({
      backingFilename: 'base.qcow2',
      fullBackingFilename: at('base.qcow2'),
      backingFilenameFormat: 'qcow2',
    })
  })

  it('are the resolver’s to decide, each of them', async () => {
    const seen: Reference[] = []
    const handle = await openFile(at('base.raw'))
    await using image = await open(at('two.qcow2'), {
      references: async reference => {
        seen.push(reference)
        return reference.filename === 'base.qcow2' ? at('base.qcow2') : at(reference.filename)
      },
    })
    await handle.close()
    expect(image.depth).toBe(3)
    expect(seen).toEqual([
      { kind: 'backing', filename: 'top.qcow2', format: 'qcow2', from: at('two.qcow2') },
      { kind: 'backing', filename: 'base.qcow2', format: 'qcow2', from: at('top.qcow2') },
    ])
  })

  it('can be a FileHandle of the resolver’s', async () => {
    const handle = await openFile(at('base.raw'))
    expect(await firstBytes(at('raw-top.qcow2'), () => handle)).toEqual(pattern(0, 16))
    await handle.close()
  })

  it('are refused by a resolver that returns null, and fail with it when it throws', async () => {
    expect((await failure(() => open(at('top.qcow2'), { references: () => null }))).code).toBe(
      'ERR_QCOW2_REFERENCE_DENIED',
    )
    const own = new RangeError('mine')
    const thrown = open(at('top.qcow2'), {
      references: () => {
        throw own
      },
    })
    await expect(thrown).rejects.toBe(own)
    const nonsense = (() => 7) as unknown as ReferencePolicy
    expect((await failure(() => open(at('top.qcow2'), { references: nonsense }))).code).toBe(
      'ERR_QCOW2_INVALID_ARGUMENT',
    )
  })

  it.each(['json:{"driver":"null-co"}', 'nbd:localhost:10809', 'http://localhost/x.qcow2', 'ssh://h/x'])(
    'that are no file names are never followed: %s',
    async name => {
      const error = await failure(async () => open(await overlay('strange.qcow2', name), { references: 'allow' }))
      expect(error.code).toBe('ERR_QCOW2_REFERENCE_DENIED')
      expect(error.message).toContain(name)
    },
  )

  it('are never opened by an inspection', async () => {
    const resolver = vi.fn()
    const found = await inspect(at('top.qcow2'))
    expect(resolver).not.toHaveBeenCalled()
    expect(found).toMatchObject({ format: 'qcow2', safe: false, backingFilename: 'base.qcow2' })
    expect(found.findings.map(({ code }) => code)).toEqual(['BACKING_FILE'])
  })
})

describe('a chain', () => {
  it('that lacks a member names both files', async () => {
    const path = await overlay('orphan.qcow2', 'gone.qcow2')
    const error = await failure(() => open(path, { references: 'allow' }))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_CHAIN', path: at('gone.qcow2'), syscall: 'open', errno: -2 })
    expect(error.message).toContain(`'gone.qcow2' of '${path}'`)
    expect(error.cause).toMatchObject({ code: 'ENOENT' })
  })

  it('that contains itself is refused, under any name', async () => {
    const self = await overlay('self.qcow2', 'self.qcow2')
    expect((await failure(() => open(self, { references: 'allow' }))).code).toBe('ERR_QCOW2_CHAIN')
    symlinkSync(at('ring-a.qcow2'), at('ring-link.qcow2'))
    await overlay('ring-a.qcow2', 'ring-b.qcow2')
    await overlay('ring-b.qcow2', 'ring-link.qcow2')
    const error = await failure(() => open(at('ring-a.qcow2'), { references: 'allow' }))
    expect(error.code).toBe('ERR_QCOW2_CHAIN')
    expect(error.message).toContain('twice')
  })

  it('is as deep as the limit allows', async () => {
    const open3 = (maxChainDepth: number) => open(at('two.qcow2'), { references: 'allow', limits: { maxChainDepth } })
    await (await open3(3)).close()
    const error = await failure(() => open3(2))
    expect(error.code).toBe('ERR_QCOW2_CHAIN')
    expect(error.message).toContain('more than 2 layers')
  })

  it('of 200 layers opens, one of 201 does not', async () => {
    await overlay('deep-0.qcow2', 'base.qcow2')
    for (let i = 1; i < 200; i++) await overlay(`deep-${i}.qcow2`, `deep-${i - 1}.qcow2`)
    expect(await firstBytes(at('deep-198.qcow2'), 'allow')).toEqual(pattern(0, 16))
    expect((await failure(() => open(at('deep-199.qcow2'), { references: 'allow' }))).code).toBe('ERR_QCOW2_CHAIN')
  })
})

describe('the format of a backing file that the image does not tell', () => {
  it('is qcow2 by its magic, else raw', async () => {
    expect(await firstBytes(forgetFormat(await overlay('a.qcow2', 'base.qcow2')), 'allow')).toEqual(pattern(0, 16))
    expect(await firstBytes(forgetFormat(await overlay('b.qcow2', 'base.raw', 'raw')), 'allow')).toEqual(pattern(0, 16))
  })

  it('is not raw with the first bytes of another format', async () => {
    const foreign = Buffer.alloc(4096)
    foreign.write('QED\0')
    writeFileSync(at('foreign.qed'), foreign)
    const path = forgetFormat(await overlay('c.qcow2', 'foreign.qed', 'raw'))
    const error = await failure(() => open(path, { references: 'allow' }))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_UNSUPPORTED_FEATURE', path: at('foreign.qed') })
    expect(error.message).toContain('qed')
    // Said by the image, raw is raw.
    expect((await firstBytes(await overlay('d.qcow2', 'foreign.qed', 'raw'), 'allow')).toString('latin1', 0, 4)).toBe(
      'QED\0',
    )
  })
})

describe('an external data file', () => {
  const make = async (name: string): Promise<string> => {
    rmSync(at(`${name}.data`), { force: true })
    const image = await create(at(name), {
      size: SIZE,
      dataFile: at(`${name}.data`),
      dataFileRaw: true,
      overwrite: true,
    })
    await image.close()
    writeRaw(at(`${name}.data`), SIZE, [[0, SIZE]])
    return at(name)
  }

  it('is denied by default, followed where that is allowed, and the resolver’s to decide', async () => {
    const path = await make('data.qcow2')
    const error = await failure(() => open(path))
    expect(error.code).toBe('ERR_QCOW2_REFERENCE_DENIED')
    expect(error.message).toContain('external data file')
    expect(await firstBytes(path, 'allow')).toEqual(pattern(0, 16))
    const seen: Reference[] = []
    const resolver = (reference: Reference): string => {
      seen.push(reference)
      return at('base.raw')
    }
    expect(await firstBytes(path, resolver)).toEqual(pattern(0, 16))
    expect(seen).toEqual([{ kind: 'data-file', filename: at('data.qcow2.data'), format: 'raw', from: path }])
  })

  it('is not needed to look at the layer, only to read from it', async () => {
    const path = await make('data2.qcow2')
    await using image = await open(path, { references: 'layer' })
    expect((await image.info()).formatSpecific).toMatchObject({ dataFile: at('data2.qcow2.data'), dataFileRaw: true })
    const error = await failure(() => image.read(Buffer.alloc(16), { position: 0 }))
    expect(error.code).toBe('ERR_QCOW2_REFERENCE_DENIED')
  })
})

it('what a guest writes into its raw disk does not make it an image', async () => {
  writeFileSync(at('guest.raw'), Buffer.concat([readFileSync(at('top.qcow2')), Buffer.alloc(SIZE)]))
  await using image = await openRaw(at('guest.raw'))
  expect((await image.read(Buffer.alloc(4), { position: 0 })).buffer.toString('latin1')).toBe('QFI\xfb')
  expect(image.depth).toBe(1)
})
