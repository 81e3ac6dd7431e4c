/** What an image names and what is opened of it: nothing by default, and never itself. */

import { linkSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { create, type Image, open, type Qcow2Error, type Reference } from 'qcow2'
import { describe, expect, it } from 'vitest'
import { temporaryFolder } from './forged.js'

const folder = temporaryFolder()
let count = 0

/** An image that names a backing file, which need not exist. */
async function overlay(backingFile: string, backingFormat: 'qcow2' | 'raw' = 'qcow2', at?: string): Promise<string> {
  const path = at ?? join(folder, `overlay${count++}.qcow2`)
  await using _ = await create(path, { size: 2 ** 20, backingFile, backingFormat, references: 'layer' })
  return path
}

async function refusal(opening: Promise<Image>): Promise<Qcow2Error> {
  const outcome = await opening.then(
    async image => {
      await image.close()
      return undefined
    },
    (error: unknown) => error as Qcow2Error,
  )
  if (outcome === undefined) throw new Error('the image was opened')
  return outcome
}

describe('nothing is opened by default', () => {
  it.each(['/etc/passwd', 'does-not-exist', 'json:{"driver":"null-co"}', 'nbd://host/x'])('%s', async name => {
    const path = await overlay(name, 'raw')
    const error = await refusal(open(path))
    expect(error).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED', path })
    expect(error.message).toContain(name)
  })

  it('also not through a second layer', async () => {
    const secret = await overlay('/etc/passwd', 'raw')
    const path = await overlay(secret)
    const seen: Reference[] = []
    const opening = open(path, {
      references: reference => {
        seen.push(reference)
        return seen.length === 1 ? secret : null
      },
    })
    expect(await refusal(opening)).toMatchObject({ code: 'ERR_QCOW2_REFERENCE_DENIED' })
    expect(seen).toEqual([
      { kind: 'backing', filename: secret, format: 'qcow2', from: path },
      { kind: 'backing', filename: '/etc/passwd', format: 'raw', from: secret },
    ])
  })
})

describe('what names nothing that may be followed', () => {
  const names = [
    'json:{"driver":"file","filename":"/etc/passwd"}',
    'nbd://localhost/disk',
    'nbd:unix:/tmp/socket',
    'http://localhost/disk',
    'ssh://host/disk',
    'fat:rw:/tmp',
  ]
  it.each(names)('%s is refused although references are allowed', async name => {
    const error = await refusal(open(await overlay(name, 'raw'), { references: 'allow' }))
    expect(error.code).toBe('ERR_QCOW2_REFERENCE_DENIED')
  })

  it('is a missing file: the error names it', async () => {
    const path = await overlay('missing.qcow2')
    const error = await refusal(open(path, { references: 'allow' }))
    expect(error.message).toContain(join(folder, 'missing.qcow2'))
    expect(['ENOENT', 'ERR_QCOW2_CHAIN']).toContain(error.code)
  })

  it('is a folder', async () => {
    mkdirSync(join(folder, 'directory'))
    const error = await refusal(open(await overlay('directory', 'raw'), { references: 'allow' }))
    expect(error.code).toMatch(/^E/)
    expect(error.message).toContain('directory')
  })
})

describe('a chain that contains itself', () => {
  it('directly', async () => {
    const path = await overlay('self.qcow2', 'qcow2', join(folder, 'self.qcow2'))
    expect(await refusal(open(path, { references: 'allow' }))).toMatchObject({ code: 'ERR_QCOW2_CHAIN' })
  })

  it('over another image', async () => {
    const path = await overlay('second.qcow2', 'qcow2', join(folder, 'first.qcow2'))
    await overlay('first.qcow2', 'qcow2', join(folder, 'second.qcow2'))
    expect(await refusal(open(path, { references: 'allow' }))).toMatchObject({ code: 'ERR_QCOW2_CHAIN' })
  })

  it('under other names', async () => {
    symlinkSync('linked.qcow2', join(folder, 'symbolic.qcow2'))
    for (const name of ['symbolic', 'hard']) {
      const path = join(folder, `${name === 'hard' ? 'hardlinked' : 'linked'}.qcow2`)
      await overlay(`${name}.qcow2`, 'qcow2', path)
      if (name === 'hard') linkSync(path, join(folder, 'hard.qcow2'))
      expect(await refusal(open(path, { references: 'allow' }))).toMatchObject({ code: 'ERR_QCOW2_CHAIN' })
    }
  })

  it('as raw, in its own words', async () => {
    const path = await overlay('raw-self.qcow2', 'raw', join(folder, 'raw-self.qcow2'))
    expect(await refusal(open(path, { references: 'allow' }))).toMatchObject({ code: 'ERR_QCOW2_CHAIN' })
  })
})

describe('a deep chain', () => {
  it('is read to its bottom, and refused beyond the limit', async () => {
    const bottom = join(folder, 'bottom.raw')
    writeFileSync(bottom, Buffer.alloc(2 ** 20, 'deep'))
    let path = await overlay('bottom.raw', 'raw')
    for (let depth = 2; depth < 30; depth++) path = await overlay(path)
    await using image = await open(path, { references: 'allow', limits: { maxChainDepth: 30 } })
    expect(image.depth).toBe(30)
    const { buffer } = await image.read(Buffer.alloc(8), { position: 4096 })
    expect(buffer.toString()).toBe('deepdeep')
    const error = await refusal(open(path, { references: 'allow', limits: { maxChainDepth: 29 } }))
    expect(['ERR_QCOW2_CHAIN', 'ERR_QCOW2_LIMIT']).toContain(error.code)
  })
})

describe('raw is never guessed', () => {
  it('a raw backing file that holds a qcow2 header stays plain bytes', async () => {
    // The guest wrote this header into its raw disk: opened as an image it would pull in a file of the host.
    const trap = await overlay('/etc/passwd', 'raw', join(folder, 'trap.raw'))
    await using image = await open(await overlay('trap.raw', 'raw'), { references: 'allow' })
    const { buffer } = await image.read(Buffer.alloc(4), { position: 0 })
    expect(buffer.toString('latin1')).toBe('QFI\u00fb')
    expect(image.depth).toBe(2)
    expect(trap).toBe(join(folder, 'trap.raw'))
  })
})
