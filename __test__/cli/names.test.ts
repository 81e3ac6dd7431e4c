/** Names on the command line: bytes that are not UTF-8, colons, and one file by several names. */

import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { exactArguments } from '../../src/cli/arguments.js'
import { temporaryFolder } from '../api/fixtures.js'
import { type Printed, shell } from '../api/shell.js'
import { describeWithQemu } from './run.js'

const root = temporaryFolder()

/** A folder of its own for each of two programs, and what each printed for the same script; `T` in it is the program. */
function both(
  name: string,
  script: string,
): { readonly ours: Printed; readonly theirs: Printed; readonly folder: string } {
  const run = (program: string): Printed => {
    const folder = join(root, `${name}-${program}`)
    mkdirSync(folder)
    return shell(folder, `T() { ${program} "$@"; }\n${script}`)
  }
  return { ours: run('qcow2'), theirs: run('qemu-img'), folder: join(root, `${name}-qcow2`) }
}

const latin = (bytes: Buffer): string => bytes.toString('latin1')

// Other systems have no such names.
const onLinux = process.platform === 'linux' ? describeWithQemu : describe.skip

onLinux('bytes that are not UTF-8', () => {
  it('name snapshots, and are printed as they are', () => {
    const { ours, theirs } = both(
      'snapshots',
      `T create -q -f qcow2 a.qcow2 1M
       qemu-io -c 'write -q -P 1 0 64k' a.qcow2; T snapshot -c 'caf\xe9' a.qcow2
       qemu-io -c 'write -q -P 2 0 64k' a.qcow2; T snapshot -c 'caf\xe8' a.qcow2
       qemu-io -c 'write -q -P 3 0 64k' a.qcow2; T snapshot -c 'caf\xef\xbf\xbd' a.qcow2
       T snapshot -l a.qcow2 | cut -c 1-33
       T snapshot -a 'caf\xe8' a.qcow2 && qemu-io -r -c 'read -q -P 2 0 64k' a.qcow2 && echo second
       T snapshot -d 'caf\xe9' a.qcow2 && T snapshot -l a.qcow2 | cut -c 1-33
       T convert -l 'snapshot.name=caf\xe8' -O raw a.qcow2 b.raw && od -A n -t x1 -N 1 b.raw
       T convert -l 'caf\xef\xbf\xbd' -O raw a.qcow2 b.raw && od -A n -t x1 -N 1 b.raw
       T snapshot -d 'caf\xea' a.qcow2 || echo none
       T info --output=json a.qcow2 | grep '"name"'`,
    )
    expect(latin(ours.stdout)).toBe(latin(theirs.stdout))
    expect(latin(ours.stdout)).toContain('second')
    expect(latin(ours.stderr)).toContain("'caf\xea'")
  })

  it('name files, in every command', () => {
    const { ours, theirs } = both(
      'files',
      `mkdir 'd\xedr'; cd 'd\xedr'
       T create -q -f qcow2 'b\xe4se.qcow2' 1M; qemu-io -c 'write -q -P 7 0 64k' 'b\xe4se.qcow2'
       T create -f qcow2 -b 'b\xe4se.qcow2' -F qcow2 't\xf6p.qcow2'
       T create -f qcow2 -o 'data_file=d\xe4ta.raw' 'spl\xeft.qcow2' 1M
       T info 't\xf6p.qcow2' | grep -v 'disk size'; T info --backing-chain 't\xf6p.qcow2' | grep image
       T info --output=json 't\xf6p.qcow2' | grep filename; T info 'spl\xeft.qcow2' | grep 'data file'
       T map 't\xf6p.qcow2'
       T check 't\xf6p.qcow2'; T compare 't\xf6p.qcow2' 'b\xe4se.qcow2'
       T convert -O raw 't\xf6p.qcow2' 'r\xf4h.raw'; T convert -O qcow2 -B 'b\xe4se.qcow2' -F qcow2 't\xf6p.qcow2' 'd\xeblta.qcow2'
       T dd -O raw bs=64k count=1 'if=t\xf6p.qcow2' 'of=t\xebil.raw'; od -A n -t x1 -N 1 't\xebil.raw'
       T bitmap --add 't\xf6p.qcow2' 't\xe4g'; T info 't\xf6p.qcow2' | grep name:; T bitmap --remove 't\xf6p.qcow2' 't\xe4g'
       T measure -O raw 't\xf6p.qcow2'; T resize -q 't\xf6p.qcow2' 2M; T amend -o lazy_refcounts=on 't\xf6p.qcow2'
       T rebase -b '' 't\xf6p.qcow2'; T rebase -b 'b\xe4se.qcow2' -F qcow2 't\xf6p.qcow2'; T commit 't\xf6p.qcow2'
       T rebase -u -b 'nichts\xe9' -F qcow2 't\xf6p.qcow2'; T info 't\xf6p.qcow2' | grep 'backing file:'
       T info 'f\xe9hlt' 2>&1 | sed 's/^[a-z0-9-]*: //'; ls`,
    )
    expect(latin(ours.stdout)).toBe(latin(theirs.stdout))
    expect(latin(ours.stderr)).toBe(latin(theirs.stderr).replaceAll('qemu-img: ', 'qcow2: '))
    expect(latin(ours.stdout)).toContain("Could not open 'f\xe9hlt': No such file or directory")
  })

  it('are padded and escaped as QEMU does', () => {
    const names = [
      '\xc3\xa9',
      '\xed\xa0\x80',
      '\xc0\x80',
      '\xff\xfe',
      '\xe2\x82x',
      '\xf4\x90\x80\x80',
      '\xef\xbf\xbe',
      '\xf0\x9f\x92\xbe',
      '\xf8\x88\x80\x80\x80',
    ]
    const { ours, theirs } = both(
      'escapes',
      `T create -q -f qcow2 a.qcow2 1M
       ${names.map(name => `T snapshot -c 'x${name}y' a.qcow2`).join('\n')}
       T snapshot -l a.qcow2 | sed 's/ 20..-.*//'; T info --output=json a.qcow2 | grep '"name"'`,
    )
    expect(latin(ours.stdout)).toBe(latin(theirs.stdout))
  })
})

it.skipIf(process.platform !== 'linux')(
  'bytes that are not UTF-8 reach what is started, and what is made beside',
  () => {
    const folder = join(root, 'started')
    mkdirSync(folder)
    const { stdout, stderr } = shell(
      folder,
      `qcow2 create -q -f qcow2 'd\xefsk' 1M
     qcow2 convert -O vmdk -o subformat=monolithicFlat 'd\xefsk' 'fl\xe4t.vmdk'; grep -a -o '"fl.*"' 'fl\xe4t.vmdk'; qcow2 check 'fl\xe4t.vmdk'
     qcow2 nbd --fork --pid-file 'p\xefd' -k "$PWD/s\xf6cket" 'd\xefsk'; ls; kill "$(cat 'p\xefd')"; qcow2 shims 't\xf6ols'`,
    )
    const files = ['d\xefsk', 'fl\xe4t-flat.vmdk', 'fl\xe4t.vmdk', 'p\xefd', 's\xf6cket', '']
    expect(latin(stdout).split('\n')).toEqual(['"fl\xe4t-flat.vmdk"', 'No errors were found on the image.', ...files])
    expect(latin(stderr)).toBe(`qcow2: '${folder}/t\xf6ols': Node starts no program whose name is not UTF-8\n`)
  },
)

it('arguments without their bytes are refused, not guessed', () => {
  expect(exactArguments(['info', 'plain'])).toEqual(['info', 'plain'])
  if (process.platform === 'linux') expect(() => exactArguments(['caf\uFFFD'])).toThrow(/not UTF-8/)
})

describeWithQemu('a colon in a name', () => {
  it.each([
    ['behind ./', './disk-10:30.qcow2'],
    ['behind file:', 'file:disk-10:30.qcow2'],
  ])('%s is part of a file name', (what, name) => {
    const { ours, theirs } = both(
      `colon-${what.replaceAll(/\W/g, '')}-${name.length}`,
      `T create -q -f qcow2 ${name} 1M; qemu-io -c 'write -q -P 7 0 64k' ./disk-10:30.qcow2
       T create -f qcow2 -b ${name} -F qcow2 top.qcow2; T create -f qcow2 -b ${name} top.qcow2
       T info top.qcow2 | grep backing; T info --backing-chain top.qcow2 | grep image
       T convert -O raw top.qcow2 file:a:b.raw; od -A n -t x1 -N 1 ./a:b.raw
       T convert -O qcow2 -B ${name} -F qcow2 top.qcow2 delta.qcow2; T rebase -b ${name} -F qcow2 delta.qcow2
       T compare ${name} top.qcow2; T map ${name}; T commit top.qcow2; T check ${name}
       mkdir x:y; cp top.qcow2 disk-10:30.qcow2 x:y; T info --backing-chain ./x:y/top.qcow2 | grep image
       T create -q -f qcow2 -o data_file=${name}.raw split.qcow2 1M; T info split.qcow2 | grep 'data file'; ls`,
    )
    expect(latin(ours.stdout)).toBe(latin(theirs.stdout))
    expect(latin(ours.stderr)).toBe(latin(theirs.stderr).replaceAll('qemu-img: ', 'qcow2: '))
  })

  it('before any slash is a protocol, and the message says the way out', () => {
    const { ours, theirs } = both(
      'protocol',
      `T create -q -f qcow2 ./disk-10:30.qcow2 1M
       T info disk-10:30.qcow2; T create -f qcow2 -b disk-10:30.qcow2 -F qcow2 top.qcow2
       T create -q -u -f qcow2 -b disk-10:30.qcow2 -F qcow2 top.qcow2 1M && T map top.qcow2; ls`,
    )
    expect(latin(ours.stdout)).toBe(latin(theirs.stdout))
    expect(latin(theirs.stderr).match(/Unknown protocol 'disk-10'/g)).toHaveLength(3)
    expect(latin(ours.stderr).match(/Unknown protocol 'disk-10'/g)).toHaveLength(2)
    expect(latin(ours.stderr).match(/'\.\/disk-10:30\.qcow2'/g)).toHaveLength(3)
  })
})

describe('a new image', () => {
  const folder = join(root, 'over')
  beforeAll(() => {
    mkdirSync(folder)
    const { code } = shell(
      folder,
      `mkdir seed; cd seed
       qcow2 create -q -f qcow2 base.qcow2 1M; ln -s base.qcow2 current.qcow2; ln base.qcow2 hard.qcow2
       qcow2 create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
       qcow2 create -q -f qcow2 -o data_file=data.raw split.qcow2 1M; printf data | dd of=data.raw conv=notrunc status=none
       qcow2 create -q -f qcow2 -b split.qcow2 -F qcow2 over.qcow2`,
    )
    expect(code).toBe(0)
  })

  it.each([
    'create -f qcow2 -b base.qcow2 -F qcow2 ./base.qcow2',
    'create -f qcow2 -b base.qcow2 -F qcow2 current.qcow2',
    'create -f qcow2 -b current.qcow2 -F qcow2 base.qcow2',
    'create -f qcow2 -b base.qcow2 -F qcow2 hard.qcow2',
    'create -f qcow2 -u -b base.qcow2 -F qcow2 ./base.qcow2 1M',
    'create -f qcow2 -b top.qcow2 -F qcow2 base.qcow2',
    'create -f qcow2 -b split.qcow2 -F qcow2 data.raw',
    'create -f qcow2 -b over.qcow2 -F qcow2 ./data.raw',
    'create -f qcow2 -b base.qcow2 -F qcow2 -o data_file=base.qcow2 new.qcow2',
    'create -f qcow2 -b top.qcow2 -F qcow2 -o data_file=./base.qcow2 new.qcow2',
    'create -f qcow2 -o data_file=./new.qcow2 new.qcow2 1M',
    'create -f qcow2 -o data_file=hard.qcow2 base.qcow2 1M',
    'convert -O qcow2 top.qcow2 base.qcow2',
    'convert -O raw top.qcow2 hard.qcow2',
    'convert -O raw split.qcow2 data.raw',
    'convert -n -O raw split.qcow2 data.raw',
    'convert -n -O qcow2 top.qcow2 base.qcow2',
    'convert -O qcow2 base.qcow2 ./base.qcow2',
    'convert -O qcow2 -o data_file=base.qcow2 top.qcow2 new.qcow2',
    'convert -O qcow2 -o data_file=data.raw over.qcow2 new.qcow2',
    'convert -O qcow2 -o data_file=./new.qcow2 top.qcow2 new.qcow2',
    'convert -O qcow2 -B base.qcow2 -F qcow2 top.qcow2 current.qcow2',
    'convert -O qcow2 -B over.qcow2 -F qcow2 top.qcow2 data.raw',
    'dd -O raw bs=1M if=top.qcow2 of=base.qcow2',
    'dd -O raw bs=1M if=over.qcow2 of=data.raw',
    'rebase -b ./top.qcow2 -F qcow2 top.qcow2',
    'map --output=svg -o ./base.qcow2 top.qcow2',
    'map --output=svg -o data.raw over.qcow2',
    'report -o ./base.qcow2 top.qcow2',
  ])('is not made over what it needs: %s', command => {
    const { code, stdout } = shell(
      folder,
      `rm -rf work; cp -a seed work; cd work; qcow2 ${command} > /dev/null 2>&1; code=$?
       for f in *; do [ -L "$f" ] || cmp "$f" "../seed/$f"; done; diff -q . ../seed; exit $code`,
    )
    expect(latin(stdout)).toBe('')
    expect(code).toBe(1)
  })
})
