/** `--object secret`, `--image-opts` and `-o encrypt.…`: the command lines of qemu-img, with either tool. */

import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, expect, it } from 'vitest'
import { asQemuImg, describeWithQemu, execute, type Outcome, workspace } from '../cli/run.js'

const folder = workspace()
const tools = {
  ours: (line: string): Promise<Outcome> => asQemuImg(line.split(' '), folder),
  theirs: (line: string): Promise<Outcome> => execute('qemu-img', line.split(' '), folder),
}

const OBJECT = '--object secret,id=s,data=hunter2'
const LUKS = '-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10'
const opts = (name: string, more = ''): string =>
  `--image-opts driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.driver=file,file.filename=${name}${more}`

async function done(tool: keyof typeof tools, line: string): Promise<string> {
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
    const [ours, theirs] = await Promise.all([tools.ours(line), tools.theirs(line)])
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
    for (const option of ['backing.file.filename=disk.raw', 'backing.driver=raw']) {
      const { code, stderr } = await tools.ours(`info ${OBJECT} ${opts('made.qcow2', `,${option}`)}`)
      expect([code, stderr]).toEqual([
        1,
        expect.stringContaining(`does not support the option '${option.split('=')[0]}'`),
      ])
    }
  })

  it('tells a wrong secret, and keeps the target away', async () => {
    const wrong = `convert --object secret,id=s,data=nope ${opts('made.qcow2')} -O raw wrong.raw`
    const [ours, theirs] = await Promise.all([tools.ours(wrong), tools.theirs(wrong)])
    expect([ours.code, theirs.code]).toEqual([1, 1])
    expect(ours.stderr).toMatch(/Could not open '.*': the secret opens no key slot/)
    expect(() => readFileSync(join(folder, 'wrong.raw'))).toThrow('ENOENT')
  })
})
