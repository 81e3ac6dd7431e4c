/** What qemu-img refuses, refused alike: exit codes always, and its words where they are about images. */

import { cpSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { asQemuImg, describeWithQemu, execute, haveQemu, type Outcome, workspace } from './run.js'

const folder = workspace()

async function make(...args: string[]): Promise<void> {
  expect(await execute('qemu-img', args, folder), args.join(' ')).toMatchObject({ code: 0 })
}

if (haveQemu) {
  await make('create', '-q', '-f', 'qcow2', 'a.qcow2', '4M')
  await execute('qemu-io', ['-f', 'qcow2', '-c', 'write -P 7 0 1M', 'a.qcow2'], folder)
  await make('create', '-q', '-f', 'qcow2', '-o', 'compat=v2', 'v2.qcow2', '4M')
  await make('create', '-q', '-f', 'qcow2', '-o', 'compat=v2', 'tv2.qcow2', '4M')
  await make('create', '-q', '-f', 'qcow2', 't.qcow2', '4M')
  await make('create', '-q', '-f', 'qcow2', 'small.qcow2', '1M')
  await make('create', '-q', '-f', 'qcow2', '-b', 'a.qcow2', '-F', 'qcow2', 'o.qcow2')
  await make('create', '-q', '-f', 'qcow2', '-u', '-b', 'gone', '-F', 'qcow2', 'orphan.qcow2', '4M')
  await make('create', '-q', '-f', 'raw', 'd.raw', '4M')
  for (const name of ['s.qcow2', 'b.qcow2', 'cut.qcow2']) cpSync(join(folder, 'a.qcow2'), join(folder, name))
  await make('snapshot', '-c', 'one', 's.qcow2')
  await make('bitmap', '--add', 'b.qcow2', 'bm')
  writeFileSync(join(folder, 'cut.qcow2'), readFileSync(join(folder, 'a.qcow2')).subarray(0, 100))
  mkdirSync(join(folder, 'dir'))
}

/** Hints come behind the message, and each tool has its own. */
const said = ({ code, stdout, stderr }: Outcome) => ({
  code,
  stdout,
  stderr: stderr
    .split('\n')
    .filter(line => line.startsWith('qemu-img'))
    .map(line => line.replace(/\.$/, '')),
})

/** A word is what stands between spaces; `''` is none. */
const words = (line: string): string[] => line.split(' ').map(word => (word === "''" ? '' : word))

async function both(line: string): Promise<[ours: Outcome, theirs: Outcome]> {
  const before = readdirSync(folder).toSorted()
  const ours = await asQemuImg(words(line), folder)
  expect(readdirSync(folder).toSorted(), 'nothing is left of a refusal').toEqual(before)
  // What qemu-img leaves behind goes to a folder of its own.
  const beside = join(folder, '..', `${folder.split('/').at(-1)}-theirs`)
  cpSync(folder, beside, { recursive: true })
  const theirs = await execute('qemu-img', words(line), beside)
  await execute('rm', ['-rf', beside], folder)
  return [ours, theirs]
}

const SAME_WORDS = `
resize
resize a.qcow2 8M extra
resize a.qcow2 foo
resize a.qcow2 +-1
resize a.qcow2 16E
resize a.qcow2 1M
resize -6 a.qcow2
resize gone 1M
resize '' 8M
snapshot -l -c x a.qcow2
snapshot -6
snapshot -d none a.qcow2
snapshot -f foo a.qcow2
snapshot -c x -U a.qcow2
bitmap --add a.qcow2
bitmap --add -g foo a.qcow2 bm
bitmap --remove -g 64k b.qcow2 bm
bitmap --add -F qcow2 a.qcow2 bm
bitmap --add -f foo a.qcow2 bm
amend a.qcow2
amend -o compat=v3 a.qcow2 extra
amend -o cluster_size=4k a.qcow2
amend -o refcount_bits=7 a.qcow2
amend -z -o compat=v3 a.qcow2
info -f qcow2 d.raw
info -f foo a.qcow2
info -q a.qcow2
info ''
map --start-offset=foo a.qcow2
map -6 a.qcow2
check -r all -U a.qcow2
check -r
check -T foo a.qcow2
compare -f foo a.qcow2 t.qcow2
compare -f qcow2 d.raw a.qcow2
compare -6 a.qcow2 t.qcow2
compare gone a.qcow2
measure --size foo
measure -6
measure --size 1M a.qcow2
dd -6 if=a.qcow2 of=out
dd bs=foo if=a.qcow2 of=out
dd count=foo if=a.qcow2 of=out
dd seek=1 if=a.qcow2 of=out
commit -r foo o.qcow2
commit -b t.qcow2 o.qcow2
commit -6 o.qcow2
rebase -6 o.qcow2
rebase -b d.raw -F qcow2 o.qcow2
rebase -b gone -F qcow2 o.qcow2
create -6 out 1M
create -f qcow2 out -1
create -f qcow2 out foo
create -f
convert -6 a.qcow2 out
convert -Z a.qcow2 out
convert -f qcow2 d.raw out
convert -S foo a.qcow2 out
convert -r foo a.qcow2 out
convert --bitmaps -O qcow2 v2.qcow2 out
convert --bitmaps -O qcow2 d.raw out
convert --bitmaps -O raw v2.qcow2 out
convert --bitmaps -O raw b.qcow2 out
convert --bitmaps -O qcow2 -o compat=v2 a.qcow2 out
convert --bitmaps -O qcow2 -o compat=v2 v2.qcow2 out
convert --bitmaps --skip-broken-bitmaps -O qcow2 v2.qcow2 out
convert --bitmaps -n -O qcow2 v2.qcow2 t.qcow2
convert --bitmaps -n -O qcow2 a.qcow2 tv2.qcow2
convert --bitmaps -n -O qcow2 b.qcow2 tv2.qcow2
convert --skip-broken-bitmaps -O qcow2 b.qcow2 out
-6
-f`

const SAME_CODE = `
resize --preallocation=metadata -f raw d.raw 8M
resize cut.qcow2 8M
snapshot -c x d.raw
snapshot -a none a.qcow2
snapshot --create
bitmap --add b.qcow2 bm
bitmap --remove a.qcow2 bm
bitmap --add v2.qcow2 bm
bitmap --add -g 3000 a.qcow2 bm
bitmap --merge bm -b gone b.qcow2 bm
amend -o compat=v3 cut.qcow2
info --output=xml a.qcow2
info dir
check -r foo a.qcow2
check cut.qcow2
compare dir a.qcow2
measure -l one d.raw
measure -O qcow2 -o compat=v9 --size 1M
dd of=out
dd if=a.qcow2 of=
convert -m 17 a.qcow2 out
convert -l one d.raw out
convert -n -O qcow2 a.qcow2 small.qcow2
convert a.qcow2 a.qcow2
convert orphan.qcow2 out
convert a.qcow2 ''
create -f qcow2 dir 1M
rebase -b o.qcow2 -F qcow2 o.qcow2`

const lines = (text: string): string[] => text.trim().split('\n')

describeWithQemu('refusals beside qemu-img', () => {
  it.each(lines(SAME_WORDS))('%s', async line => {
    const [ours, theirs] = await both(line)
    expect(said(ours)).toEqual(said(theirs))
    expect(ours.code).toBeGreaterThan(0)
  })

  it.each(lines(SAME_CODE))('%s: the exit code', async line => {
    const [ours, theirs] = await both(line)
    expect(ours.code, ours.stderr).toBe(theirs.code)
    expect(ours.stderr).toMatch(/^qemu-img( \w+)?: /)
  })
})
