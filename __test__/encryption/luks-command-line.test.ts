/** LUKS files on the command line, with either tool. */

import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, expect, it } from 'vitest'
import { bothTools, describeWithQemu, type Tool, workspace } from '../cli/run.js'

const folder = workspace()
const tools = bothTools(folder)

const OBJECT = '--object secret,id=s,data=hunter2'
const LUKS = '-o key-secret=s,iter-time=10'
const opts = (name: string): string => `--image-opts driver=luks,key-secret=s,file.driver=file,file.filename=${name}`

async function done(tool: Tool, line: string): Promise<string> {
  const { code, stdout, stderr } = await tools[tool](line)
  expect({ code, stderr }, `${tool}: ${line}`).toEqual({ code: 0, stderr: '' })
  return stdout
}

/** Both print the same. */
async function alike(line: string): Promise<void> {
  const [ours, theirs] = await tools.inTurn(line)
  expect({ code: ours.code, stdout: ours.stdout }, `${line}: ${ours.stderr}`).toEqual({
    code: theirs.code,
    stdout: theirs.stdout,
  })
}

describeWithQemu('LUKS files on the command line', () => {
  beforeAll(async () => {
    writeFileSync(join(folder, 'disk.raw'), Buffer.concat([Buffer.alloc(300_032, 7), Buffer.alloc(748_544)]))
    await done('theirs', `convert ${OBJECT} -f raw -O luks ${LUKS} disk.raw their.luks`)
  })

  it.each([
    ['ours', 'theirs'],
    ['theirs', 'ours'],
  ] as const)('%s makes, %s reads', async (maker, reader) => {
    expect(await done(maker, `create ${OBJECT} -f luks ${LUKS} new.luks 1M`)).toBe(
      "Formatting 'new.luks', fmt=luks size=1048576 key-secret=s iter-time=10\n",
    )
    expect(await done(reader, 'info new.luks')).toContain('virtual size: 1 MiB (1048576 bytes)\n')
    await done(maker, `convert ${OBJECT} -f raw -O luks ${LUKS},cipher-alg=aes-128 disk.raw made.luks`)
    const same = `compare ${OBJECT} ${opts('made.luks')} driver=raw,file.filename=disk.raw`
    expect(await done(reader, same)).toBe('Images are identical.\n')
    await done(reader, `convert ${OBJECT} ${opts('made.luks')} -O raw back.raw`)
    expect(readFileSync(join(folder, 'back.raw')).equals(readFileSync(join(folder, 'disk.raw')))).toBe(true)
    await done(maker, `resize ${OBJECT} ${opts('made.luks')} 2M`)
    expect(await done(reader, 'info made.luks')).toContain('virtual size: 2 MiB (2097152 bytes)\n')
    await done(maker, `resize --shrink ${OBJECT} ${opts('made.luks')} 1M`)
    expect(await done(reader, same)).toBe('Images are identical.\n')
  })

  it.each([
    'info their.luks',
    'info --output=json their.luks',
    'info -f luks their.luks',
    `check ${OBJECT} ${opts('their.luks')}`,
    `map --output=json ${OBJECT} ${opts('their.luks')}`,
    'create -f luks -o help',
    'create -f luks x.luks 1M',
    `create ${OBJECT} -f luks -o key-secret=t x.luks 1M`,
    `create ${OBJECT} -f luks -o key-secret=s,cipher-alg=des x.luks 1M`,
    `create ${OBJECT} -f luks -o key-secret=s,cluster_size=4k x.luks 1M`,
    `create ${OBJECT} -f luks ${LUKS} -b disk.raw -F raw x.luks 1M`,
    `convert ${OBJECT} -c -f raw -O luks ${LUKS} disk.raw x.luks`,
    'convert -f luks -O raw their.luks x.raw',
    `snapshot ${OBJECT} -c one ${opts('their.luks')}`,
    `measure ${OBJECT} -O luks ${LUKS} -f raw disk.raw`,
    `measure --output=json ${OBJECT} -O luks ${LUKS},cipher-alg=aes-128 --size 1000000`,
    'measure -O luks --size 1M',
  ])('as qemu-img does: %s', async line => {
    await alike(line)
    expect(existsSync(join(folder, 'x.luks'))).toBe(false)
  })

  it('writes into one that exists, and takes a header in a file of its own', async () => {
    await done('ours', `create ${OBJECT} -f luks ${LUKS} onto.luks 1M`)
    const header = readFileSync(join(folder, 'onto.luks')).subarray(0, 2_068_480)
    // The data is said to lie elsewhere.
    const detached = Buffer.from(header)
    detached.writeUInt32BE(0, 104)
    writeFileSync(join(folder, 'header'), detached)
    const data = readFileSync(join(folder, 'onto.luks')).subarray(2_068_480)
    writeFileSync(join(folder, 'data'), data)
    const described = 'driver=luks,key-secret=s,file.filename=data,header.driver=file,header.filename=header'
    for (const tool of ['ours', 'theirs'] as const) {
      await done(tool, `convert ${OBJECT} --image-opts ${described} -O raw ${tool}.raw`)
      const same = `compare ${OBJECT} ${opts('onto.luks')} ${described}`
      expect(await done(tool, same)).toBe('Images are identical.\n')
    }
    expect(readFileSync(join(folder, 'ours.raw')).equals(readFileSync(join(folder, 'theirs.raw')))).toBe(true)
    const info = await done('ours', `info ${OBJECT} --image-opts ${described}`)
    expect(info).toContain('    detached header: true\n')
  })

  it('changes key slots as qemu-img does, with its words', async () => {
    const KEYS = '--object secret,id=s,data=one --object secret,id=n,data=two'
    for (const name of ['ours', 'theirs']) await done('ours', `create -q ${KEYS} -f luks ${LUKS} ${name}.keys 1M`)
    // Each tool on its own image, in turn: one leads to the next.
    for (const options of [
      'state=active,new-secret=n,iter-time=10',
      'state=active,new-secret=n,iter-time=10,keyslot=5',
      'state=active,new-secret=n,iter-time=10,keyslot=5',
      'state=active',
      'new-secret=n',
      'encrypt.state=active',
      'size=2M',
      'state=inactive',
      'state=inactive,keyslot=3',
      'state=inactive,keyslot=5',
      'state=inactive,old-secret=n',
      'state=inactive,keyslot=0',
      'help',
    ]) {
      const of = (tool: string): string => `amend ${KEYS} -o ${options} ${opts(`${tool}.keys`)}`
      const [ours, theirs] = [await tools.ours(of('ours')), await tools.theirs(of('theirs'))]
      expect({ ...ours, stderr: ours.stderr.replaceAll('ours.keys', 'theirs.keys') }, options).toEqual(theirs)
      const slots = async (name: string): Promise<unknown> =>
        JSON.parse(await done('theirs', `info --output=json ${name}.keys`))['format-specific'].data.slots.map(
          (slot: { active: boolean }) => slot.active,
        )
      expect(await slots('ours'), options).toEqual(await slots('theirs'))
    }
    await done('theirs', `compare ${KEYS} ${opts('ours.keys')} driver=luks,key-secret=s,file.filename=ours.keys`)
  })

  it('refuses by name what there is not', async () => {
    expect(await tools.ours('check their.luks')).toMatchObject({
      code: 63,
      stderr: 'qemu-img: This image format does not support checks\n',
    })
    const { code, stderr } = await tools.ours(`create ${OBJECT} -f luks ${LUKS},detached-header=on x.luks 1M`)
    expect([code, stderr]).toEqual([1, expect.stringContaining("Option 'detached-header'")])
    expect(existsSync(join(folder, 'x.luks'))).toBe(false)
  })
})
