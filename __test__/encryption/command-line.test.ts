/** `--object secret`, `--image-opts` and `-o encrypt.…`: the command lines of qemu-img, with either tool. */

import { createHash } from 'node:crypto'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, expect, it } from 'vitest'
import { bothTools, describeWithQemu, type Tool, workspace } from '../cli/run.js'

const folder = workspace()
const tools = bothTools(folder)

const OBJECT = '--object secret,id=s,data=hunter2'
const LUKS = '-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10'
const opts = (name: string, more = ''): string =>
  `--image-opts driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename=${name}${more}`

async function done(tool: Tool, line: string): Promise<string> {
  const { code, stdout, stderr } = await tools[tool](line)
  expect({ code, stderr }, `${tool}: ${line}`).toEqual({ code: 0, stderr: '' })
  return stdout
}

describeWithQemu('encryption on the command line', () => {
  beforeAll(() => {
    writeFileSync(join(folder, 'disk.raw'), Buffer.concat([Buffer.alloc(300_032, 7), Buffer.alloc(748_544)]))
    writeFileSync(join(folder, 'secret.txt'), 'hunter2')
    writeFileSync(join(folder, 'secret.b64'), 'aHVudGVyMg==\n')
  })

  it.each([
    ['ours', 'theirs'],
    ['theirs', 'ours'],
  ] as const)('%s makes, %s reads', async (maker, reader) => {
    const create = `create ${OBJECT} -f qcow2 ${LUKS} new.qcow2 1M`
    expect(await done(maker, create)).toBe(
      "Formatting 'new.qcow2', fmt=qcow2 encrypt.format=luks encrypt.key-secret=s encrypt.iter-time=10 cluster_size=65536 " +
        'extended_l2=off compression_type=zlib size=1048576 lazy_refcounts=off refcount_bits=16\n',
    )
    await done(reader, `check ${OBJECT} ${opts('new.qcow2')}`)
    await done(maker, `convert ${OBJECT} -f raw -O qcow2 ${LUKS} disk.raw made.qcow2`)
    for (const secret of [
      'data=hunter2',
      'file=secret.txt',
      'file=secret.b64,format=base64',
      'data=aHVudGVyMg==,format=base64',
    ]) {
      await done(reader, `convert --object secret,id=s,${secret} ${opts('made.qcow2')} -O raw back.raw`)
      expect(readFileSync(join(folder, 'back.raw')).equals(readFileSync(join(folder, 'disk.raw'))), secret).toBe(true)
    }
    expect(await done(reader, `compare ${OBJECT} ${opts('made.qcow2')} driver=raw,file.filename=disk.raw`)).toBe(
      'Images are identical.\n',
    )
    await done(reader, `snapshot ${OBJECT} -c one ${opts('made.qcow2')}`)
    await done(maker, `resize ${OBJECT} ${opts('made.qcow2')} 2M`)
    await done(maker, `check ${OBJECT} ${opts('made.qcow2')}`)
  })

  it.each([
    `create -f qcow2 ${LUKS} x.qcow2 1M`,
    `create ${OBJECT} -f qcow2 -o encrypt.format=luks x.qcow2 1M`,
    `create ${OBJECT} -f qcow2 -o encrypt.format=foo,encrypt.key-secret=s x.qcow2 1M`,
    `convert ${OBJECT} -c -f raw -O qcow2 ${LUKS} disk.raw x.qcow2`,
    'info --object foo,id=s disk.raw',
    'info --object secret,data=x disk.raw',
    'info --object secret,id=s disk.raw',
    'info --object secret,id=s,data=x,file=y disk.raw',
    'info --object secret,id=s,data=x,format=hex disk.raw',
    'info --object secret,id=s,data=%%,format=base64 disk.raw',
    'info --object secret,id=s,file=gone disk.raw',
    'info --image-opts driver=nothing,file.filename=disk.raw',
    'info --image-opts driver=raw,file.filename=disk.raw,foo=bar',
    'info --image-opts -f raw driver=raw,file.filename=disk.raw',
    `convert ${opts('made.qcow2')} -O raw x.raw`,
  ])('refuses as qemu-img does: %s', async line => {
    const [ours, theirs] = await tools.inTurn(line)
    expect(ours.code, ours.stderr).toBe(theirs.code)
    expect(ours.stdout).toBe(theirs.stdout)
    expect(ours.stderr, 'says something').not.toBe('')
    expect(ours.stderr).not.toContain('hunter2')
  })

  it.each(['', ',cluster_size=4k,encrypt.cipher-alg=aes-128'])('measures as qemu-img does: %s', async more => {
    for (const source of ['--size 1G', '-f raw disk.raw']) {
      const line = `measure ${OBJECT} -O qcow2 ${LUKS}${more} ${source}`
      expect(await done('ours', line), line).toBe(await done('theirs', line))
    }
  })

  it('ignores nothing that is said of a backing file', async () => {
    for (const [option, why] of [
      ['backing.file.filename=disk.raw', "the image is made on no other: 'disk.raw' cannot lie below it"],
      ['backing.driver=raw', "'backing.file.filename' says which"],
      ['backing=node', "names no other node here: 'backing.file.filename' says which file it is"],
    ]) {
      const { code, stderr } = await tools.ours(`convert ${OBJECT} -O raw ${opts('made.qcow2', `,${option}`)} none.raw`)
      expect([code, stderr]).toEqual([1, expect.stringContaining(why ?? '')])
    }
  })

  const KEYS = '--object secret,id=s,data=one --object secret,id=n,data=two --object secret,id=x,data=three'
  const amend = (options: string, name = 'keys.qcow2', more = ''): string =>
    `amend ${KEYS} ${more}-o ${options} --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=${name}`
  const add = (more = ''): string => `encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10${more}`

  it('changes key slots as qemu-img does, with its words', async () => {
    for (const name of ['keys.qcow2', 'theirs.qcow2']) {
      await done('ours', `create -q ${KEYS} -f qcow2 ${LUKS} ${name} 1M`)
    }
    await done('theirs', 'create -q -f qcow2 plain.qcow2 1M')
    // Each tool on its own image, in turn: one leads to the next.
    const lines: readonly (readonly [options: string, more?: string])[] = [
      [add()],
      [add(',encrypt.keyslot=5')],
      [add(',encrypt.keyslot=5')],
      [add(',encrypt.keyslot=5'), '--force '],
      [add(',encrypt.keyslot=8')],
      [add(',encrypt.keyslot=-1')],
      [add(',encrypt.iter-time=0')],
      [add(',encrypt.old-secret=s')],
      ['encrypt.state=active'],
      ['encrypt.state=foo,encrypt.new-secret=n'],
      ['encrypt.new-secret=n'],
      ['encrypt.state=active,encrypt.new-secret=gone,encrypt.iter-time=10'],
      ['encrypt.state=inactive'],
      ['encrypt.state=inactive,encrypt.new-secret=n'],
      ['encrypt.state=inactive,encrypt.keyslot=3,encrypt.iter-time=10'],
      ['encrypt.state=inactive,encrypt.keyslot=3'],
      ['encrypt.state=inactive,encrypt.keyslot=3', '--force '],
      ['encrypt.state=inactive,encrypt.keyslot=0,encrypt.old-secret=n'],
      ['encrypt.state=inactive,encrypt.old-secret=x'],
      ['encrypt.state=inactive,encrypt.old-secret=n'],
      ['encrypt.state=inactive,encrypt.old-secret=s'],
      ['encrypt.state=inactive,encrypt.keyslot=0'],
      ['encrypt.format=luks'],
      ['encrypt.cipher-alg=aes-128'],
      [add(), '-p '],
      ['encrypt.state=inactive,encrypt.keyslot=1,size=2M'],
      ['encrypt.state=inactive,encrypt.keyslot=0', '--force '],
    ]
    for (const [options, more] of lines) {
      const [ours, theirs] = await tools.inTurn(
        amend(options, 'keys.qcow2', more),
        amend(options, 'theirs.qcow2', more),
      )
      expect(ours, options).toEqual(theirs)
    }
    const slots = async (name: string): Promise<boolean[]> => {
      const info = JSON.parse(await done('theirs', `info --output=json ${name}`))
      expect(info['virtual-size']).toBe(2 << 20)
      return info['format-specific'].data.encrypt.slots.map(({ active }: { active: boolean }) => active)
    }
    expect(await slots('keys.qcow2')).toEqual(await slots('theirs.qcow2'))
    const [ours, theirs] = await tools.inTurn('amend -o encrypt.state=inactive,encrypt.keyslot=0 -f qcow2 plain.qcow2')
    expect(ours).toEqual(theirs)
  })

  it('opens with the keys that the other tool added, until it has removed them', async () => {
    const open = (id: string): string =>
      `check -q ${KEYS} --image-opts driver=qcow2,encrypt.key-secret=${id},file.filename=both.qcow2`
    for (const [one, other] of [
      ['ours', 'theirs'],
      ['theirs', 'ours'],
    ] as const) {
      await done(other, `create -q ${KEYS} -f qcow2 ${LUKS} both.qcow2 1M`)
      await done(one, amend(add(), 'both.qcow2'))
      await done(other, open('n').replace('check -q', 'convert').concat(' -O raw back.raw'))
      await done(one, amend('encrypt.state=inactive,encrypt.old-secret=n', 'both.qcow2'))
      const { code } = await tools[other](open('n').replace('check -q', 'convert').concat(' -O raw back.raw'))
      expect(code).toBe(1)
      await done(other, open('s'))
    }
  })

  it.each([
    ['theirs', ''],
    ['ours', ',encrypt.cipher-alg=twofish-256,encrypt.hash-alg=sha1,encrypt.ivgen-alg=plain'],
    [
      'ours',
      ',encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256',
    ],
  ] as const)('shows the LUKS header that %s makes as qemu-img does: %s', async (maker, more) => {
    await done(maker, `create -q ${OBJECT} -f qcow2 ${LUKS}${more} shown.qcow2 1M`)
    for (const line of ['info shown.qcow2', 'info --output=json shown.qcow2']) {
      expect(await done('ours', line)).toBe(await done('theirs', line))
    }
  })

  it('shows an image whose LUKS header is damaged, and says so', async () => {
    await done('ours', `create -q ${OBJECT} -f qcow2 ${LUKS} damaged.qcow2 1M`)
    const bytes = readFileSync(join(folder, 'damaged.qcow2'))
    bytes.fill(0, bytes.indexOf('LUKS'), bytes.indexOf('LUKS') + 6)
    writeFileSync(join(folder, 'damaged.qcow2'), bytes)
    const { code, stdout, stderr } = await tools.ours('info damaged.qcow2')
    expect([code, stdout]).toEqual([0, expect.stringContaining('    encrypt:\n        format: luks\n')])
    expect(stderr).toMatch(/^qemu-img: warning: damaged.qcow2: not a LUKS header .*: no secret opens the image\n$/)
  })

  it('copies a part of an encrypted image as qemu-img does', async () => {
    await done('ours', `convert ${OBJECT} -f raw -O qcow2 ${LUKS} disk.raw part.qcow2`)
    const line = (secret: string, target: string): string =>
      `dd --object secret,id=s,data=${secret} --image-opts -O raw bs=64k skip=1 count=6 if=${opts('part.qcow2').slice(13)} of=${target}`
    expect(await done('ours', line('hunter2', 'ours.raw'))).toBe(await done('theirs', line('hunter2', 'theirs.raw')))
    expect(readFileSync(join(folder, 'ours.raw')).equals(readFileSync(join(folder, 'theirs.raw')))).toBe(true)
    const wrong = await tools.ours(line('nope', 'wrong.raw'))
    expect([wrong.code, wrong.stderr]).toEqual([1, expect.stringMatching(/Could not open '.*part.qcow2': the secret/)])
    expect(() => readFileSync(join(folder, 'wrong.raw'))).toThrow('ENOENT')
  })

  it('joins several encrypted images, each with its own secret', async () => {
    for (const id of ['s', 'n']) {
      const options = `-o encrypt.format=luks,encrypt.key-secret=${id},encrypt.iter-time=10`
      await done('ours', `convert ${KEYS} -f raw -O qcow2 ${options} disk.raw of-${id}.qcow2`)
    }
    const source = (id: string): string => `driver=qcow2,encrypt.key-secret=${id},file.filename=of-${id}.qcow2`
    const line = (target: string): string =>
      `convert ${KEYS} --image-opts ${source('s')} ${source('n')} -O raw ${target}`
    await done('ours', line('ours.raw'))
    await done('theirs', line('theirs.raw'))
    expect(readFileSync(join(folder, 'ours.raw')).equals(readFileSync(join(folder, 'theirs.raw')))).toBe(true)
    const wrong = `convert ${KEYS} --image-opts ${source('s')} ${source('n').replace('secret=n', 'secret=x')} -O raw x.raw`
    const { code, stderr } = await tools.ours(wrong)
    expect([code, stderr]).toEqual([
      1,
      expect.stringMatching(/Could not open '.*of-n.qcow2': the secret opens no key slot/),
    ])
  })

  it('needs no secret to look at an image, nor derives a key for it', async () => {
    await done('ours', `create -q ${OBJECT} -f qcow2 ${LUKS} look.qcow2 1M`)
    const line = `info --object secret,id=s,data=nope ${opts('look.qcow2')}`
    const [ours, theirs] = await tools.inTurn(line)
    expect([ours.code, ours.stderr]).toEqual([theirs.code, theirs.stderr])
    expect(ours.code).toBe(0)
  })

  it('tells a wrong secret of either image of a comparison', async () => {
    await done('ours', `convert ${OBJECT} -f raw -O qcow2 ${LUKS} disk.raw made.qcow2`)
    const raw = 'driver=raw,file.filename=disk.raw'
    const image = opts('made.qcow2').slice(13)
    for (const [a, b] of [
      [image, raw],
      [raw, image],
    ]) {
      const line = `compare --object secret,id=s,data=nope --image-opts ${a} ${b}`
      const [ours, theirs] = await tools.inTurn(line)
      expect(ours.code).toBe(theirs.code)
      expect(ours.stderr).toMatch(/Could not open '.*made.qcow2': the secret opens no key slot/)
    }
  })

  it('tells a wrong secret, and keeps the target away', async () => {
    const wrong = `convert --object secret,id=s,data=nope ${opts('made.qcow2')} -O raw wrong.raw`
    const [ours, theirs] = await tools.inTurn(wrong)
    expect([ours.code, theirs.code]).toEqual([1, 1])
    expect(ours.stderr).toMatch(/Could not open '.*': the secret opens no key slot/)
    expect(() => readFileSync(join(folder, 'wrong.raw'))).toThrow('ENOENT')
  })

  it.each(['commit', 'rebase -b other.qcow2 -F qcow2'])(
    'tells a wrong secret, and changes nothing: %s',
    async command => {
      for (const name of ['below', 'other']) await done('ours', `convert -f raw -O qcow2 disk.raw ${name}.qcow2`)
      await done('ours', `create -q ${OBJECT} -f qcow2 -b below.qcow2 -F qcow2 ${LUKS} above.qcow2`)
      const hashes = (): string[] =>
        ['below.qcow2', 'above.qcow2'].map(name =>
          createHash('sha256')
            .update(readFileSync(join(folder, name)))
            .digest('hex'),
        )
      const before = hashes()
      const line = `${command} --object secret,id=s,data=nope ${opts('above.qcow2')}`
      const [ours, theirs] = await tools.inTurn(line)
      expect([ours.code, theirs.code]).toEqual([1, 1])
      expect(ours.stderr).toMatch(/Could not open '.*above.qcow2': the secret opens no key slot/)
      expect(hashes()).toEqual(before)
    },
  )

  it('converts into an encrypted image that exists', async () => {
    for (const [maker, reader] of [
      ['ours', 'theirs'],
      ['theirs', 'ours'],
    ] as const) {
      await done(maker, `create -q ${OBJECT} -f qcow2 ${LUKS} target.qcow2 1M`)
      const target = opts('target.qcow2').replace('--image-opts ', '')
      await done(
        maker,
        `convert -n ${OBJECT} --image-opts --target-image-opts driver=raw,file.filename=disk.raw ${target}`,
      )
      const line = `compare ${OBJECT} ${opts('target.qcow2')} driver=raw,file.filename=disk.raw`
      expect(await done(reader, line)).toBe('Images are identical.\n')
      await done(reader, `check ${OBJECT} ${opts('target.qcow2')}`)
    }
  })
})
