/** Images of version 1, `-f qcow`: what qemu-img says of them, said alike; new ones read by it; what it changes, refused. */

import { cpSync, existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, expect, it } from 'vitest'
import { asQemuImg, describeWithQemu, execute, type Outcome, workspace } from './run.js'

const folder = workspace()

async function theirs(line: string): Promise<Outcome> {
  return execute('qemu-img', line.split(' '), folder)
}

const ours = (line: string): Promise<Outcome> => asQemuImg(line.split(' '), folder)

async function make(line: string): Promise<void> {
  expect(await theirs(line), line).toMatchObject({ code: 0 })
}

/** The lines of the tool itself: hints come behind them, and each tool has its own. */
const said = ({ code, stdout, stderr }: Outcome) => ({
  code,
  stdout,
  stderr: stderr.split('\n').filter(line => line.startsWith('qemu-img')),
})

describeWithQemu('qcow on the command line', () => {
  beforeAll(async () => {
    await make('create -q -f qcow plain.qcow 4M')
    const writes = ['write -P 7 0 1M', 'write -P 9 2M 5k', 'write -P 3 4000k 96k']
    await execute('qemu-io', ['-f', 'qcow', ...writes.flatMap(each => ['-c', each]), 'plain.qcow'], folder)
    await make('create -q -f qcow small.qcow 4M')
    // One cluster each: QEMU compresses no more at once.
    const small = ['write -c -P 7 0 4k', 'write -c -P 8 4k 4k', 'write -c -P 9 2M 4k', 'write -P 3 8k 5k']
    await execute('qemu-io', ['-f', 'qcow', ...small.flatMap(each => ['-c', each]), 'small.qcow'], folder)
    await make('convert -f qcow -O qcow2 plain.qcow same.qcow2')
    await make('create -q -f qcow -b same.qcow2 -F qcow2 over.qcow')
    await execute('qemu-io', ['-f', 'qcow', '-c', 'write -P 5 64k 64k', 'over.qcow'], folder)
    await make('create -q -f qcow2 -b over.qcow -F qcow top.qcow2')
    await make('create -q -f raw disk.raw 4M')
    await make('convert -f qcow -O raw plain.qcow target.raw')
    await make('create -q -f qcow2 target.qcow2 4M')
    await make(
      'convert --object secret,id=s,data=x -f raw -O qcow -o encrypt.format=aes,encrypt.key-secret=s target.raw secret.qcow',
    )
  })

  it.each(
    `
info plain.qcow
info -f qcow plain.qcow
info --output=json small.qcow
info over.qcow
info --backing-chain --output=json top.qcow2
info secret.qcow
map plain.qcow
map --output=json plain.qcow
map --output=json small.qcow
map --output=json -f qcow over.qcow
map --output=json top.qcow2
measure -O qcow2 plain.qcow
measure -O raw -f qcow small.qcow
compare plain.qcow same.qcow2
compare -f qcow -F qcow2 small.qcow same.qcow2
compare plain.qcow over.qcow
compare plain.qcow disk.raw
check plain.qcow
check -f qcow -r all over.qcow
snapshot -l plain.qcow
snapshot -c x plain.qcow
snapshot -a x plain.qcow
snapshot -d x plain.qcow
resize -f qcow plain.qcow 8M
resize gone.qcow 8M
amend -f qcow -o compat=v3 plain.qcow
rebase -u -b same.qcow2 -F qcow2 plain.qcow
rebase -b gone -F foo top.qcow2
commit plain.qcow
info -f qcow disk.raw
compare -f qcow disk.raw plain.qcow
convert --bitmaps -O qcow2 plain.qcow out`
      .trim()
      .split('\n'),
  )('%s', async line => {
    expect(said(await ours(line))).toEqual(said(await theirs(line)))
  })

  it.each([
    ['plain.qcow', ''],
    ['small.qcow', '-f qcow '],
    ['over.qcow', ''],
    ['top.qcow2', ''],
  ])('convert %s', async (name, format) => {
    for (const to of ['raw', 'qcow2']) {
      expect(await ours(`convert ${format}-O ${to} ${name} out.${to}`)).toMatchObject({ code: 0, stderr: '' })
      expect(await theirs(`compare -F ${to} ${name} out.${to}`)).toMatchObject({ code: 0 })
    }
  })

  it('new ones are those that QEMU makes, and it reads what is in them', async () => {
    for (const line of [
      'create -f qcow new 3000001',
      'create -f qcow -b same.qcow2 -F qcow2 new',
      'create -f qcow -o help',
    ]) {
      expect(await ours(line), line).toEqual(await theirs(line))
      const made = line.includes(' new') ? readFileSync(join(folder, 'new')) : undefined
      await ours(line)
      if (made !== undefined) expect(readFileSync(join(folder, 'new')).equals(made), line).toBe(true)
    }
    for (const line of [
      'convert -O qcow plain.qcow new',
      'convert -c -O qcow plain.qcow new',
      'convert -O qcow -B same.qcow2 -F qcow2 small.qcow new',
      'dd -O qcow bs=64k if=plain.qcow of=new',
    ]) {
      const source = line.includes('small') ? 'small.qcow' : 'plain.qcow'
      expect(await ours(line), line).toMatchObject({ code: 0, stderr: '' })
      expect(await theirs(`compare -f qcow ${source} -F qcow new`), line).toMatchObject({ code: 0 })
    }
  })

  it('dd copies a part of one', async () => {
    expect(await ours('dd -f qcow bs=64k skip=15 count=33 if=plain.qcow of=part.raw')).toMatchObject({ code: 0 })
    expect(await theirs('dd -f qcow bs=64k skip=15 count=33 if=plain.qcow of=theirs.raw')).toMatchObject({ code: 0 })
    expect(readFileSync(join(folder, 'part.raw')).equals(readFileSync(join(folder, 'theirs.raw')))).toBe(true)
  })

  it('create and rebase name one as a backing file', async () => {
    for (const line of [
      'create -q -f qcow2 -b plain.qcow -F qcow made.qcow2',
      'rebase -b small.qcow -F qcow made.qcow2',
    ]) {
      expect(await ours(line), line).toMatchObject({ code: 0, stderr: '' })
      expect(await theirs('compare made.qcow2 plain.qcow'), line).toMatchObject({ code: 0 })
    }
    expect(await ours('convert -O qcow2 -B plain.qcow -F qcow same.qcow2 made2.qcow2')).toMatchObject({ code: 0 })
    expect(await theirs('compare made2.qcow2 plain.qcow')).toMatchObject({ code: 0 })
    expect(await ours('create -f qcow2 -b plain.qcow made3.qcow2')).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('Detected format of qcow.'),
    })
  })

  it.each([
    ['convert -n -O qcow disk.raw plain.qcow', 'writing qcow images'],
    ['convert -n -c -O qcow disk.raw plain.qcow', 'Compression not supported for this file format'],
    ['create -f qcow out 0', 'out: Image size is too small, cannot be zero length'],
    ['create -f qcow -o encryption=on out 1M', "Option 'encryption'"],
    ['create -f qcow -o encrypt.format=aes,encrypt.key-secret=s out 1M', "Option 'encrypt.format'"],
    ['bitmap --add plain.qcow b', 'Operation add on bitmap b failed: Operation not supported'],
    ['bitmap --remove-all plain.qcow', 'Operation remove-all failed: Operation not supported'],
    ['compact plain.qcow', 'This image format does not support compaction'],
    ['commit over.qcow', "Format driver 'qcow' does not support commit"],
    ['rebase -b disk.raw -F raw over.qcow', "Could not change the backing file to 'disk.raw': Operation not supported"],
    ['convert secret.qcow out', "the guest data is encrypted (AES): give the image's secret"],
    ['convert -l x plain.qcow out', "Failed to load snapshot: 'plain.qcow' is qcow, and has no snapshots"],
    ['info -f qcow target.qcow2', 'unsupported qcow version 3'],
  ])('%s is refused', async (line, message) => {
    cpSync(join(folder, 'plain.qcow'), join(folder, 'before'))
    const { code, stderr } = await ours(line)
    expect({ code, stderr }).toEqual({ code: 1, stderr: expect.stringContaining(message) })
    expect(existsSync(join(folder, 'out'))).toBe(false)
    expect(readFileSync(join(folder, 'plain.qcow')).equals(readFileSync(join(folder, 'before')))).toBe(true)
  })
})
